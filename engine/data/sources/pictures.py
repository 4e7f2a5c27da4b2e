"""Source protocol (pictures with captions), and the one way from a file to RGB pixels.

A file that does not decode completely is never half used: Pillow's tolerance for truncated files is off,
PNG checksums are compared, and everything that goes wrong becomes one UnreadablePicture, which the stream
turns into an error or, where the configuration tolerates it, into a counted replacement.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageFile

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.captions import Captions
from millrace.engine.data.first_bytes import kind_of
from millrace.engine.data.formats.shard_index import digests_of
from millrace.engine.data.png_chunks import transparent_value, without_text
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sample_files import read_picture_file
from millrace.engine.data.srgb import PROFILE, to_srgb

READ_FORMATS = ("JPEG", "PNG", "WEBP")
_KEYS_AT_A_TIME = 1 << 16
MAX_SCANS = 500
"""A progressive JPEG has about ten. Each costs a pass over all pixels but only a few bytes, so that a small
file with very many of them would decode for hours."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By orientation, as EXIF counts them."""
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


class UnreadablePicture(Exception):
    """The pixels of one picture cannot be had: where it is, why, and what kind of damage that is."""

    def __init__(self, where: str, reason: str, kind: Reason = Reason.CORRUPT_PICTURE) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason
        self.kind = kind


class Source(Protocol):
    """An indexed set of captioned pictures. All methods are safe to call from several threads."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name for people, unique in the source."""

    def captions(self, index: int) -> Captions: ...

    def image(self, index: int) -> Image.Image:
        """The picture upright in mode RGB; may be shared, so do not modify it. Raises UnreadablePicture."""


OpenSource = Callable[[Data | Part, Data], Source]
"""`ENTRY` of the module that has a source's name. It opens what a part of a mixture, or the data section
itself, names; the second argument is the data section."""


class Files(Source, Protocol):
    """A source whose pictures are files."""

    def encoded(self, index: int) -> bytes | None:
        """The file of a picture; None where it is no JPEG. Raises UnreadablePicture."""


def stored_size(source: Source, index: int) -> tuple[int, int] | None:
    """(width, height) in pixels that the index of a source says its picture has; None where there is none."""
    return source.stored_size(index) if hasattr(source, "stored_size") else None


def samples_ahead(source: Source) -> int:
    """How many pictures `read_ahead` should be told of before they are read; 0 where it does nothing."""
    parts = getattr(source, "sources", None)
    return getattr(source, "ahead", 0) if parts is None else max(map(samples_ahead, parts))


def read_ahead(source: Source, indices: Sequence[int], keys: bool = False) -> None:
    """Begin to read pictures that will be asked for, each once and in about this order; returns at once.

    `keys` is for those of which `key_alone` will be.
    """
    if hasattr(source, "read_ahead"):
        source.read_ahead(indices, keys)


def forget_ahead(source: Source) -> None:
    """Nobody asks for what was read ahead."""
    for part in getattr(source, "sources", ()):
        forget_ahead(part)
    if hasattr(source, "forget_ahead"):
        source.forget_ahead()


def stored_sizes(source: Source, indices: np.ndarray) -> np.ndarray | None:
    """(n, 2) int64, (width, height) of pictures by the index of a source, 0 where a part of it has none; None
    where the whole has none."""
    if hasattr(source, "stored_sizes"):
        return source.stored_sizes(indices)
    return None


