"""Shard packing: which sample goes to which shard, and making the shards.

Within a bucket samples keep the order of the input; a shard is full when the next sample would bring it
above the wanted size. Numbers of samples count through the buckets in order. All of it follows from the parts
alone.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_index import BLOCK, Shard, bucket_name, padded
from millrace.engine.data.formats.shard_writer import END, StoredSample, write_shard
from millrace.engine.data.prepare.parts import DonePart, open_data
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.reject_reasons import Reason, Reject
from millrace.engine.util.files import write_atomically


class PlannedShard(NamedTuple):
    """A shard that is to be made."""

    bucket: tuple[int, int]
    number: int
    """In its bucket."""
    first: int
    """Number of its first sample in the data set."""
    parts: np.ndarray
    """(n,) int64: part of each sample."""
    rows: np.ndarray
    """(n,) of PART_ROW."""


class Plan(NamedTuple):
    """All shards, and what was found out on the way."""

    shards: list[PlannedShard]
    rows: np.ndarray
    """(N,) of PART_ROW: all samples in their order."""
    duplicates: list[Reject]


def plan_shards(parts: list[DonePart], folder: Path, settings: Settings) -> Plan:
    """Distribute the samples of all parts; of samples with the same key the first one stays.

    `folder` has the parts' data, from which the names of duplicates are read.
    """
    rows = np.concatenate([part.rows for part in parts])
    part_of = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    keep = _first_of_each(rows["key"])
    duplicates = [
        Reject(_key_of(rows[i], int(part_of[i]), folder), Reason.DUPLICATE_KEY, "an earlier sample has it")
        for i in np.flatnonzero(~keep)
    ]
    rows, part_of = rows[keep], part_of[keep]
    order = np.argsort(rows["bucket"], kind="stable")
    rows, part_of = rows[order], part_of[order]
    sizes = 2 * BLOCK + padded(rows["picture_bytes"]) + padded(rows["record_bytes"])
    shards = []
    for bucket in np.unique(rows["bucket"]).tolist():
        start, end = np.searchsorted(rows["bucket"], [bucket, bucket + 1]).tolist()
        ends = np.cumsum(sizes[start:end])
        number = done = 0
        while start + done < end:
            used = ends[done - 1] if done else 0
            fits = int(np.searchsorted(ends, used + settings.shard_bytes - len(END), side="right"))
            until = max(fits, done + 1)
            some = slice(start + done, start + until)
            shards.append(
                PlannedShard(settings.buckets[bucket], number, start + done, part_of[some], rows[some])
            )
            number, done = number + 1, until
    return Plan(shards, rows, duplicates)


def make_shard(
    plan: PlannedShard, root: Path, parts: Path, done: Path, report: Callable[[int, int], None]
) -> Shard:
    """Write a shard to `root` from the data in `parts`, and last what it is to the folder `done`.

    `report(samples, 0)` is called after every sample. Raises OSError where nothing can be written.
    """

    def samples() -> Iterator[StoredSample]:
        file, open_part = None, -1
        try:
            for part, row in zip(plan.parts.tolist(), plan.rows, strict=True):
                if part != open_part:
                    if file is not None:
                        file.close()
                    file, open_part = open_data(part, parts), part
                file.seek(int(row["offset"]))
                picture = file.read(int(row["picture_bytes"]))
                record = file.read(int(row["record_bytes"]))
                yield StoredSample(picture, record, int(row["width"]), int(row["height"]))
                report(1, 0)
        finally:
            if file is not None:
                file.close()

    shard = write_shard(root, plan.bucket, plan.number, samples(), plan.first)
    write_atomically(done_path(plan, done), shard.model_dump_json())
    return shard


def load_shard(plan: PlannedShard, root: Path, done: Path) -> Shard | None:
    """What `make_shard` has made, or None where it has not come to its end."""
    try:
        shard = Shard.model_validate_json(done_path(plan, done).read_bytes())
        tar = root / shard.file
        whole = tar.stat().st_size == shard.bytes and shard.samples == len(plan.rows)
        return shard if whole and tar.with_suffix(".idx").is_file() else None
    except (OSError, ValueError):
        return None


def done_path(plan: PlannedShard, done: Path) -> Path:
    """File that says that a shard is made."""
    return done / f"{bucket_name(plan.bucket)}-{plan.number:05d}.json"


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """(n,) bool: whether no earlier one of the 16-byte hashes (n,) is the same."""
    low, high = np.frombuffer(keys.tobytes(), "<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal ones the first comes first
    repeats = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    keep = np.ones(len(keys), bool)
    keep[order[1:][repeats]] = False
    return keep


def _key_of(row: np.ndarray, part: int, folder: Path) -> str:
    with open_data(part, folder) as file:
        file.seek(int(row["offset"]) + int(row["picture_bytes"]))
        return json.loads(file.read(int(row["record_bytes"])))["key"]
