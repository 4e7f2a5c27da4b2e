"""Meta data of a checkpoint through the versions: each format is brought to the one that this version writes.

    1  until 0.1.0: step, samples, skipped, updates, text_tower, autoencoder, data, config
    2  adds `format` itself and `millrace`, the version that wrote it

A change to what meta.json holds, a renamed key of the configuration included, gets a number, a function in
MIGRATIONS, and a checkpoint of the format before in `tests/engine/checkpoint/museum`.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from millrace.engine.checkpoint.manifest import META, DamagedCheckpoint
from millrace.engine.util.errors import UserError


def _name_the_version(meta: dict[str, Any]) -> None:
    meta["millrace"] = "0.1.0 or earlier"


MIGRATIONS: tuple[Callable[[dict[str, Any]], None], ...] = (_name_the_version,)
"""What makes of format 1 format 2, of that format 3, and so on; each changes its argument."""
FORMAT = len(MIGRATIONS) + 1


def stamp() -> dict[str, Any]:
    """What every meta.json says of itself: `format` and `millrace`."""
    try:
        ours = version("millrace")
    except PackageNotFoundError:  # a checkout that is not installed
        ours = "unknown"
    return {"format": FORMAT, "millrace": ours}


def current_meta(values: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """What meta.json holds, in the form that this version writes, without its stamp; and the version that
    wrote it. Raises UserError for a later format."""
    if not isinstance(values, dict) or type(values.get("format", 1)) is not int:
        raise DamagedCheckpoint(folder, META, "does not describe a checkpoint")
    found = values.get("format", 1)
    if found > FORMAT:
        raise UserError(
            f"{folder}: meta data of format {found}, written by millrace {values.get('millrace')}; this "
            f"version reads formats up to {FORMAT}: use that version or a later one"
        )
    meta = dict(values)
    for migrate in MIGRATIONS[found - 1 :]:
        migrate(meta)
    meta.pop("format", None)
    return meta, str(meta.pop("millrace"))


def rename_keys(config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Move settings of a stored configuration, `section.old` to `section.new`, in its stages too; for
    MIGRATIONS. A key that is not there is passed over."""
    for values in (config, *config.get("stages", ())):
        for old, new in names.items():
            holder, key = _section(values, old), old.rpartition(".")[2]
            if holder is None or key not in holder:
                continue
            value, target = holder.pop(key), values
            *sections, last = new.split(".")
            for name in sections:
                target = target.setdefault(name, {})
            target[last] = value


def _section(values: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The section that a key lies in; None where the configuration has none."""
    for name in key.split(".")[:-1]:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None
