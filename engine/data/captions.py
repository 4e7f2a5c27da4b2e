"""Captions: the one rule by which text becomes the captions of a picture, whatever stores it.

    bytes ──▶ text (UTF-8, or UTF-16 or UTF-32 with a byte order mark) ──▶ values by key ──▶ Captions

`FolderSource`, `MdsSource`, `millrace prepare` and the prompts of `millrace sample` call this module and
nothing else.
"""

import codecs
import contextlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from millrace.engine.data.reject_reasons import Reason, Rejected

MAX_CAPTION_BYTES = 64 * 2**10
"""Of one caption as UTF-8; towers read a few hundred tokens of it."""
MAX_JSON_BYTES = 2**20
"""Of a JSON file, which may hold other things besides captions."""

LIMITS = {"txt": MAX_CAPTION_BYTES, "json": MAX_JSON_BYTES}
"""Bytes that are read of a caption file, by its suffix."""

KEYS = ("long", "short", "caption")
"""Of a JSON object or a table. `caption` stands for whichever of the other two is missing."""

_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Hangul fillers and the empty Braille pattern: letters and a symbol to Unicode, with no ink."""

WhichCaption = Literal["long", "short", "empty"]


class Captions(NamedTuple):
    """Both captions of a picture; equal where it has only one."""

    long: str
    short: str

    def chosen(self, which: WhichCaption) -> str:
        """One of them, or the empty caption."""
        return "" if which == "empty" else getattr(self, which)


def check_size(suffix: str, size: int) -> None:
    """Raises Rejected for a caption file that is not worth reading."""
    if size > LIMITS[suffix]:
        raise Rejected(
            Reason.CAPTION_TOO_LONG, f"the .{suffix} file has {size} bytes, the limit is {LIMITS[suffix]}"
        )


def captions_of(files: Mapping[str, bytes]) -> Captions:
    """Captions of a sample whose caption files, by suffix txt or json, are `files`. Raises Rejected.

    A .txt beside a .json is the caption, and the .json only metadata, unless it has `long` or `short` that
    can be used: then the .txt is what `caption` is in a .json alone.
    """
    if not files:
        raise Rejected(Reason.MISSING_CAPTION, "there is neither a .txt nor a .json with its name")
    if "txt" not in files:
        return captions_by_key(_object(files["json"]), "the .json")
    caption = checked(text_of(files["txt"]), "the caption")
    values: dict[str, object] = {}
    with contextlib.suppress(Rejected):  # metadata of another program, in whatever form
        values = _object(files["json"]) if "json" in files else {}
    return Captions(*(_usable(values.get(key)) or caption for key in ("long", "short")))


def captions_by_key(values: Mapping[str, object], where: str) -> Captions:
    """Captions out of values by name, as in `KEYS`; null is as if it were missing. Raises Rejected."""
    found = {key: checked(values[key], f'"{key}"') for key in KEYS if values.get(key) is not None}
    long, short = (found.get(key, found.get("caption")) for key in ("long", "short"))
    if long is None or short is None:
        null = next((key for key in KEYS if key in values and values[key] is None), None)
        if null and not found:
            raise Rejected(Reason.MISSING_CAPTION, f'"{null}" is null')
        raise Rejected(Reason.MISSING_CAPTION, f'{where} has neither "caption" nor both "long" and "short"')
    return Captions(long, short)


def checked(value: object, name: str) -> str:
    """A caption without white space around it, its line ends "\\n". Raises Rejected unless it can be used.

    Bytes are text by the rule of `text_of`.
    """
    if value is None:
        raise Rejected(Reason.MISSING_CAPTION, f"{name} is null")
    if isinstance(value, bytes):
        value = text_of(value)
    if not isinstance(value, str):
        raise Rejected(Reason.CAPTION_NOT_TEXT, f"{name} is a {type(value).__name__}, not text")
    caption = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not is_visible(caption):
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


def is_visible(text: str) -> bool:
    """Whether a text has a character that leaves ink: no white space, control or format character (zero-width
    ones and byte order marks are among them), blank letter, or combining mark without its letter."""
    return any(
        unicodedata.category(character)[0] not in "ZM"
        and unicodedata.category(character) not in ("Cc", "Cf", "Cn")
        and character not in _BLANK_LETTERS
        for character in text
    )


def text_of(data: bytes) -> str:
    """The text of a caption file. Raises Rejected unless it is UTF-8, or what its byte order mark says."""
    mark, encoding = next((known for known in _ENCODINGS if data.startswith(known[0])), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        what = f"not {encoding.upper().removesuffix('-LE').removesuffix('-BE')}"
        raise Rejected(Reason.CAPTION_NOT_UTF8, f"{what} at byte {len(mark) + error.start}") from None


def captions_listed(data: bytes, suffix: str) -> list[str]:
    """Captions of a file that lists them, such as prompts. Raises Rejected, naming the line or the place.

    Text has one a line. `.jsonl` has a JSON text or object a line, `.json` a list of these, or one; of an
    object the first of `long`, `caption` and `short` that is there counts. Lines without ink are passed over.
    """
    text = text_of(data).replace("\r\n", "\n").replace("\r", "\n")
    if suffix.lower() == ".json":
        values = _parsed(text)
        values = values if isinstance(values, list) else [values]
        return [_at(f"place {n}", _listed, value) for n, value in enumerate(values, 1)]
    read = (lambda line: _listed(_parsed(line))) if suffix.lower() == ".jsonl" else _line
    # Not splitlines, which would end a caption at U+2028 too.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if is_visible(line))
    return [_at(f"line {n}", read, line) for n, line in lines]


def _at(where: str, read: Callable[[Any], str], value: object) -> str:
    try:
        return read(value)
    except Rejected as problem:
        raise Rejected(problem.reason, f"{where}: {problem.detail}") from None


def _line(text: str) -> str:
    return checked(text, "the caption")


def _listed(value: object) -> str:
    if not isinstance(value, dict):
        return checked(value, "the caption")
    _refuse_twice(value, "it")
    name = next((key for key in ("long", "caption", "short") if value.get(key) is not None), None)
    if name is None:
        raise Rejected(Reason.MISSING_CAPTION, 'it has neither "long" nor "caption" nor "short"')
    return checked(value[name], f'"{name}"')


def _object(data: bytes) -> dict[str, object]:
    values = _parsed(text_of(data))
    if not isinstance(values, dict):
        raise Rejected(Reason.CAPTION_NOT_JSON, f"it is a {type(values).__name__}, not an object")
    _refuse_twice(values, "the .json")
    return values


def _parsed(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error)[:100] or "it is nested too deeply"
        raise Rejected(Reason.CAPTION_NOT_JSON, f"not valid JSON: {reason}") from None


def _refuse_twice(values: dict[str, object], where: str) -> None:
    for key in KEYS:
        if key in getattr(values, "twice", ()):
            raise Rejected(Reason.AMBIGUOUS_CAPTION, f'{where} has "{key}" more than once')


class _Pairs(dict[str, object]):
    """A JSON object that remembers which of its keys came again, with other values."""

    def __init__(self, pairs: Iterable[tuple[str, object]]) -> None:
        super().__init__()
        self.twice: set[str] = set()
        for key, value in pairs:
            if key in self and self[key] != value:
                self.twice.add(key)
            self[key] = value


def _usable(value: object) -> str | None:
    """A caption among metadata; None where it is none, such as a longitude."""
    if not isinstance(value, str):
        return None
    try:
        return checked(value, "")
    except Rejected:
        return None