def picture_size(source: Source, index: int) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture: by the index of the source, else by the header of its
    file, and decoded only where a source has neither. Raises UnreadablePicture."""
    if (stored := stored_size(source, index)) is not None:
        return stored
    return source.header_size(index) if hasattr(source, "header_size") else source.image(index).size


def key_alone(source: Source, index: int) -> str:
    """Key of a picture of which nothing else is wanted; a source that would read the picture for it has
    `key_alone`."""
    return source.key_alone(index) if hasattr(source, "key_alone") else source.key(index)


def key_digests(source: Source) -> Iterator[np.ndarray]:
    """(n, 2) uint64, `key_digest` of the keys of all pictures of a source, in order and in parts."""
    if hasattr(source, "key_digests"):
        yield from source.key_digests()
        return
    for first in range(0, len(source), _KEYS_AT_A_TIME):
        yield digests_of(source.key(i) for i in range(first, min(first + _KEYS_AT_A_TIME, len(source))))


def holds_files(source: Source) -> bool:
    """Whether `source`, or a part of it, is a `Files`."""
    parts = getattr(source, "sources", None)
    return hasattr(source, "encoded") if parts is None else any(map(holds_files, parts))


def encoded(source: Source, index: int) -> bytes | None:
    """`Files.encoded` of any source; None where it has no files."""
    return source.encoded(index) if hasattr(source, "encoded") else None


def read_picture(path: Path, *, profiles: bool = True) -> Image.Image:
    """Decode a JPEG, PNG or WebP file completely: upright (EXIF, XMP), sRGB over white, mode RGB.

    Sixteen-bit samples keep their high byte, as Pillow does for colour. Raises UnreadablePicture for files
    that are missing, truncated, corrupt, animated, of another format, or above Pillow's limit for
    decompression bombs. Without `profiles` its values are taken as sRGB whatever its colour profile.
    """
    try:
        data = read_picture_file(path)
    except Rejected as problem:
        raise UnreadablePicture(str(path), problem.detail, problem.reason) from None
    return decode_picture(data, str(path), profiles=profiles)


def decode_picture(data: bytes, where: str, *, profiles: bool = True) -> Image.Image:
    """As `read_picture`, from the bytes of a file; `where` names it in errors."""
    with open_picture(data, where) as image:
        if not profiles:
            image.info.pop(PROFILE, None)
        return finished(image, where)


def finished(image: Image.Image, where: str) -> Image.Image:
    """Pixels of what `open_picture` gives: decoded, upright, in sRGB; mode RGB."""
    turn = _TURNS.get(orientation(image))
    image.load()
    if turn is not None:
        image = image.transpose(turn)
    return to_srgb(image, where)


@contextmanager
def open_picture(data: bytes, where: str) -> Iterator[Image.Image]:
    """A picture whose header is read and which may be decoded; inside, all errors of Pillow are
    UnreadablePicture."""
    with _picture_errors(where, data):
        png = without_text(data)
        _check(png.data, where)
        with Image.open(io.BytesIO(png.data), formats=READ_FORMATS) as image:
            if png.profile is not None:
                image.info[PROFILE] = png.profile
            if image.format == "PNG" and "transparency" in image.info:
                image.info["transparency"] = transparent_value(png.data, image.info["transparency"])
            yield image


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """(width, height) of a picture file when upright, of which no pixels are decoded. Raises
    UnreadablePicture."""
    with open_picture(data, where) as image:
        width, height = image.size
        return (height, width) if orientation(image) >= 5 else (width, height)


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts them: that of EXIF or, where it has none, of XMP; else 1."""
    found = image.getexif().get(ExifTags.Base.Orientation)
    if found in range(1, 9):
        return int(found)
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(match[1]) if match else 1


def _check(data: bytes, where: str) -> None:
    """Refuse what must not be decoded, and compare the checksums of a PNG."""
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS:
        what = f"a JPEG of more than {MAX_SCANS} scans"
        raise UnreadablePicture(where, what, Reason.DECOMPRESSION_BOMB)
    # Another library in this process may have told Pillow to pad truncated files with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with Image.open(io.BytesIO(data), formats=READ_FORMATS) as probe:
        limit = Image.MAX_IMAGE_PIXELS
        if limit and probe.width * probe.height > limit:
            what = _too_many_pixels(f"{probe.width}x{probe.height}", limit)
            raise UnreadablePicture(where, what, Reason.DECOMPRESSION_BOMB)
        # Phones write JPEG with a second picture inside (MPO); the first is the photograph.
        if getattr(probe, "is_animated", False) and probe.format != "MPO":
            raise UnreadablePicture(where, "it is animated; store the wanted frame alone", Reason.ANIMATED)
        probe.verify()  # leaves the object unusable for decoding


@contextmanager
def _picture_errors(where: str, data: bytes) -> Iterator[None]:
    """Everything that Pillow raises for a file becomes UnreadablePicture."""
    try:
        yield
    except (UnreadablePicture, Rejected):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        what = _too_many_pixels("it", Image.MAX_IMAGE_PIXELS)
        raise UnreadablePicture(where, what, Reason.DECOMPRESSION_BOMB) from None
    except Image.UnidentifiedImageError:
        raise _unidentified(where, data) from None
    except Exception as error:  # corrupt files make Pillow raise nearly every built-in exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadablePicture(where, " ".join(reason.split())) from error


def _unidentified(where: str, data: bytes) -> UnreadablePicture:
    if not data:
        return UnreadablePicture(where, "the file has no bytes", Reason.EMPTY_PICTURE)
    kind = kind_of(data)
    what = "not a JPEG, PNG or WebP picture"
    if kind is None:
        return UnreadablePicture(where, what)
    if kind.name in ("a JPEG picture", "a PNG picture", "a WebP picture"):
        return UnreadablePicture(where, f"{kind.name} whose header is damaged")
    reason = Reason.UNSUPPORTED_FORMAT if kind.is_picture else Reason.CORRUPT_PICTURE
    return UnreadablePicture(where, f"{what} but {kind.name}", reason)


def _too_many_pixels(what: str, limit: int | None) -> str:
    return f"{what} is more than the {limit} pixels that Pillow considers safe to decode; store it smaller"
