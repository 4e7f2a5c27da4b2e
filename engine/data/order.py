"""Sampling order: which picture of one source comes when (shuffled epochs, runs of aspect-ratio buckets).

    place ──▶ epoch place // N, its permutation ──▶ picture                               `Epochs`
    place ──▶ run place // R ──▶ bucket, run of the bucket ──▶ place in it ──▶ picture    `BucketRuns`

Both are closed forms of (seed, place): nothing depends on processes, micro-batches or where a run resumed.
"""

from bisect import bisect_right
from typing import NamedTuple, Protocol

import numpy as np

from millrace.engine.config.data import Points
from millrace.engine.util.randomness import Purpose, epoch_order, host_generator

Size = tuple[int, int]
"""(h, w) in pixels."""


class Pool(NamedTuple):
    """The pictures of a source among which one may take another's place: all of a part, or of its bucket."""

    name: str
    """Of the part of a mixture; empty without one."""
    part_size: int
    """Pictures of the part, of which a share may be unreadable."""
    members: range | np.ndarray
    """Their indices in the source, growing."""
    long_caption: float | Points
    size: Size | None = None
    """What they are trained at, where that is theirs in common."""

    def after(self, picture: int) -> int:
        """Index of the member that comes after `picture`; after the last comes the first."""
        members = self.members
        place = picture - members[0] if isinstance(members, range) else np.searchsorted(members, picture)
        return int(members[(place + 1) % len(members)])


class Order(Protocol):
    """Which picture each place of a stream is. Places may be asked in any order; growing ones are cheap."""

    sizes: tuple[Size, ...]
    """All sizes that pools have in common."""

    def picture(self, place: int) -> tuple[int, Pool]:
        """Index in the source, and the pool it belongs to."""

    def given(self, places: int) -> dict[str, int]:
        """How many of the first `places` places each part has; empty without a mixture."""


class Epochs:
    """Epoch e visits every picture of `pool` once, in the order `epoch_order(seed, e, size, purpose)`."""

    sizes = ()

    def __init__(self, pool: Pool, seed: int, purpose: str) -> None:
        self._pool, self._seed, self._purpose = pool, seed, purpose
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def picture(self, place: int) -> tuple[int, Pool]:
        members = self._pool.members
        epoch, place = divmod(place, len(members))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._seed, epoch, len(members), self._purpose)
        return int(members[self._order[place]]), self._pool

    def given(self, places: int) -> dict[str, int]:
        return {self._pool.name: places} if self._pool.name else {}


class BucketRuns:
    """Runs of R pictures of one size, so that every micro-batch inside a run has that size alone.

    The n_b pictures of bucket b form an endless sequence, epoch after epoch in an order of its own, that is
    cut into runs. Epoch e of the source has

        floor(n_b (e + 1) / R) - floor(n_b e / R)

    runs of bucket b, shuffled with those of the other buckets. What is left of a bucket at the end of an
    epoch is carried into the next ones: after e epochs floor(n_b e / R) R of its n_b e pictures were given,
    so none is lost or repeated, and whenever R divides n_b e every picture of it was seen exactly e times.

    Args:
        name: of the part of a mixture, or "".
        start: index of the part's first picture in the whole source.
        buckets: sizes (h, w); bucket_of: (n,) index into them of each picture of the part.
        run: R.
    """

    def __init__(
        self,
        name: str,
        start: int,
        buckets: tuple[Size, ...],
        bucket_of: np.ndarray,
        run: int,
        seed: int,
        long_caption: float | Points,
    ) -> None:
        self._name, self._run, self._seed = name, run, seed
        self._purpose = Purpose.RUNS.of(name) if name else Purpose.RUNS
        counts = np.bincount(bucket_of, minlength=len(buckets))
        # A list of keys may leave nothing of a bucket.
        filled = [b for b in range(len(buckets)) if counts[b]]
        self.sizes = tuple(buckets[b] for b in filled)
        self._counts = counts[filled].astype(np.int64)
        self._buckets = []
        for b in filled:
            members = start + np.flatnonzero(bucket_of == b)
            pool = Pool(name, len(bucket_of), members, long_caption, buckets[b])
            # By part and size, so that buckets with as many pictures do not go through them in step.
            purpose = Purpose.ORDER.of(f"{name} {buckets[b][0]}x{buckets[b][1]}")
            self._buckets.append(Epochs(pool, seed, purpose))
        self._first = self._end = 0
        self._bucket_of_run = self._run_in_bucket = np.empty(0, np.int64)

    def picture(self, place: int) -> tuple[int, Pool]:
        number, within = divmod(place, self._run)
        if not self._first <= number < self._end:
            self._deal(number)
        k = number - self._first
        at = int(self._run_in_bucket[k]) * self._run + within
        return self._buckets[self._bucket_of_run[k]].picture(at)

    def given(self, places: int) -> dict[str, int]:
        return {self._name: places} if self._name else {}

    def runs_before(self, epoch: int) -> np.ndarray:
        """Runs (buckets,) int64 that each bucket gave in the first `epoch` epochs."""
        return self._counts * epoch // self._run

    def _deal(self, number: int) -> None:
        """Fill in the epoch of run `number`: of each of its runs the bucket, and which run of it."""
        # Each bucket is less than a run behind, which bounds the epoch from above.
        high = (number + len(self._counts) + 1) * self._run // int(self._counts.sum()) + 2
        epoch = bisect_right(range(high), number, key=lambda e: int(self.runs_before(e).sum())) - 1
        before, after = self.runs_before(epoch), self.runs_before(epoch + 1)
        self._first, self._end = int(before.sum()), int(after.sum())
        shuffle = host_generator(self._seed, epoch, self._purpose).permutation(self._end - self._first)
        self._bucket_of_run, self._run_in_bucket = deal(after - before, before, shuffle)


def deal(counts: np.ndarray, first: np.ndarray, shuffle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots given out to parts: of each slot the part, and its number in the sequence of that part.

    Part p gets `counts[p]` of the slots, numbered from `first[p]`; `shuffle` is a permutation of the slots.
    Slots are shuffled, not what a part has: its numbers grow from slot to slot.
    """
    part_of_slot = np.repeat(np.arange(len(counts)), counts)[shuffle]
    numbers = np.concatenate([np.arange(n) + start for n, start in zip(counts, first, strict=True)])
    number_in_part = np.empty(len(shuffle), np.int64)
    number_in_part[np.argsort(part_of_slot, kind="stable")] = numbers
    return part_of_slot, number_in_part
