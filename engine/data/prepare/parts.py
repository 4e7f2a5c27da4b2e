"""Converted parts: what was read of the input, put aside until it is known which shards its samples go to.

KEY.data     pictures and JSON records, one after another
KEY.rows     a row of ITEM an item and the texts of rejects; written last, so a part that has it is done
KEY.packed   instead of KEY.rows, once bytes of samples that are in shards are freed (`freeing.py`)
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_writer import StoredSample
from millrace.engine.data.prepare.inputs import UNIT_BYTES, Part, read_part
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.stored_sample import RawSample, convert
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.util.files import atomic_file

ITEM = np.dtype(
    [
        ("unit", f"V{UNIT_BYTES}"),
        ("key", "V16"),
        ("offset", "<i8"),
        ("file", "<i4"),
        ("bucket", "<i4"),
        ("picture_bytes", "<i4"),
        ("record_bytes", "<i4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("unusable_profile", "<i4"),
        ("long_characters", "<i4"),
        ("short_characters", "<i4"),
    ]
)
"""Of one item of the input, 72 bytes: the unit that it was read from; 128 bits of a hash of its key; where
its stored bytes begin, and in which file of a list; index into `Settings.buckets`; sizes in bytes of its
picture and record; size in pixels of the stored picture; 1 if it has a colour profile that cannot be used;
lengths of its captions. Of a reject: bucket -1, and as offset its number in a list of rejects."""
PACKED = ".packed"
MAX_DETAIL = 300
"""Characters of a key or a detail that are kept of a reject."""


class DonePart(NamedTuple):
    """What a part has given."""

    rows: np.ndarray
    """(n,) of ITEM, samples and rejects in order."""
    rejects: list[Reject]

    @property
    def seen(self) -> int:
        """Inputs of the part."""
        return len(self.rows)

    @property
    def bad(self) -> int:
        """Rejects that count against the limit."""
        return sum(reject.reason.is_bad for reject in self.rejects)

    @property
    def samples(self) -> np.ndarray:
        """Rows that are no rejects."""
        return self.rows[self.rows["bucket"] >= 0] if self.rejects else self.rows


def do_part(part: Part, folder: Path, settings: Settings, report: Callable[[int, int], None]) -> DonePart:
    """Read and convert a part into `folder`, one sample in memory at a time.

    `report(samples, rejects)` is called after every one. Raises OSError where nothing can be written.
    """
    rows: list[tuple[object, ...]] = []
    rejects: list[Reject] = []
    offset = 0
    with atomic_file(data_path(folder, part.key)) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about odd files: what is bad becomes a reject
        for unit, item in read_part(part, folder):
            outcome = _outcome(item, settings)
            if isinstance(outcome, Reject):
                rows.append((unit, b"", len(rejects), 0, -1, 0, 0, 0, 0, 0, 0, 0))
                rejects.append(outcome)
                report(0, 1)
                continue
            row, stored = outcome
            file.write(stored.picture)
            file.write(stored.record)
            rows.append((unit, row[0], offset, 0, *row[1:]))
            offset += len(stored.picture) + len(stored.record)
            report(1, 0)
    done = DonePart(np.array(rows, ITEM), rejects)
    save_items(rows_path(folder, part.key), done.rows, rejects, {"bytes": offset})
    return done


def save_items(path: Path, rows: np.ndarray, rejects: list[Reject], values: dict[str, Any]) -> None:
    """Write rows of ITEM, the rejects among them, and `values`, which JSON can hold. Raises OSError."""
    with atomic_file(path) as file:
        np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
        file.write(json.dumps(values | {"rejects": rejects}).encode())


def load_items(path: Path) -> tuple[np.ndarray, list[Reject], dict[str, Any]] | None:
    """What `save_items` has written, the rows mapped into memory; None where that is not what is there."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(rows.offset + rows.nbytes)
            values = json.loads(file.read())
        rejects = [Reject(key, Reason(reason), detail) for key, reason, detail in values.pop("rejects")]
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None
    return (rows, rejects, values) if rows.dtype == ITEM and rows.ndim == 1 else None


def done_parts(folder: Path) -> list[Path]:
    """The .rows and .packed files of a folder of parts, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".rows", PACKED))


def load_part(path: Path) -> DonePart | None:
    """What `do_part` has put aside in a .rows or .packed file, or None where it has not come to its end."""
    found = load_items(path)
    try:
        if found is None or data_path(path.parent, path.stem).stat().st_size != found[2]["bytes"]:
            return None
    except (OSError, KeyError):
        return None
    return DonePart(np.array(found[0]), found[1])


def data_path(folder: Path, key: str) -> Path:
    """Pictures and records of a part."""
    return folder / f"{key}.data"


def rows_path(folder: Path, key: str) -> Path:
    """Rows and rejects of a part."""
    return folder / f"{key}.rows"


def _outcome(item: RawSample | Reject, settings: Settings) -> tuple[tuple, StoredSample] | Reject:
    """Values of a row without unit, offset and file, and what is stored; or the reject, its texts cut."""
    if isinstance(item, RawSample):
        try:
            bucket, stored, unusable_profile = convert(item, settings)
        except Rejected as problem:
            item = Reject(item.key, problem.reason, problem.detail)
        else:
            captions = len(item.captions.long), len(item.captions.short)
            sizes = len(stored.picture), len(stored.record), stored.width, stored.height
            return (key_hash(item.key), bucket, *sizes, unusable_profile, *captions), stored
    return Reject(_short(item.key), item.reason, _short(" ".join(item.detail.split())))


def key_hash(key: str) -> bytes:
    """16 bytes by which keys are compared."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _short(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"
