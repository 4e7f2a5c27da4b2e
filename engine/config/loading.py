"""Configuration loading: from files to a validated `Config` (`extends`, `--set`), errors in one line each."""

import difflib
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from millrace.engine.config import Config
from millrace.engine.util.errors import UserError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a JSON configuration, follow its `extends`, apply `a.b=c` overrides and validate.

    Raises UserError with one line per problem.
    """
    return parse_config(merge(read_json(Path(path)), dict_from_overrides(overrides)), str(path))


def parse_config(values: dict[str, Any], origin: str) -> Config:
    """Validate plain values; `origin` names them in errors."""
    try:
        # As JSON: strict validation (no "5" or true for a number) takes lists for tuples only there.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, origin) for problem in error.errors())) from None


def read_json(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Values of one file merged over those of the file it `extends`."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = json.loads(path.read_text(), object_pairs_hook=_object)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a JSON object, this is a {type(values).__name__}")
    values.pop("$schema", None)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends is {base!r}; it is the name of another configuration file")
    return merge(read_json(path.parent / base, (*seen, path)), values)


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


def dict_from_overrides(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` -> `{"a": {"b": 1}, "c": "x"}`; values are JSON where they parse as JSON."""
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"--set {item}: write it as section.key=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def _explain(problem: Any, origin: str) -> str:
    """One pydantic problem as one line: where, what, and the nearest valid name for an unknown key."""
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        names = _keys_of(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(names)}"
        return f"{origin}: unknown key {where!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    got = (
        ""
        if isinstance(problem["input"], dict) or problem["type"] == "value_error"
        else f" (got {problem['input']!r})"
    )
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
        **schema["properties"],
    }
    return schema
