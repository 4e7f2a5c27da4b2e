"""Which pictures samples are compared with, and which captions they are made for."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from millrace.engine.config.loading import parse_config
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.evaluation import reference_set
from millrace.engine.evaluation.reference_set import Reference, levels
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256


def config(**evaluation):
    data = {"source": "builtin", "resolution": 16} | evaluation.pop("data", {})
    values = {
        "model": {"in_channels": 3},
        "conditioning": {"autoencoder": {"kind": "pixels"}},
        "data": data,
        "evaluation": {"samples": 8} | evaluation,
    }
    return parse_config(values, "test")


@pytest.fixture
def folder(tmp_path):
    """`folder(captions)` -> 6 pictures of 20 x 16 pixels, with captions or without."""

    def make(captions):
        root = tmp_path / f"captions-{captions}"
        (root / "sub").mkdir(parents=True)
        for i in range(6):
            path = root / ("sub" if i % 2 else ".") / f"{i}.png"
            Image.fromarray(np.full((20, 16, 3), 40 * i, np.uint8)).save(path)
            if captions:
                path.with_suffix(".txt").write_text(f"caption {i}")
        return root

    return make


def test_data_of_the_run():
    found = Reference(config(samples=30), 4)
    source = open_source(config().data)
    assert found.count == len(source) == 22
    captions = [found.caption(i) for i in range(30)]
    assert sorted(captions[:22]) == sorted(source.captions(i).long for i in range(22))
    assert captions[22:] == captions[:8]
    picture = next(i for i in range(22) if source.captions(i).long == captions[3])
    view = evaluation_view(source.image(picture), config().data, 4)
    assert torch.equal(found.view(3), ((view + 1) * 127.5).round().to(torch.uint8))
    assert found.size(3) == (16, 16)
    assert Reference(config(caption="short"), 4).caption(3) == source.captions(picture).short


def test_fewer_reference_pictures_are_those_with_the_captions():
    some = Reference(config(reference_samples=5), 4)
    assert some.count == 5
    assert [some.caption(i) for i in range(5)] == [some.caption(i + 5) for i in range(5)]
    every = Reference(config(samples=30), 4)
    assert [some.caption(i) for i in range(5)] == [every.caption(i) for i in range(5)]
    assert torch.equal(some.view(4), every.view(4))


def test_folder_with_captions(folder):
    found = Reference(config(reference=str(folder(True))), 4)
    assert found.count == 6
    for place in range(6):
        number = int(found.caption(place).split()[1])
        assert int(found.view(place)[0, 0, 0]) == 40 * number


def test_folder_without_captions(folder):
    found = Reference(config(reference=str(folder(False))), 4)
    source = open_source(config().data)
    assert found.count == 6
    assert sorted(int(found.view(place)[0, 0, 0]) // 40 for place in range(6)) == list(range(6))
    assert {found.caption(i) for i in range(22)} == {source.captions(i).long for i in range(22)}


def test_folder_with_one_caption_missing(folder):
    root = folder(True)
    (root / "0.txt").unlink()
    with pytest.raises(UserError, match=r"0\.png: has neither"):
        Reference(config(reference=str(root)), 4)


def test_mixed_aspects():
    found = Reference(config(data={"aspect": "mixed", "resolution": 32}), 4)
    assert all(found.view(i).shape[1:] == found.size(i) for i in range(8))
    assert len({found.size(i) for i in range(8)}) > 1


def test_identity(folder):
    root = folder(False)
    first = Reference(config(reference=str(root)), 4)
    again = Reference(config(reference=str(root), seed=5, samples=9), 4)
    assert first.identity() == again.identity()
    assert first.identity() != Reference(config(reference=str(root), reference_samples=5), 4).identity()
    assert first.identity() != Reference(config(reference=str(root), data={"resolution": 12}), 4).identity()
    before = first.identity()
    Image.fromarray(np.full((20, 16, 3), 7, np.uint8)).save(root / "0.png")
    assert Reference(config(reference=str(root)), 4).identity() != before


def test_levels_are_those_of_a_file():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(levels(every.float() / 127.5 - 1), every)
    assert levels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_refusals(tmp_path, folder):
    with pytest.raises(UserError, match=r"no such folder; set evaluation\.reference"):
        Reference(config(reference=str(tmp_path / "nowhere")), 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in this folder"):
        Reference(config(reference=str(tmp_path / "empty")), 4)
    root = folder(False)
    (root / "0.png").write_text("no picture")
    found = Reference(config(reference=str(root)), 4)
    with pytest.raises(UserError, match=r"reference picture .*0\.png: .*; repair or remove it"):
        [found.view(place) for place in range(6)]
    large = Reference(config(reference=str(root), data={"resolution": 64}), 4)
    with pytest.raises(UserError, match="its crop needs 64x64"):
        [large.view(place) for place in range(6)]


def test_sizes_of_files_come_from_their_headers(tmp_path, monkeypatch):
    """Also of a mixture and of listed keys; a picture that lies on its side is upright."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for i, size in enumerate([(40, 24), (24, 40), (32, 32), (40, 24)]):
        path = tmp_path / f"{i}.jpg"
        Image.new("RGB", size).save(path, exif=turned if i == 3 else Image.Exif())
        path.with_suffix(".txt").write_text(f"caption {i}")
    keys = tmp_path / "listed"
    keys.write_text("1.jpg\n3.jpg\n")
    part = {"name": "a", "source": "folder", "path": str(tmp_path)}
    own = {"aspect": "mixed", "resolution": 32, "upscale": True}
    for data, count in (
        ({"source": "folder", "path": str(tmp_path)}, 4),
        ({"source": "mixture", "mixture": [part, part | {"name": "b", "keys": str(keys)}]}, 6),
    ):
        found = Reference(config(samples=count, data=own | data), 4)
        wanted = [found.view(i).shape[1:] for i in range(count)]
        with monkeypatch.context() as no_pixels:
            no_pixels.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("a picture was decoded"))
            assert [found.size(i) for i in range(count)] == wanted
        assert len(set(wanted)) == 3


def test_sizes_of_shards_come_from_their_index(tmp_path, write_shards, monkeypatch):
    write_shards(tmp_path, {(16, 24): 5, (24, 16): 4}, patch=4)
    settings = config(data={"source": "shards", "path": str(tmp_path), "aspect": "mixed", "resolution": 20})
    found = Reference(settings, 4)
    wanted = [found.view(i).shape[1:] for i in range(8)]
    names = [found._pictures.key(int(place)) for place in found._order]
    first = found.identity()
    monkeypatch.setattr(ShardsSource, "record", lambda *_: pytest.fail("a picture was read"))
    assert [found.size(i) for i in range(8)] == wanted
    assert len(set(wanted)) == 2
    other = Reference(settings, 4)
    monkeypatch.setattr(Reference, "view", lambda *_: torch.zeros(1))
    digest = sha256([name.encode() + b"\0" for name in names])
    monkeypatch.setattr(reference_set, "_LOOKED_AT", 0)
    assert digest[:32] in other.identity()
    assert found.identity() == first
