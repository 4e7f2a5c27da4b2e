import gzip
import io
import tarfile

import pytest
from PIL import Image

from millrace.engine.data.first_bytes import kind_of


def picture(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("BMW.jpg"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "name", "is_picture"),
    [
        (picture("GIF"), "GIF", True),
        (picture("BMP"), "BMP", True),
        (picture("TIFF"), "TIFF", True),
        (picture("JPEG"), "JPEG", True),
        (picture("PNG"), "PNG", True),
        (picture("WEBP"), "WebP", True),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF", True),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC", True),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video", False),
        (gzip.compress(b"x", mtime=0), "gzip", False),
        (b"PK\x03\x04", "zip", False),
        (b"PAR1", "Parquet", False),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", False),
        (b" \n<!DOCTYPE html><html>", "HTML", False),
        (b"<html>404</html>", "HTML", False),
        (b"<svg xmlns='x'/>", "SVG", True),
        (bytes(600), "zero bytes", False),
        (tar(), "tar", False),  # its first member's name begins as a BMP does
    ],
)
def test_kinds(data, name, is_picture):
    kind = kind_of(data)
    assert name in kind.name
    assert kind.is_picture is is_picture


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8", bytes(3) + b"x"])
def test_what_says_nothing(data):
    assert kind_of(data) is None
