"""PNG chunks beside the pixels: text of any size is left out before a picture is decoded.

Pillow inflates every text chunk and the colour profile, and refuses a picture of which one exceeds a limit.
Text does not change pixels, but for the orientation in XMP or EXIF.
"""

import struct
import zlib
from typing import Any, NamedTuple

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_WITH_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type xmp")
MAX_TEXT = 2**20
"""Bytes of a text with an orientation that are searched for it, which Pillow takes."""
MAX_PROFILE = 2**24
"""Bytes of a colour profile; those of printers have one or two million."""


class Png(NamedTuple):
    """A PNG file without what could stop its decoding."""

    data: bytes
    profile: bytes | None
    """Colour profile that was taken out of the file; empty where it cannot be inflated; None without any."""


def without_text(data: bytes) -> Png:
    """A PNG without its texts, or any other file as it is. What follows damage stays as it is."""
    if not data.startswith(_SIGNATURE):
        return Png(data, None)
    kept, at, first, profile = [], len(_SIGNATURE), 0, None
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data) or kind == b"IEND":
            break
        if kind in _TEXT or kind == b"iCCP":
            kept.append(data[first:at])
            first = end
            body = data[at + 8 : end - 4]
            if kind == b"iCCP":
                profile = _profile(body) if profile is None else profile
            else:
                kept.append(_orientation(kind, body))
        at = end
    if not kept:
        return Png(data, None)
    return Png(b"".join([*kept, data[first:]]), profile)


def transparent_value(data: bytes, value: Any) -> Any:
    """`Image.info["transparency"]` of a PNG in the levels of its decoded pixels.

    Pillow stretches 2 and 4 bits to 8 and keeps the high byte of 16-bit colour, but not of this value.
    """
    depth, colour = data[24], data[25]
    if colour == 0 and depth in (2, 4):
        return value * 255 // (2**depth - 1)
    if colour == 2 and depth == 16:
        return tuple(sample >> 8 for sample in value)
    return value


def _profile(body: bytes) -> bytes:
    _, _, packed = body.partition(b"\0")
    inflated = _inflated(packed[1:], MAX_PROFILE + 1)
    return b"" if len(inflated) > MAX_PROFILE else inflated


def _orientation(kind: bytes, body: bytes) -> bytes:
    """What takes the place of a text: the beginning of one that may have an orientation, or nothing."""
    keyword, _, rest = body.partition(b"\0")
    if keyword not in _WITH_ORIENTATION:
        return b""
    if kind == b"zTXt":
        text = _inflated(rest[1:], MAX_TEXT)
    elif kind == b"iTXt":
        _, _, text = rest[2:].partition(b"\0")
        _, _, text = text.partition(b"\0")
        if rest[:1] == b"\1":
            text = _inflated(text, MAX_TEXT)
    else:
        text = rest
    if keyword == b"XML:com.adobe.xmp":
        return _chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text[:MAX_TEXT])
    return _chunk(b"tEXt", keyword + b"\0" + text[:MAX_TEXT])


def _inflated(packed: bytes, limit: int) -> bytes:
    """At most `limit` bytes; empty where the data is damaged or ends early."""
    try:
        inflater = zlib.decompressobj()
        inflated = inflater.decompress(packed, limit)
    except zlib.error:
        return b""
    return inflated if inflater.eof or len(inflated) == limit else b""


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
