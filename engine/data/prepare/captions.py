"""Caption text out of bytes that may be anything."""

import json

from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sources.pictures import Captions

MAX_CAPTION_BYTES = 64 * 2**10
"""Of one caption as UTF-8; towers read a few hundred tokens of it."""
MAX_JSON_BYTES = 2**20
"""Of a JSON file, which may hold other things besides captions."""

LIMITS = {"txt": MAX_CAPTION_BYTES, "json": MAX_JSON_BYTES}
"""Bytes that are read of a caption file, by its suffix."""


def check_size(suffix: str, size: int) -> None:
    """Raises Rejected for a caption file that is not worth reading."""
    if size > LIMITS[suffix]:
        raise Rejected(
            Reason.CAPTION_TOO_LONG, f"the .{suffix} file has {size} bytes, the limit is {LIMITS[suffix]}"
        )


def captions_of(files: dict[str, bytes]) -> Captions:
    """Captions of a sample whose caption files, by suffix txt or json, are `files`. Raises Rejected.

    A .txt beside a .json is the caption, and the .json only metadata, unless that has both captions.
    """
    if not files:
        raise Rejected(Reason.MISSING_CAPTION, "there is neither a .txt nor a .json with its name")
    if "txt" not in files:
        return _from_json(files["json"])
    if "json" in files:
        try:
            values = _object(files["json"])
            if {"long", "short"} <= values.keys():
                return _both(values["long"], values["short"])
        except Rejected:
            pass
    caption = checked(_text(files["txt"]), "the caption")
    return Captions(caption, caption)


def checked(value: object, name: str) -> str:
    """A caption without white space around it. Raises Rejected unless it is text that can be used."""
    if value is None:
        raise Rejected(Reason.MISSING_CAPTION, f"{name} is null")
    if not isinstance(value, str):
        raise Rejected(Reason.CAPTION_NOT_TEXT, f"{name} is a {type(value).__name__}, not text")
    caption = value.strip()
    if not caption:
        raise Rejected(Reason.EMPTY_CAPTION, f"{name} is empty")
    try:
        size = len(caption.encode())
    except UnicodeEncodeError as error:
        raise Rejected(
            Reason.CAPTION_NOT_UTF8, f"{name} has half a character at place {error.start}"
        ) from None
    if size > MAX_CAPTION_BYTES:
        raise Rejected(Reason.CAPTION_TOO_LONG, f"{name} has {size} bytes, the limit is {MAX_CAPTION_BYTES}")
    return caption


def _both(long: object, short: object) -> Captions:
    return Captions(checked(long, '"long"'), checked(short, '"short"'))


def _from_json(data: bytes) -> Captions:
    values = _object(data)
    if {"long", "short"} <= values.keys():
        return _both(values["long"], values["short"])
    if "caption" in values:
        caption = checked(values["caption"], '"caption"')
        return Captions(caption, caption)
    raise Rejected(Reason.MISSING_CAPTION, 'the .json has neither "caption" nor both "long" and "short"')


def _object(data: bytes) -> dict[str, object]:
    text = _text(data)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected(Reason.CAPTION_NOT_JSON, str(error)[:100]) from None
    if not isinstance(values, dict):
        raise Rejected(Reason.CAPTION_NOT_JSON, f"it is a {type(values).__name__}, not an object")
    return values


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(Reason.CAPTION_NOT_UTF8, f"not UTF-8 at byte {error.start}") from None
