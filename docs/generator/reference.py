"""Pages about the configuration, from configs/: what every file does, and every setting of the schema."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

_TITLES = {
    "": "Training runs",
    "models": "Models",
}
_NO_SETTINGS = ("$schema", "extends", "source", "sources")


def files() -> list[Path]:
    """Configuration files, those to run first."""
    found = [path for path in CONFIGS.rglob("*.json") if path.name != "schema.json"]
    return sorted(
        found, key=lambda path: (path.parent != CONFIGS, path.parent, path.name != "quickstart.json", path)
    )


def configurations_page() -> str:
    """Every file of configs/, with its source, what it changes, and the post's figures where it has a row."""
    published = _published()
    text = [
        "# All configuration files",
        "Made from the files in `configs/` and, for what the post reports, from `benchmarks/published.json`. "
        "A file lists what differs from the one that it extends; "
        "`millrace train --config FILE --print-config` prints everything, `--plan 8` what it needs "
        "on 8 processes, and `--smoke` runs it, tiny, on a CPU.",
    ]
    rows = []
    for path in files():
        name = path.relative_to(CONFIGS).as_posix().removesuffix(".json")
        rows.append(
            f"| [{name}](#{name.replace('/', '')}) | {_prose(json.loads(path.read_text())['source'])} |"
        )
    text.append("\n".join(["| file | what |", "|---|---|", *rows]))
    folder = None
    for path in files():
        name = path.relative_to(CONFIGS).as_posix()
        if path.parent != folder:
            folder = path.parent
            text.append(f"## {_TITLES[folder.relative_to(CONFIGS).as_posix().replace('.', '')]}")
        values = json.loads(path.read_text())
        text += [
            f"### {name.removesuffix('.json')}",
            f"[`configs/{name}`](../configs/{name}): {values['source']}.",
        ]
        if "extends" in values:
            base = (path.parent / values["extends"]).resolve().relative_to(CONFIGS).as_posix()
            anchor = base.removesuffix(".json").replace("/", "")
            text.append(f"Extends [{base.removesuffix('.json')}](#{anchor}).")
        rows = [f"| `{section}` | {', '.join(settings)} |" for section, settings in _settings(values).items()]
        text.append("\n".join(["| section | sets |", "|---|---|", *rows]))
        if name.removesuffix(".json") in published:
            text.append(published[name.removesuffix(".json")])
    return "\n\n".join(text) + "\n"


def _settings(values: dict[str, Any]) -> dict[str, list[str]]:
    """What a file sets in each section, as `key = JSON`."""
    sections = {key: value for key, value in values.items() if key not in _NO_SETTINGS}
    return {
        section: _pairs(value) if isinstance(value, dict) else [_code(json.dumps(value))]
        for section, value in sections.items()
    }


def _pairs(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _pairs(value, f"{prefix}{key}.")
        else:
            found.append(_code(f"{prefix}{key} = {json.dumps(value)}"))
    return found


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def _published() -> dict[str, str]:
    """What the post reports of a configuration, in a sentence."""
    found = {}
    for table in json.loads((ROOT / "benchmarks" / "published.json").read_text())["tables"]:
        for row in table["rows"]:
            if row["config"] and row["config"] not in found:
                speed = row["batches_per_second"]
                figures = f"FID {row['fid']:g}, CMMD {row['cmmd']:g}, DINO-MMD {row['dino_mmd']:g}"
                figures += f", {speed:g} batches/s" if speed else ""
                found[row["config"]] = f"The post's row *{row['method']}* ({table['section']}): {figures}."
    return found


def settings_page() -> str:
    """Every setting, by section: type, default, bounds and description of the schema."""
    schema = json.loads((CONFIGS / "schema.json").read_text())
    text = [
        "# All settings",
        "Made from `configs/schema.json`, which `make schema` writes from "
        "[engine/config/](../engine/config/). How files, `extends` and "
        "`--set` become a configuration: [configuration.md](configuration.md).",
    ]
    for name, field in schema["properties"].items():
        if name in _NO_SETTINGS:
            continue
        text.append(f"## {name}")
        if "$ref" not in field:
            text.append(f"{_prose(field['description'])} Default `{json.dumps(field.get('default', {}))}`.")
            continue
        definition = _resolve(schema, field)
        text += [_prose(definition.get("description", "")), _table(schema, definition, name)]
    return "\n\n".join(part for part in text if part) + "\n"


def _resolve(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rsplit("/", 1)[1]]


def _table(schema: dict[str, Any], definition: dict[str, Any], prefix: str) -> str:
    return "\n".join(
        ["| setting | values | default | |", "|---|---|---|---|", *_rows(schema, definition, prefix)]
    )


def _rows(schema: dict[str, Any], definition: dict[str, Any], prefix: str) -> list[str]:
    rows = []
    for key, field in definition["properties"].items():
        name = f"{prefix}.{key}"
        inner = field if "$ref" in field else field.get("items", {})
        if "$ref" in field:
            rows.append(f"| **`{name}`** | | | {_prose(field.get('description', ''))} |")
        else:
            default = "" if "default" not in field else f"`{json.dumps(field['default'])}`"
            rows.append(
                f"| `{name}` | {_values(field)} | {default} | {_prose(field.get('description', ''))} |"
            )
        if "$ref" in inner:
            rows += _rows(schema, _resolve(schema, inner), name if "$ref" in field else f"{name}[]")
    return rows


def _values(field: dict[str, Any]) -> str:
    """Type, choices and bounds of a setting."""
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "anyOf" in field:
        return " or ".join(_values(choice) for choice in field["anyOf"])
    if "$ref" in field:
        return "object"
    kind = field.get("type", "any")
    if kind == "array":
        if "prefixItems" in field:
            return "[" + ", ".join(_values(item) for item in field["prefixItems"]) + "]"
        return f"list of {_values(field.get('items', {}))}"
    words = {"integer": "int", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    signs = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {_number(field[name])}" for name, sign in signs if name in field]
    return " ".join([words.get(kind, kind), ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    """Large bounds are powers of two."""
    return f"2^{int(value).bit_length() - 1}" if value >= 2**32 else f"{value:g}"


def _prose(text: str) -> str:
    """A description in one line that a table can hold."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
