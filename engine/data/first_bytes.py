"""First bytes of a file: its kind, where its name or its folder says another."""

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of file that is known by how it begins."""

    name: str
    is_picture: bool = False


_BEGINNINGS = (
    (b"GIF8", Kind("a GIF picture", True)),
    (b"BM", Kind("a BMP picture", True)),
    (b"II*\0", Kind("a TIFF picture", True)),
    (b"MM\0*", Kind("a TIFF picture", True)),
    (b"\xff\x0a", Kind("a JPEG XL picture", True)),
    (b"\0\0\0\x0cJXL ", Kind("a JPEG XL picture", True)),
    (b"\0\0\0\x0cjP  ", Kind("a JPEG 2000 picture", True)),
    (b"\xff\x4f\xff\x51", Kind("a JPEG 2000 picture", True)),
    (b"8BPS", Kind("a Photoshop file", True)),
    (b"\x76\x2f\x31\x01", Kind("an OpenEXR picture", True)),
    (b"\xff\xd8\xff", Kind("a JPEG picture", True)),
    (b"\x89PNG\r\n\x1a\n", Kind("a PNG picture", True)),
    (b"\x1f\x8b", Kind("a gzip file")),
    (b"BZh", Kind("a bzip2 file")),
    (b"\xfd7zXZ\0", Kind("an xz file")),
    (b"\x28\xb5\x2f\xfd", Kind("a zstd file")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z file")),
    (b"PK\x03\x04", Kind("a zip file")),
    (b"PAR1", Kind("a Parquet file")),
    (b"%PDF", Kind("a PDF file")),
    (b"version https://git-lfs", Kind("a Git LFS pointer (git lfs pull fetches the file)")),
    (b"\0\5\x16\7", Kind("an AppleDouble file")),
)
_TEXTS = (
    (b"<!doctype html", Kind("an HTML page")),
    (b"<html", Kind("an HTML page")),
    (b"<svg", Kind("an SVG picture", True)),
    (b"<?xml", Kind("an XML file")),
)
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
}
_TAR_MAGIC = slice(257, 262)


def kind_of(data: bytes) -> Kind | None:
    """The kind of a file by its first bytes; None where they say nothing."""
    if data[4:8] == b"ftyp":
        return Kind(f"a picture in {_BRANDS[data[8:12]]}", True) if data[8:12] in _BRANDS else Kind("a video")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Kind("a WebP picture", True)
    if data[_TAR_MAGIC] == b"ustar":
        return Kind("a tar file")
    for beginning, kind in _BEGINNINGS:
        if data.startswith(beginning):
            return kind
    start = data[:256].lstrip().lower()
    for beginning, kind in _TEXTS:
        if start.startswith(beginning):
            return kind
    if data and not any(data[:4096]):
        return Kind("nothing but zero bytes")
    return None
