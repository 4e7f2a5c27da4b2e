import json

from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import fingerprint, open_source
from millrace.engine.data.sources.builtin import BuiltinSource
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.data.sources.open_source import _OF_STREAM


def folder(path, captions):
    path.mkdir()
    for name, caption in captions.items():
        Image.new("RGB", (8, 8)).save(path / f"{name}.png")
        (path / f"{name}.json").write_text(json.dumps({"caption": caption}))
    return FolderSource(path)


def test_the_configuration_chooses_the_source(tmp_path):
    folder(tmp_path / "a", {"x": "a fox"})
    assert isinstance(open_source(Data(source="builtin")), BuiltinSource)
    assert isinstance(open_source(Data(source="folder", path=str(tmp_path / "a"))), FolderSource)


def test_stages_open_a_source_once(tmp_path, write_shards):
    write_shards(tmp_path / "a", {(16, 16): 5})
    (tmp_path / "keys").write_text("pictures/3.png\n")
    one = Data(source="shards", path=str(tmp_path / "a"), resolution=16)
    part = {"name": "a", "source": "shards", "path": one.path}
    some = part | {"name": "b", "keys": str(tmp_path / "keys")}
    opened = {}
    source = open_source(one, opened)
    for change in ({"global_batch": 4}, {"aspect": "bucket"}, {"long_caption": 0.1}, {"workers": 1}):
        assert open_source(one.model_copy(update=change), opened) is source
    assert open_source(one.model_copy(update={"verify": True}), opened) is not source
    mixtures = [
        open_source(Data(source="mixture", mixture=(part | {"weight": weight}, some), resolution=16), opened)
        for weight in (1.0, 2.0)
    ]
    assert [mixture.parts[0].weight for mixture in mixtures] == [1.0, 2.0]
    for mixture in mixtures:
        assert mixture.sources == [source, mixtures[0].sources[1]]
        assert mixture.sources[1].whole is source


def test_settings_that_no_source_is_opened_with_are_settings():
    assert set(Data.model_fields) > _OF_STREAM


def test_fingerprint_follows_keys_captions_and_their_order(tmp_path):
    captions = {"x": "a fox", "y": "a cat"}
    one = fingerprint(folder(tmp_path / "a", captions))
    assert one == fingerprint(folder(tmp_path / "b", captions))
    others = [
        {"x": "a fox", "y": "a dog"},
        {"x": "a fox", "z": "a cat"},
        {"x": "a cat", "y": "a fox"},
        {"x": "a fox"},
    ]
    prints = {fingerprint(folder(tmp_path / f"c{i}", other)) for i, other in enumerate(others)}
    assert len(prints) == 4
    assert one not in prints
