"""Source protocol (pictures with captions), and the one way from a file to RGB pixels.

A file that does not decode completely is never half used: Pillow's tolerance for truncated files is off,
PNG checksums are compared, and everything that goes wrong becomes one UnreadablePicture, which the stream
turns into an error or, where the configuration tolerates it, into a counted replacement.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.formats.shard_index import digests_of
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.util.transient import retried

READ_FORMATS = ("JPEG", "PNG", "WEBP")
_KEYS_AT_A_TIME = 1 << 16


WhichCaption = Literal["long", "short", "empty"]


class Captions(NamedTuple):
    """Both captions of a picture; equal where it has only one."""

    long: str
    short: str

    def chosen(self, which: WhichCaption) -> str:
        """One of them, or the empty caption."""
        return "" if which == "empty" else getattr(self, which)


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


def read_picture(path: Path) -> Image.Image:
    """Decode a JPEG, PNG or WebP file completely: upright (EXIF), transparency over white, mode RGB.

    Sixteen-bit samples keep their high byte, as Pillow does for colour. Raises UnreadablePicture for files
    that are missing, truncated, corrupt, animated, of another format, or above Pillow's limit for
    decompression bombs.
    """
    return decode_picture(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """All of a file, tried again after errors that may pass. Raises UnreadablePicture."""
    try:
        return retried(path.read_bytes)
    except OSError as error:
        raise UnreadablePicture(str(path), error.strerror or str(error), Reason.UNREADABLE_FILE) from error


def decode_picture(data: bytes, where: str) -> Image.Image:
    """As `read_picture`, from the bytes of a file; `where` names it in errors."""
    with picture_errors(where):
        check_picture(data, where)
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


def check_picture(data: bytes, where: str) -> None:
    """Refuse what must not be decoded, and compare the checksums of a PNG; within `picture_errors`."""
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
def picture_errors(where: str) -> Iterator[None]:
    """Everything that Pillow raises for a file becomes UnreadablePicture."""
    try:
        yield
    except (UnreadablePicture, Rejected):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        what = _too_many_pixels("it", Image.MAX_IMAGE_PIXELS)
        raise UnreadablePicture(where, what, Reason.DECOMPRESSION_BOMB) from None
    except Image.UnidentifiedImageError:
        raise UnreadablePicture(where, "not a JPEG, PNG or WebP picture", Reason.UNSUPPORTED_FORMAT) from None
    except Exception as error:  # corrupt files make Pillow raise nearly every built-in exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadablePicture(where, reason) from error


def _too_many_pixels(what: str, limit: int | None) -> str:
    return f"{what} is more than the {limit} pixels that Pillow considers safe to decode; store it smaller"


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in mode RGB: transparency over white, sixteen-bit grey by its high byte."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip these at 255 instead of scaling them.
        values = np.array(image)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 0xFFFF
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
