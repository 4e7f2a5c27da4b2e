"""Known items: what earlier runs have made of units of the input that are still the same.

They lie in the data set itself, if there is a complete one, and in the parts of runs that did not come to
their end. A unit that is unchanged is taken from there and not read again.

    DATASET/inputs.index    rows of ITEM in the order of the input, and the rejects: 72 bytes an item
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_index import Manifest, read_index
from millrace.engine.data.prepare.inputs import UNIT_BYTES, Part
from millrace.engine.data.prepare.parts import (
    ITEM,
    DonePart,
    data_path,
    done_parts,
    load_items,
    load_part,
    save_items,
)
from millrace.engine.data.reject_reasons import Reason, Reject

INDEX = "inputs.index"


class Match(NamedTuple):
    """Where the items of units are."""

    start: np.ndarray
    """(n,) int64: place in the sorted rows."""
    count: np.ndarray
    """(n,) int64: how many follow; 0 where the unit is not known."""


class KnownItems:
    """Items by unit, and the files that their bytes lie in.

    Args:
        output: data set, complete or not.
        manifest: of it if it is complete.
        parts: folder of parts.
    """

    def __init__(self, output: Path, manifest: Manifest | None, parts: Path) -> None:
        self.files: list[Path] = []
        """Numbered by `file` of the rows."""
        self._number: dict[Path, int] = {}
        self.input: str | None = None
        """Of the complete data set, what `save_index` was told."""
        self._rejects: list[Reject] = []
        blocks = []
        if manifest is not None and (block := self._from_set(output, manifest)) is not None:
            blocks.append(block)
        for path in done_parts(parts):
            part = load_part(path)
            if part is not None:
                blocks.append(self._from_part(data_path(parts, path.stem), part))
        self._rows = np.concatenate(blocks) if blocks else np.empty(0, ITEM)
        low, self._high = _halves(self._rows["unit"].tobytes())
        self._order = np.argsort(low, kind="stable")
        self._low = low[self._order]

    def number(self, path: Path) -> int:
        """Number of a file, which is added if it is new."""
        if path not in self._number:
            self._number[path] = len(self.files)
            self.files.append(path)
        return self._number[path]

    def find(self, part: Part) -> Match:
        """Items of the units of a part."""
        low, high = _halves(part.units)
        start = np.searchsorted(self._low, low, "left")
        end = np.searchsorted(self._low, low, "right")
        known = np.flatnonzero(end > start)
        ends = self._order[start[known]], self._order[end[known] - 1]
        same = (self._high[ends[0]] == high[known]) & (self._high[ends[1]] == high[known])
        count = np.zeros(len(low), np.int64)
        count[known[same]] = (end - start)[known[same]]
        return Match(start, count)

    def take(self, match: Match) -> DonePart:
        """The items of the units that are known, in the order of the units."""
        count = match.count
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        rows = self._rows[self._order[np.repeat(match.start, count) + within]]
        return DonePart(rows, [self._rejects[i] for i in rows["offset"][rows["bucket"] < 0].tolist()])

    def _from_part(self, data: Path, part: DonePart) -> np.ndarray:
        rows = part.rows
        rows["file"] = self.number(data)
        return self._with_rejects(rows, part.rejects)

    def _from_set(self, output: Path, manifest: Manifest) -> np.ndarray | None:
        found = load_items(output / INDEX)
        if found is None or found[2].get("set") != manifest.digest:
            return None
        rows, rejects, values = found
        self.input = values.get("input")
        numbers = [self.number(output / shard.file) for shard in manifest.shards]
        rows = np.array(rows)
        rows["file"] = np.array(numbers, np.int32)[rows["file"]]
        return self._with_rejects(rows, rejects)

    def _with_rejects(self, rows: np.ndarray, rejects: list[Reject]) -> np.ndarray:
        """Rows without units that could not be read: why may be gone though the file is the same."""
        rejected = rows["bucket"] < 0
        places = rows["offset"][rejected]
        rows["offset"][rejected] += len(self._rejects)
        self._rejects += rejects
        unread = np.array([reject.reason is Reason.UNREADABLE_FILE for reject in rejects], bool)
        if not unread.any():
            return rows
        again = rows["unit"][np.flatnonzero(rejected)[unread[places]]]
        return rows[~np.isin(_halves(rows["unit"].tobytes())[0], _halves(again.tobytes())[0])]


def merge(part: Part, known: DonePart, new: DonePart) -> DonePart:
    """Items of all units of a part in order, of which some were known and others were read."""
    place = {part.unit(number): number for number in range(len(part.units) // UNIT_BYTES)}
    both = np.concatenate([known.rows, new.rows])
    order = np.argsort([place[unit.tobytes()] for unit in both["unit"]], kind="stable")
    rejects = known.rejects + new.rejects
    rejected = both["bucket"] < 0
    both["offset"][rejected] = np.arange(len(rejects))
    rows = both[order]
    return DonePart(rows, [rejects[i] for i in rows["offset"][rows["bucket"] < 0].tolist()])


def save_index(
    root: Path, manifest: Manifest, parts: list[DonePart], kept: np.ndarray, order: np.ndarray, source: str
) -> None:
    """Write what a complete data set remembers of its input.

    Args:
        root: of the data set, whose shards are there.
        parts: all items in the order of the input.
        kept: (samples,) bool: whether a sample, in the order of the input, is in the shards.
        order: (kept samples,) int64: which of the kept ones, in the order of the input, is sample i.
        source: what tells the input from another one.

    A unit with a sample that is not in the shards, a duplicate, is left out: it is read again.
    """
    rows = np.concatenate([part.rows for part in parts])
    rejects = [reject for part in parts for reject in part.rejects]
    sample = np.flatnonzero(rows["bucket"] >= 0)
    rows["offset"][rows["bucket"] < 0] = np.arange(len(rejects))
    in_order = sample[kept][order]  # row of sample i of the data set
    first = 0
    for number, shard in enumerate(manifest.shards):
        some = in_order[first : first + shard.samples]
        rows["offset"][some] = read_index(root, shard)["picture_offset"]
        rows["file"][some] = number
        first += shard.samples
    lost = rows["unit"][sample[~kept]]
    if len(lost):
        rows = rows[~np.isin(_halves(rows["unit"].tobytes())[0], _halves(lost.tobytes())[0])]
    rows["file"][rows["bucket"] < 0] = 0
    save_items(root / INDEX, rows, rejects, {"set": manifest.digest, "input": source})


def _halves(units: bytes) -> tuple[np.ndarray, np.ndarray]:
    """First and last 64 bits of hashes of UNIT_BYTES one after another."""
    pairs = np.frombuffer(units, "<u8").reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
