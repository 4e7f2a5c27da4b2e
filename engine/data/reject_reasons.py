"""Reject reasons: why an input is not among the samples, as fixed names to count and a line for people."""

from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """Names are stable: manifests, rejects.jsonl and other programs use them."""

    MISSING_CAPTION = "missing_caption"
    EMPTY_CAPTION = "empty_caption"
    AMBIGUOUS_CAPTION = "ambiguous_caption"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    CAPTION_NOT_JSON = "caption_not_json"
    CAPTION_NOT_TEXT = "caption_not_text"
    CAPTION_TOO_LONG = "caption_too_long"
    MISSING_PICTURE = "missing_picture"
    EMPTY_PICTURE = "empty_picture"
    CORRUPT_PICTURE = "corrupt_picture"
    UNSUPPORTED_FORMAT = "unsupported_format"
    ANIMATED = "animated"
    DECOMPRESSION_BOMB = "decompression_bomb"
    PICTURE_TOO_LARGE = "picture_too_large"
    TOO_SMALL = "too_small"
    DUPLICATE_KEY = "duplicate_key"
    UNSAFE_NAME = "unsafe_name"
    SPECIAL_FILE = "special_file"
    UNREADABLE_FILE = "unreadable_file"
    TRUNCATED_TAR = "truncated_tar"
    CORRUPT_TAR = "corrupt_tar"
    CORRUPT_PARQUET = "corrupt_parquet"

    @property
    def is_bad(self) -> bool:
        """Whether it counts against `--max-bad-share`: a small picture is a good one that does not fit."""
        return self is not Reason.TOO_SMALL


class Reject(NamedTuple):
    """One input that is not among the samples."""

    key: str
    reason: Reason
    detail: str


class Rejected(Exception):
    """Raised while one sample is read or converted; what catches it knows the sample's key."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
