"""Shard packing: which sample goes to which shard, and making the shards.

Within a bucket samples keep the order of the input; a shard is full when the next sample would bring it
above the wanted size. Numbers of samples count through the buckets in order. All of it follows from the parts
alone.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_index import BLOCK, Shard, bucket_name, padded
from millrace.engine.data.formats.shard_writer import END, StoredSample, write_shard
from millrace.engine.data.prepare.parts import DonePart
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.reject_reasons import Reason, Reject
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

_JPEG = b"\xff\xd8"
"""What a JPEG file begins with."""


class PlannedShard(NamedTuple):
    """A shard that is to be made."""

    bucket: tuple[int, int]
    number: int
    """In its bucket."""
    first: int
    """Number of its first sample in the data set."""
    rows: np.ndarray
    """(n,) of ITEM."""

    @property
    def bytes(self) -> int:
        """Size of the tar."""
        return len(END) + int(_sizes(self.rows).sum())

    @property
    def digest(self) -> str:
        """What the shard will hold: the same units, read with the same settings, give the same bytes."""
        digest = hashlib.blake2b(f"{self.bucket} {self.first}".encode(), digest_size=16)
        for field in ("unit", "key", "picture_bytes", "record_bytes"):
            digest.update(np.ascontiguousarray(self.rows[field]).tobytes())
        return digest.hexdigest()


class Plan(NamedTuple):
    """All shards, and what was found out on the way."""

    shards: list[PlannedShard]
    rows: np.ndarray
    """(N,) of ITEM: all samples in their order."""
    kept: np.ndarray
    """(samples of the input,) bool: whether it is one of them."""
    order: np.ndarray
    """(N,) int64: which of the kept samples of the input each of them is."""
    duplicates: list[Reject]


def plan_shards(parts: list[DonePart], files: list[Path], settings: Settings) -> Plan:
    """Distribute the samples of all parts; of samples with the same key the first one stays.

    `files`, which the rows number, have the bytes, from which the names of duplicates are read.
    """
    rows = np.concatenate([part.samples for part in parts])
    keep = _first_of_each(rows["key"])
    duplicates = [
        Reject(_key_of(rows[i], files), Reason.DUPLICATE_KEY, "an earlier sample has it")
        for i in np.flatnonzero(~keep)
    ]
    rows = rows[keep]
    order = np.argsort(rows["bucket"], kind="stable")
    rows = rows[order]
    sizes = _sizes(rows)
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
            shards.append(PlannedShard(settings.buckets[bucket], number, start + done, rows[some]))
            number, done = number + 1, until
    return Plan(shards, rows, keep, order, duplicates)


def make_shard(
    plan: PlannedShard, root: Path, files: dict[int, Path], done: Path, report: Callable[[int, int], None]
) -> Shard:
    """Write a shard to `root` from `files`, which its rows number, and last what it is to the folder `done`.

    `report(samples, 0)` is called after every sample. Raises OSError where nothing can be written, UserError
    where a sample of the data set that is brought up to date is damaged.
    """

    def samples() -> Iterator[StoredSample]:
        stored, number = None, -1
        try:
            for row in plan.rows:
                if row["file"] != number:
                    if stored is not None:
                        stored.close()
                    number = int(row["file"])
                    stored = _StoredBytes(files[number])
                yield StoredSample(*stored.read(row), int(row["width"]), int(row["height"]))
                report(1, 0)
        finally:
            if stored is not None:
                stored.close()

    shard = write_shard(root, plan.bucket, plan.number, samples(), plan.first)
    values = {"plan": plan.digest, "shard": shard.model_dump(mode="json")}
    write_atomically(done_path(plan, done), json.dumps(values))
    return shard


class _StoredBytes:
    """A file with converted samples: the .data file of a part, or a shard."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb")
        self._index = np.load(path.with_suffix(".npy")) if path.suffix == ".tar" else None

    def read(self, row: np.void) -> tuple[bytes, bytes]:
        """Picture and record."""
        at = int(row["offset"])
        self._file.seek(at)
        picture = self._file.read(int(row["picture_bytes"]))
        if self._index is not None:
            self._file.seek(at + padded(len(picture)) + BLOCK)
        record = self._file.read(int(row["record_bytes"]))
        if self._index is not None:
            place = int(np.searchsorted(self._index["picture_offset"], at))
            crc = int(self._index["crc32"][place]) if place < len(self._index) else -1
            if zlib.crc32(record, zlib.crc32(picture)) != crc:
                raise UserError(
                    f"{self._path}: the sample at byte {at} is damaged; remove the data set and make it again"
                )
        elif not picture.startswith(_JPEG):
            raise UserError(
                f"{self._path}: the sample at byte {at} is gone, for the shard that it was packed into was "
                f"there before; remove {self._path.parent.parent} and run the same command again"
            )
        return picture, record

    def close(self) -> None:
        self._file.close()


def load_shard(plan: PlannedShard, root: Path, done: Path) -> Shard | None:
    """What `make_shard` has made, or None where it has not come to its end or was another."""
    try:
        values = json.loads(done_path(plan, done).read_bytes())
        shard = Shard.model_validate(values["shard"])
        tar = root / shard.file
        whole = tar.stat().st_size == shard.bytes and values["plan"] == plan.digest
        return shard if whole and tar.with_suffix(".idx").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def done_path(plan: PlannedShard, done: Path) -> Path:
    """File that says that a shard is made."""
    return done / f"{bucket_name(plan.bucket)}-{plan.number:05d}.json"


def _sizes(rows: np.ndarray) -> np.ndarray:
    """(n,) bytes that samples take in a tar."""
    return 2 * BLOCK + padded(rows["picture_bytes"]) + padded(rows["record_bytes"])


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """(n,) bool: whether no earlier one of the 16-byte hashes (n,) is the same."""
    low, high = np.frombuffer(keys.tobytes(), "<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal ones the first comes first
    repeats = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    keep = np.ones(len(keys), bool)
    keep[order[1:][repeats]] = False
    return keep


def _key_of(row: np.void, files: list[Path]) -> str:
    stored = _StoredBytes(files[int(row["file"])])
    try:
        return json.loads(stored.read(row)[1])["key"]
    finally:
        stored.close()
