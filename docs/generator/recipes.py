"""The page docs/recipes.md: what each configuration of the post sets, beside the post and Photoroom/PRX.

python docs/generator/recipes.py    # writes docs/recipes.md

Values of the post and of PRX are facts in recipes.json, under the names of our settings. What a file in
configs/ says of its values (`sources`) is held against them: a value that is credited to someone who says
another, or that is nobody's and has no reason, is an error.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from millrace.engine.config import Config
from millrace.engine.config.loading import load_config, read_json, read_sources, source_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, PAGE = ROOT / "configs", ROOT / "docs" / "recipes.md"
FIRST = ("latent_256", "jit_1024")
"""Configurations that the others start from."""
NOT_OF_THE_POST = ("quickstart",)
WHO = ("post", "part 3", "PRX", "paper")
SECTIONS = tuple(Config.model_fields)
_HIDDEN = ("run.output_dir", "source")

Values = dict[str, Any]


class Row(NamedTuple):
    """A setting of a configuration."""

    key: str
    value: Any
    said: dict[str, Any]
    """What the post, part 3 and PRX say."""
    source: str
    """What the file says where the value is from."""


def recipes() -> list[str]:
    """Names of the configurations, those that the others start from first."""
    names = sorted(path.stem for path in CONFIGS.glob("*.json") if path.name != "schema.json")
    return [*FIRST, *(name for name in names if name not in (*FIRST, *NOT_OF_THE_POST))]


def flat(values: Values, prefix: str = "") -> Values:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: Values = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and f"{prefix}{key}" != "deepspeed.zero_optimization"
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return {key: value for key, value in found.items() if key not in _HIDDEN}


def facts() -> dict[str, Any]:
    """The committed facts."""
    return json.loads((Path(__file__).parent / "recipes.json").read_text())


def base_of(name: str) -> str | None:
    """The configuration that a file extends, None for a model."""
    base = json.loads((CONFIGS / f"{name}.json").read_text()).get("extends", "").removesuffix(".json")
    return base if base in recipes() else None


def said(name: str, known: dict[str, Any]) -> dict[str, Values]:
    """What the post, part 3 and PRX say of a configuration, by setting; null in recipes.json: nothing."""
    base = base_of(name)
    found = said(base, known) if base else {"post": {}, "part 3": {}, "PRX": {}}
    for who in ("post", "part 3"):
        found[who] = {**found[who], **known[who]["rows"].get(name, {})}
        found[who] = {key: value for key, value in found[who].items() if value is not None}
    for file in _files(name, known):
        found["PRX"] = {**found["PRX"], **_of_file(file, known)}
    return found


def _files(name: str, known: dict[str, Any]) -> list[str]:
    files = known["PRX"]["rows"].get(name, [])
    return [files] if isinstance(files, str) else files


def _of_file(file: str, known: dict[str, Any]) -> Values:
    entry, values = known["PRX"]["files"][file], {}
    for used in entry.get("uses", []):
        values |= _of_file(used, known)
    return values | entry["values"]


def rows(name: str, known: dict[str, Any]) -> list[Row]:
    """The settings of a file, and those that post or PRX change against what the file starts from."""
    path, base = CONFIGS / f"{name}.json", base_of(name)
    resolved, chain = flat(load_config(path).model_dump(mode="json")), flat(read_json(path))
    file = json.loads(path.read_text())
    own = flat({key: value for key, value in file.items() if key in SECTIONS})
    explained = file.get("sources", {})
    all_said, theirs = said(name, known), said(base, known) if base else {}
    changed = [
        key
        for who, values in all_said.items()
        for key, value in values.items()
        if base and theirs[who].get(key) != value
    ]
    changed += [key for key in chain if base is None or source_of(key, explained) is not None]
    sources, order = read_sources(path), list(resolved)
    keys = sorted({*own, *changed}, key=lambda key: (order.index(key) if key in order else len(order), key))
    return [_row(name, key, chain.get(key, resolved.get(key)), all_said, sources) for key in keys]


def _row(name: str, key: str, value: Any, all_said: dict[str, Values], sources: dict[str, str]) -> Row:
    found = {who: values[key] for who, values in all_said.items() if key in values}
    source = source_of(key, sources)
    where = f"{name}: {key}"
    if source is None:
        raise ValueError(f"{where} has no source")
    label, _, reason = source.partition(": ")
    names = label.split(" and ")
    if names == ["own"]:
        if not reason:
            raise ValueError(f"{where} is our own without a reason")
        return Row(key, value, found, source)
    for who in names:
        if who not in WHO:
            raise ValueError(f"{where} is from {who!r}; it is own, or from {', '.join(WHO)}")
        if who != "paper" and (who not in found or found[who] != value):
            raise ValueError(f"{where} is {value!r} as in {who}, which says {found.get(who)!r}")
    others = [who for who, theirs in found.items() if theirs == value and who not in names]
    if others and "part 3" not in names and "paper" not in names:
        raise ValueError(f"{where} is also as in {others[0]}")
    if any(theirs != value for theirs in found.values()) and not reason and "part 3" not in found:
        raise ValueError(f"{where} differs from what another says, without a reason")
    return Row(key, value, found, source)


def page() -> str:
    """The page as Markdown."""
    known = facts()
    text = [
        "# Recipes",
        "What the configurations of the post set, beside what the post says and what the code says that was "
        "published with it. Made by `python docs/generator/recipes.py` from `configs/` and from "
        "`docs/generator/recipes.json`, which holds the values of the other two; a test keeps this page so.",
        "*post* is "
        + known["post"]["where"]
        + "; *part 3* "
        + known["part 3"]["where"]
        + "; *PRX* "
        + known["PRX"]["where"]
        + ". The last column is what the file says of its value: who has it too, and "
        "where the sources differ, or where it is our own, the reason.",
        "## Differences that are meant",
        "Not settings, but ways of doing it, or settings whose value does not change what is learned.",
        _table(("here", "there", "reason"), known["differences"]),
        "## In numbers",
        _counts(known),
    ]
    for name in recipes():
        published = "part 3" if name in known["part 3"]["rows"] else "post"
        cells = [_cells(row, published) for row in rows(name, known)]
        text += [f"## {name}", _about(name, known)]
        text.append(_table(("setting", "here", published, "PRX", "from"), cells))
    return "\n\n".join(text) + "\n"


def _counts(known: dict[str, Any]) -> str:
    """How many settings of each file are whose."""
    lines = []
    for name in recipes():
        kinds = [row.source.partition(": ")[0] for row in rows(name, known)]
        both = sum(kind == "post and PRX" for kind in kinds)
        lines.append(
            (f"[{name}](#{name})", str(both), *(str(kinds.count(kind)) for kind in ("post", "PRX")),
             str(sum("part 3" in kind for kind in kinds)), str(kinds.count("paper")), str(kinds.count("own")))
        )  # fmt: skip
    return _table(("file", "post and PRX", "post only", "PRX only", "part 3", "paper", "own"), lines)


def _about(name: str, known: dict[str, Any]) -> str:
    values, base = json.loads((CONFIGS / f"{name}.json").read_text()), base_of(name)
    lines = [f"[`configs/{name}.json`](../configs/{name}.json): {values['source']}."]
    if base:
        lines.append(f"Everything else is as in [{base}](#{base}).")
    if files := [file for file in _files(name, known) if name not in NOT_OF_THE_POST]:
        lines.append("PRX: " + ", ".join(f"`{file}`" for file in files) + ".")
    return " ".join(lines)


def _cells(row: Row, published: str) -> tuple[str, ...]:
    theirs = (_value(row.said.get(who)) for who in (published, "PRX"))
    return (f"`{row.key}`", _value(row.value), *theirs, row.source)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} texts"
    return f"`{json.dumps(value)}`"


def _table(head: tuple[str, ...], lines: list[Any]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written to {PAGE.relative_to(ROOT)}", file=sys.stderr)
