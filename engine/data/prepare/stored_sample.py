"""Sample conversion: from the bytes of an input to what a shard stores of it.

RawSample ──▶ complete decode ──▶ bucket ──▶ the same JPEG bytes where they will do, else a new JPEG
"""

import io
from typing import NamedTuple

from PIL import Image, ImageOps

from millrace.engine.data.formats.shard_writer import StoredSample, sample_record
from millrace.engine.data.prepare.settings import ROOM, Settings
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sources.pictures import (
    READ_FORMATS,
    Captions,
    UnreadablePicture,
    check_picture,
    picture_errors,
    to_rgb,
)

MAX_PICTURE_BYTES = 256 * 2**20
"""Files above it are not read."""
MAX_SCANS = 500
"""A progressive JPEG has about ten. Each costs a pass over all pixels but only a few bytes, so that a small
file with very many of them would decode for hours."""

REDUCING_GAP = 3.0
"""Box reduction by a whole number first, Lanczos for the last factor of three: no visible difference (Pillow
documents 3.0 as "almost indistinguishable"), several times faster on photographs of many megapixels."""

_ORIENTATION = 0x0112
_TURNED = range(2, 9)
_QUARTER_TURNED = range(5, 9)
_OTHER_FORMATS = (b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ")
"""How files of known formats begin that are not read: GIF, BMP, TIFF, JPEG XL, JPEG 2000."""


class RawSample(NamedTuple):
    """One sample as the input has it."""

    key: str
    picture: bytes
    captions: Captions


class ConvertedSample(NamedTuple):
    """One sample as a shard stores it."""

    bucket: int
    """Index into `Settings.buckets`."""
    stored: StoredSample


def convert(raw: RawSample, settings: Settings) -> ConvertedSample:
    """Decode the picture completely, choose its bucket, and make what is stored. Raises Rejected."""
    if not raw.picture:
        raise Rejected(Reason.EMPTY_PICTURE, "the file has no bytes")
    try:
        with picture_errors(raw.key):
            bucket, picture, original, stored = _convert_picture(raw, settings)
    except UnreadablePicture as problem:
        raise Rejected(_kind(problem, raw.picture), problem.reason) from None
    record = sample_record(raw.key, raw.captions, *original)
    return ConvertedSample(bucket, StoredSample(picture, record, *stored))


def _convert_picture(
    raw: RawSample, settings: Settings
) -> tuple[int, bytes, tuple[int, int], tuple[int, int]]:
    """Bucket, JPEG file, and (width, height) in pixels of the upright original and of the JPEG."""
    data = raw.picture
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_SCANS:
        raise Rejected(Reason.DECOMPRESSION_BOMB, f"a JPEG of more than {MAX_SCANS} scans")
    check_picture(data, raw.key)
    with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
        orientation = image.getexif().get(_ORIENTATION)
        width, height = image.size
        if orientation in _QUARTER_TURNED:
            width, height = height, width
        bucket = settings.bucket_of(width, height)
        h, w = settings.buckets[bucket]
        ratio = min(width / w, height / h)
        if ratio < 1 and not settings.upscale:
            raise Rejected(
                Reason.TOO_SMALL, f"{width}x{height} pixels (width x height), its bucket is {w}x{h}"
            )
        plain = image.format == "JPEG" and image.mode == "RGB" and orientation not in _TURNED
        larger = ratio > ROOM
        if plain and (settings.store == "original" or not larger):
            image.load()
            return bucket, data, (width, height), (width, height)
        scale = ROOM / ratio if larger else 1.0
        stored = round(width * scale), round(height * scale)
        if larger and image.format == "JPEG":
            # libjpeg decodes at a half, a quarter or an eighth where that leaves enough for the filter.
            gap = tuple(round(edge * scale * REDUCING_GAP) for edge in image.size)
            image.draft(None, gap)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = to_rgb(image)
    if rgb.size != stored:
        rgb = rgb.resize(stored, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=settings.quality, comment=b"")
    return bucket, file.getvalue(), (width, height), stored


def _kind(problem: UnreadablePicture, data: bytes) -> Reason:
    """The damage, told apart further: a file of another format, or none at all."""
    if problem.kind is not Reason.UNSUPPORTED_FORMAT:
        return problem.kind
    known = data.startswith(_OTHER_FORMATS) or data[4:8] == b"ftyp"
    return Reason.UNSUPPORTED_FORMAT if known else Reason.CORRUPT_PICTURE
