import socket

import numpy as np
import pytest
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import open_source
from millrace.engine.data.crop import evaluation_view
from millrace.engine.data.sources import builtin
from millrace.engine.data.sources.builtin import BuiltinSource
from millrace.engine.util.errors import UserError


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
def test_every_picture_loads_offline_and_works_with_the_default_configuration():
    source = open_source(Data())
    assert isinstance(source, BuiltinSource)
    assert len(source) >= 16
    for index in range(len(source)):
        image = source.image(index)
        assert image.mode == "RGB"
        assert evaluation_view(image, Data(), patch=16, key=source.key(index)).shape == (3, 256, 256)
        assert evaluation_view(image, Data(resolution=64), patch=16).shape == (3, 64, 64)


def test_pictures_are_the_files_they_name():
    source = BuiltinSource()
    keys = [source.key(index) for index in range(len(source))]
    skimage = pytest.importorskip("skimage.data")
    sklearn = pytest.importorskip("sklearn.datasets")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        pixels = np.asarray(source.image(keys.index(f"builtin/{name}")))
        np.testing.assert_array_equal(pixels, getattr(skimage, name)())
    for name in ("china", "flower"):
        pixels = np.asarray(source.image(keys.index(f"builtin/{name}")))
        np.testing.assert_array_equal(pixels, sklearn.load_sample_image(f"{name}.jpg"))


def test_transparent_silhouette_stands_on_white():
    source = BuiltinSource()
    keys = [source.key(index) for index in range(len(source))]
    horse = np.asarray(source.image(keys.index("builtin/horse")))
    assert (horse[0] == 255).all()
    assert (horse[150, 200] == 0).all()


def test_captions_are_distinct_and_of_the_right_length():
    source = BuiltinSource()
    captions = [source.captions(index) for index in range(len(source))]
    assert all(25 <= len(caption.long.split()) <= 50 for caption in captions)
    assert all(4 <= len(caption.short.split()) <= 9 for caption in captions)
    texts = [text for caption in captions for text in caption]
    assert len(set(texts)) == len(texts) == 2 * len(source)
    assert all(text == " ".join(text.split()) and text.isascii() for text in texts)
    assert len({source.key(index) for index in range(len(source))}) == len(source)


def test_no_picture_is_there_twice():
    source = BuiltinSource()
    assert len({source.image(index).tobytes() for index in range(len(source))}) == len(source)


def test_pictures_are_decoded_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        builtin, "read_picture", lambda path, profiles: calls.append(path) or Image.new("RGB", (8, 8))
    )
    source = BuiltinSource()
    assert source.image(3) is source.image(3)
    assert len(calls) == 1


def test_missing_package_and_missing_file_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="skimage is not installed; pip install scikit-image"):
        BuiltinSource()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"astronaut\.png is missing; reinstall it .* scikit-image"):
        BuiltinSource()
