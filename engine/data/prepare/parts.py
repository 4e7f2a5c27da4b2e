"""Converted parts: one part of the input, put aside until it is known which shards its samples go to.

000012.data     pictures and JSON records, one after another
000012.npy      a row of PART_ROW a sample
000012.json     rejects; written last, so a part that has it is done
"""

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_writer import StoredSample
from millrace.engine.data.prepare.inputs import Part, read_part
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.stored_sample import RawSample, convert
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.util.files import atomic_file, write_atomically

PART_ROW = np.dtype(
    [
        ("bucket", "<i4"),
        ("offset", "<i8"),
        ("picture_bytes", "<i8"),
        ("record_bytes", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("long_characters", "<i4"),
        ("short_characters", "<i4"),
        ("key", "V16"),
    ]
)
"""Of one sample: index into `Settings.buckets`, where its bytes are in the .data file, size in pixels of the
stored picture, lengths of its captions, and 128 bits of a hash of its key."""
MAX_DETAIL = 300
"""Characters of a key or a detail that are kept of a reject."""


class DonePart(NamedTuple):
    """What a part has given."""

    rows: np.ndarray
    """(n,) of PART_ROW."""
    rejects: list[Reject]

    @property
    def seen(self) -> int:
        """Inputs of the part."""
        return len(self.rows) + len(self.rejects)

    @property
    def bad(self) -> int:
        """Rejects that count against the limit."""
        return sum(reject.reason.is_bad for reject in self.rejects)


def do_part(
    part: Part, number: int, folder: Path, settings: Settings, report: Callable[[int, int], None]
) -> DonePart:
    """Read and convert a part into `folder`, one sample in memory at a time.

    `report(samples, rejects)` is called after every one. Raises OSError where nothing can be written.
    """
    rows: list[tuple[object, ...]] = []
    rejects: list[Reject] = []
    offset = 0
    with atomic_file(_path(folder, number, "data")) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about odd files: what is bad becomes a reject
        for item in read_part(part):
            outcome = _outcome(item, settings)
            if isinstance(outcome, Reject):
                rejects.append(outcome)
                report(0, 1)
                continue
            row, stored = outcome
            file.write(stored.picture)
            file.write(stored.record)
            rows.append((row[0], offset, *row[1:]))
            offset += len(stored.picture) + len(stored.record)
            report(1, 0)
    array = io.BytesIO()
    done = DonePart(np.array(rows, PART_ROW), rejects)
    np.lib.format.write_array(array, done.rows, version=(1, 0), allow_pickle=False)
    write_atomically(_path(folder, number, "npy"), array.getvalue())
    write_atomically(_path(folder, number, "json"), json.dumps(rejects))
    return done


def load_part(number: int, folder: Path) -> DonePart | None:
    """What `do_part` has put aside, or None where it has not come to its end."""
    try:
        rejects = json.loads(_path(folder, number, "json").read_bytes())
        rows = np.load(_path(folder, number, "npy"), allow_pickle=False)
        size = _path(folder, number, "data").stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = int((rows["picture_bytes"] + rows["record_bytes"]).sum())
    if rows.dtype != PART_ROW or size != whole:
        return None
    return DonePart(rows, [Reject(key, Reason(reason), detail) for key, reason, detail in rejects])


def open_data(number: int, folder: Path) -> BinaryIO:
    """The .data file of a part."""
    return _path(folder, number, "data").open("rb")


def _outcome(item: RawSample | Reject, settings: Settings) -> tuple[tuple, StoredSample] | Reject:
    """Values of a row without the offset, and what is stored; or the reject with its texts cut short."""
    if isinstance(item, RawSample):
        try:
            bucket, stored = convert(item, settings)
        except Rejected as problem:
            item = Reject(item.key, problem.reason, problem.detail)
        else:
            captions = len(item.captions.long), len(item.captions.short)
            sizes = len(stored.picture), len(stored.record), stored.width, stored.height
            return (bucket, *sizes, *captions, key_hash(item.key)), stored
    return Reject(_short(item.key), item.reason, _short(" ".join(item.detail.split())))


def key_hash(key: str) -> bytes:
    """16 bytes by which keys are compared."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _short(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number:06d}.{suffix}"
