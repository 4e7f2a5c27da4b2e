"""Configuration loading: from files to a validated `Config` (`extends`, `--set`), errors in one line each."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError

from millrace.engine.config import Config
from millrace.engine.util.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The configurations that come with Millrace: `configs/` of the repository, `millrace/configs` of a wheel."""


class Given(NamedTuple):
    """A setting given on the command line."""

    words: str
    """What was typed: `--set run.steps=3`, `--steps 50`."""
    key: str
    """`section.key`."""
    value: Any

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON configuration, follow its `extends`, apply `a.b=c` overrides and validate.

    Args:
        path: a file, or the name of a configuration that comes with Millrace, such as `jit_1024_tread`.

    Raises UserError with one line per problem.
    """
    given = [parse_override(item) for item in overrides]
    return parse_config(read_json(find_config(path)), str(path), given)


def find_config(path: str | Path) -> Path:
    """The file `path`, or else the shipped configuration of that name. Raises UserError with the nearest."""
    path, shipped = Path(path), shipped_configs()
    name = path.as_posix().removesuffix(".json")
    if path.is_file() or (path.exists() and name not in shipped):
        return path
    if name in shipped:
        return shipped[name]
    raise UserError(f"{path}: no such configuration file; {_near_files(path)}")


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with Millrace by name: `quickstart`, `models/prx_1b`, ..."""
    files = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in CONFIGS.rglob("*.json")}
    return {name: files[name] for name in sorted(files) if name != "schema"}


def _near_files(path: Path) -> str:
    """What the name of a file that is not there may have been meant to be: a neighbour, or a shipped one."""
    neighbours = [str(file) for file in sorted(path.parent.glob("*.json"))]
    names = {Path(name).stem: name for name in (*shipped_configs(), *neighbours)}
    near = difflib.get_close_matches(path.stem, names, n=1)
    return f"did you mean {names[near[0]]}?" if near else f"those that come with Millrace lie in {CONFIGS}"


def parse_config(values: dict[str, Any], origin: str, given: Sequence[Given] = ()) -> Config:
    """Validate plain values under settings of the command line.

    Args:
        values: what a file holds.
        origin: names the values in errors.
        given: settings laid over them, in order; an error that comes from one names what was typed.

    Raises UserError with one line per problem.
    """
    merged, problems = merge(values, nested(given)), []
    if half := _half_character(merged):
        raise UserError(
            f"{_words_of(half, origin, given)}: {half} holds half of a character, or bytes that are not UTF-8"
        )
    try:
        return validate(merged)
    except ValidationError as error:
        problems = error.errors()
    of_values = []
    if given:
        try:
            validate(values)
        except ValidationError as error:
            of_values = [(problem["loc"], problem["msg"]) for problem in error.errors()]
    lines = []
    for problem in problems:
        known = not given or (problem["loc"], problem["msg"]) in of_values
        lines.append(_explain(problem, origin if known else _blamed(problem, origin, given), given))
    raise UserError("\n".join(lines))


def _half_character(value: Any, key: str = "") -> str | None:
    """Key of a text that cannot be written as UTF-8: a surrogate without its partner."""
    if isinstance(value, str):
        return key if any("\ud800" <= letter <= "\udfff" for letter in value) else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_half_character(item, f"{key}.{name}".lstrip(".")) for name, item in items)
    return next((key for key in found if key), None)


def _words_of(key: str, origin: str, given: Sequence[Given]) -> str:
    """What was typed for a key, or the name of the file."""
    return next((g.words for g in reversed(given) if f"{key}.".startswith(f"{g.key}.")), origin)


def check_given(given: Sequence[Given]) -> None:
    """Raise UserError for settings that are wrong in every configuration: unknown keys, values of no use."""
    try:
        validate(nested(given))
    except ValidationError as error:
        own = [problem for problem in error.errors() if problem["type"] != "value_error"]
        if own:
            raise UserError(
                "\n".join(_explain(problem, _blamed(problem, "", given), given) for problem in own)
            ) from None


def validate(values: dict[str, Any]) -> Config:
    """The configuration of plain values. Raises pydantic's ValidationError."""
    # As JSON: strict validation (no "5" or true for a number) takes lists for tuples only there.
    return Config.model_validate_json(json.dumps(values), strict=True)


