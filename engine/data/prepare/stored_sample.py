"""Sample conversion: from the bytes of an input to what a shard stores of it.

RawSample ──▶ complete decode ──▶ bucket ──▶ the same JPEG bytes where they will do, else a new JPEG
"""

import io
from typing import NamedTuple

from PIL import Image

from millrace.engine.data.captions import Captions
from millrace.engine.data.formats.shard_writer import StoredSample, sample_record
from millrace.engine.data.prepare.settings import ROOM, Settings
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sources.pictures import UnreadablePicture, finished, open_picture, orientation
from millrace.engine.data.srgb import has_unusable_profile

REDUCING_GAP = 3.0
"""Box reduction by a whole number first, Lanczos for the last factor of three: no visible difference (Pillow
documents 3.0 as "almost indistinguishable"), several times faster on photographs of many megapixels."""

JPEG_EDGE = 65_500
"""Pixels of an edge that libjpeg takes."""

_QUARTER_TURNED = range(5, 9)


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
    unusable_profile: bool
    """Whether the original has a colour profile that cannot be used, so that its values are taken as sRGB."""


def convert(raw: RawSample, settings: Settings) -> ConvertedSample:
    """Decode the picture completely, choose its bucket, and make what is stored. Raises Rejected."""
    try:
        bucket, picture, original, stored, unusable = _convert_picture(raw, settings)
    except UnreadablePicture as problem:
        raise Rejected(problem.kind, problem.reason) from None
    record = sample_record(raw.key, raw.captions, *original)
    return ConvertedSample(bucket, StoredSample(picture, record, *stored), unusable)


def _convert_picture(
    raw: RawSample, settings: Settings
) -> tuple[int, bytes, tuple[int, int], tuple[int, int], bool]:
    """Bucket, JPEG file, (width, height) in pixels of the upright original and of the JPEG, and whether the
    colour profile of the original cannot be used."""
    data = raw.picture
    with open_picture(data, raw.key) as image:
        turn, unusable = orientation(image), has_unusable_profile(image)
        width, height = image.size
        if turn in _QUARTER_TURNED:
            width, height = height, width
        bucket = settings.bucket_of(width, height)
        h, w = settings.buckets[bucket]
        ratio = min(width / w, height / h)
        if ratio < 1 and not settings.upscale:
            raise Rejected(
                Reason.TOO_SMALL, f"{width}x{height} pixels (width x height), its bucket is {w}x{h}"
            )
        plain = image.format == "JPEG" and image.mode == "RGB" and turn == 1
        larger = ratio > ROOM
        # The bytes keep their colour profile, so that pixels are those of the file however it is read.
        if plain and (settings.store == "original" or not larger):
            image.load()
            return bucket, data, (width, height), (width, height), unusable
        scale = ROOM / ratio
        stored = _stored_size(width * scale, height * scale, bucket, settings) if larger else (width, height)
        if max(stored) > JPEG_EDGE:
            what = (
                f"{width}x{height} pixels would be stored as {stored[0]}x{stored[1]}, a JPEG has {JPEG_EDGE}"
            )
            raise Rejected(Reason.PICTURE_TOO_LARGE, f"{what} at most along an edge")
        if larger and image.format == "JPEG":
            # libjpeg decodes at a half, a quarter or an eighth where that leaves enough for the filter.
            gap = tuple(round(edge * scale * REDUCING_GAP) for edge in image.size)
            image.draft(None, gap)
        rgb = finished(image, raw.key)
    if rgb.size != stored:
        rgb = rgb.resize(stored, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=settings.quality, comment=b"")
    return bucket, file.getvalue(), (width, height), stored, unusable


def _stored_size(width: float, height: float, bucket: int, settings: Settings) -> tuple[int, int]:
    """Whole pixels (width, height) of a picture that belongs to a bucket.

    Rounding may bring its shape over the border to the next bucket, and training knows the stored shape
    alone: then one edge is rounded the other way.
    """
    rounded = round(width), round(height)
    if settings.bucket_of(*rounded) == bucket:
        return rounded
    corners = [(w, h) for w in (int(width), int(width) + 1) for h in (int(height), int(height) + 1)]
    fitting = [corner for corner in corners if settings.bucket_of(*corner) == bucket]
    return min(fitting or [rounded], key=lambda corner: abs(corner[0] / corner[1] - width / height))
