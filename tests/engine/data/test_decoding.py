"""Which decoder a configuration gets, and what is said where it cannot have the one it asks for."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import open_source
from millrace.engine.data.crop import cut
from millrace.engine.data.decoding import PythonDecoder, open_decoder, parts
from millrace.engine.data.sample_choices import View
from millrace.engine.data.sources.key_subset import KeptSource
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import encoded, holds_files, stored_size
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("red")
    return open_source(Data(source="folder", path=str(tmp_path)))


def without_dali(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "nvidia.dali" else find(name)
    )


def test_sources_without_files_are_decoded_by_pillow():
    source = open_source(Data())
    assert not holds_files(source)
    decoder = open_decoder(source, Data(workers=3), CPU)
    assert isinstance(decoder, PythonDecoder)
    assert decoder.description == "Pillow, 3 threads"
    with pytest.raises(
        UserError, match=r"^data\.loader dali decodes JPEG files, but data\.source builtin has"
    ):
        open_decoder(source, Data(loader="dali"), CPU)


def test_without_dali_auto_takes_pillow_and_dali_says_what_to_install(folder, monkeypatch):
    without_dali(monkeypatch)
    assert open_decoder(folder, Data(workers=0), CPU).description == "Pillow in the training thread"
    with pytest.raises(UserError) as caught:
        open_decoder(folder, Data(loader="dali"), CPU)
    assert str(caught.value) == (
        "data.loader dali needs NVIDIA DALI: pip install 'nvidia-dali-cuda130>=2.4', "
        "or set data.loader to python"
    )


def test_auto_takes_dali_where_there_are_files(folder):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    decoder = open_decoder(folder, Data(workers=2), CPU)
    assert decoder.description.startswith("NVIDIA DALI ")
    assert decoder.description.endswith(" on the CPU, 2 threads")
    decoder.close()
    assert isinstance(open_decoder(folder, Data(loader="python"), CPU), PythonDecoder)


def test_files_of_parts_and_lists_are_those_of_their_sources(folder):
    config = Data(source="mixture", mixture=[{"name": "d", "source": "digits"}, {"name": "f", "path": "x"}])
    digits = open_source(Data(source="digits", resolution=32))
    mixed = MixtureSource(config.mixture, [digits, KeptSource(folder, np.array([0, 1]))])
    assert holds_files(mixed)
    assert not holds_files(KeptSource(digits, np.array([3])))
    assert encoded(mixed, 0) is None
    assert encoded(mixed, len(digits)) == encoded(folder, 0)
    assert encoded(folder, 0).startswith(b"\xff\xd8")
    assert encoded(folder, 1) is None  # no JPEG
    assert stored_size(mixed, len(digits)) is None


@pytest.mark.parametrize("flip", [False, True])
def test_pillow_cuts_and_flips(flip):
    class One:
        image_of = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))

        def image(self, index):
            assert index == 7
            return self.image_of

    view = View((16, 24), (3, 4, 33, 24), flip)
    pixels = PythonDecoder(One(), 0).start(
        7, lambda width, height: view if (width, height) == (40, 30) else None
    )
    wanted = cut(One.image_of, view.box, view.size)
    assert torch.equal(pixels, wanted.flip(-1) if flip else wanted)


@pytest.mark.parametrize(("length", "count"), [(0, 3), (1, 3), (2, 3), (3, 3), (32, 5), (33, 16), (7, 1)])
def test_parts_are_everything_in_order_and_nearly_equal(length, count):
    found = parts(range(length), count)
    assert [i for part in found for i in part] == list(range(length))
    assert len(found) == min(count, length)
    sizes = [len(part) for part in found]
    assert not sizes or (min(sizes) > 0 and max(sizes) - min(sizes) <= 1)