def _blamed(problem: Any, origin: str, given: Sequence[Given]) -> str:
    """What was typed that a problem comes from: one setting, or the values under all that it may be."""
    where = tuple(str(part) for part in problem["loc"])
    exact = [g.words for g in given if where[: len(g.parts)] == g.parts]
    if exact:
        return exact[-1]
    inside = [g.words for g in given if g.parts[: len(where)] == where]
    if inside and problem["type"] == "extra_forbidden":
        return inside[-1]
    return " ".join([f"{origin} with", *(inside or [g.words for g in given])])


def read_json(path: Path) -> dict[str, Any]:
    """Values of one file merged over those of the file it `extends`."""
    return _read(path)[0]


def read_sources(path: Path) -> dict[str, str]:
    """Who says so, by setting or section: the `sources` of one file over those of the file it `extends`.

    They explain the values of a file to its readers; a run has none.
    """
    return _read(path)[1]


def source_of(key: str, sources: dict[str, str]) -> str | None:
    """Who says the value of `key`: the source of the setting, or of the nearest section around it."""
    parts = key.split(".")
    around = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((sources[name] for name in around if name in sources), None)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and sources of a file and of those it extends."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_object)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; {_near_files(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and objects as deep, too
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a JSON object, this is a {type(values).__name__}")
    values.pop("$schema", None)
    sources = values.pop("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
        raise UserError(f"{path}: sources is {sources!r:.60}; it holds a text for each setting")
    base = values.pop("extends", None)
    if base is None:
        return values, sources
    if not isinstance(base, str):
        raise UserError(f"{path}: extends is {base!r}; it is the name of another configuration file")
    below, their_sources = _read(path.parent / base, (*seen, path))
    if below.get("stages") and "stages" not in values and _starts_from_weights(values):
        raise UserError(
            f"{path}: starts from the weights of run.init_from, and would go through the "
            f'{len(below["stages"])} stages of {base}; give it stages of its own, or "stages": []'
        )
    return merge(below, values), their_sources | sources


def _starts_from_weights(values: dict[str, Any]) -> bool:
    run = values.get("run")
    return isinstance(run, dict) and run.get("init_from") is not None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key given twice is an error, not the last one's gain."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise json.JSONDecodeError(f"key {twice!r} is given twice", twice, 0)
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; objects merge key by key, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings whose values differ, `section.key` each."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}")
    return found


def parse_override(item: str) -> Given:
    """A setting from `a.b=c`; the value is JSON where it parses as JSON, and text elsewhere, or where the key
    takes text: a folder may be named 2024."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"--set {item}: write it as section.key=value")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if value is not None and not isinstance(value, str) and _takes_text(key):
        value = text
    return Given(f"--set {item}", key, value)


def _takes_text(key: str) -> bool:
    """Whether the value of a key is any text."""
    kind: Any = Config
    for part in key.split("."):
        fields = getattr(kind, "model_fields", {})
        if part not in fields:
            return False
        kind = fields[part].annotation
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return any(str in (choice, getattr(choice, "__origin__", None)) for choice in choices)


def nested(given: Iterable[Given]) -> dict[str, Any]:
    """`a.b` = 1 and `c` = "x" as `{"a": {"b": 1}, "c": "x"}`; the later of two wins."""
    values: dict[str, Any] = {}
    for setting in given:
        value = setting.value
        for part in reversed(setting.parts):
            value = {part: value}
        values = merge(values, value)
    return values


def dict_from_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` -> `{"a": {"b": 1}, "c": "x"}`."""
    return nested(parse_override(item) for item in overrides)


def _explain(problem: Any, origin: str, given: Sequence[Given]) -> str:
    """One pydantic problem as one line: where, what, and the nearest valid name for an unknown key."""
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(str(problem["loc"][-1]), _keys_of(problem["loc"][:-1]), "keys")
        return f"{origin}: unknown key {where!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    got = (
        ""
        if isinstance(problem["input"], dict) or problem["type"] == "value_error"
        else f" (got {problem['input']!r})"
    )
    for setting in given:
        flag = setting.words.split()[0]
        if flag != "--set":
            message = re.sub(rf"\b{re.escape(setting.key)}\b", flag, message)
    return f"{origin}: {where}: {message}{got}"


def _keys_of(location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            (section, *_) = get_args(section)  # an item of a tuple of sections
        else:
            section = section.model_fields[part].annotation
    return list(section.model_fields)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors (`train.py --print-schema > configs/schema.json`)."""
    schema = Config.model_json_schema()
    schema["properties"] = {
        "extends": {"type": "string", "description": "Another file whose values this one starts from."},
        "$schema": {"type": "string"},
        "sources": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "Who says so, by setting or section: post, PRX, both, or own with the reason.",
        },
        **schema["properties"],
    }
    return schema
