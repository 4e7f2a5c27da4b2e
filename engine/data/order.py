"""Sampling order: which picture of one source comes when (shuffled epochs, runs of aspect-ratio buckets).

    place ──▶ epoch place // N, its permutation ──▶ picture                               `Epochs`
    place ──▶ run place // R ──▶ bucket, run of the bucket ──▶ place in it ──▶ picture    `BucketRuns`

Both are closed forms of (seed, place): nothing depends on processes, micro-batches or where a run resumed.
"""

from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from millrace.engine.config.data import Points
from millrace.engine.util.randomness import Purpose, epoch_order, host_generator

Size = tuple[int, int]
"""(h, w) in pixels."""
_AHEAD_FROM = 1 << 18
"""Permutations of so many pictures take long enough to be made ahead of their epoch."""
_AHEAD_SHARE = 1 / 8
"""Of an epoch that is left when the permutation of the next one is begun."""
_CHUNK = 1 << 20
"""Pictures whose buckets are looked at together."""
_ahead = ThreadPoolExecutor(1, "permutations")


class Pool(NamedTuple):
    """The pictures of a source among which one may take another's place: all of a part, or of its bucket."""

    name: str
    """Of the part of a mixture; empty without one."""
    part_size: int
    """Pictures of the part, of which a share may be unreadable."""
    members: "range | np.ndarray | Spans"
    """Their indices in the source, growing."""
    long_caption: float | Points
    size: Size | None = None
    """What they are trained at, where that is theirs in common."""

    def after(self, picture: int) -> int:
        """Index of the member that comes after `picture`; after the last comes the first."""
        members = self.members
        if isinstance(members, np.ndarray):
            place = int(np.searchsorted(members, picture))
        else:
            place = members.index(picture)
        return int(members[(place + 1) % len(members)])


class Order(Protocol):
    """Which picture each place of a stream is. Places may be asked in any order; growing ones are cheap."""

    sizes: tuple[Size, ...]
    """All sizes that pools have in common."""

    def picture(self, place: int) -> tuple[int, Pool]:
        """Index in the source, and the pool it belongs to."""

    def given(self, places: int) -> dict[str, int]:
        """How many of the first `places` places each part has; empty without a mixture."""


class Spans:
    """Growing numbers that lie in few contiguous spans, as those of a bucket do, whose shards are contiguous.

    Args:
        starts, lengths: (K,) int64 of the spans, none empty.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        self._starts: list[int] = starts.tolist()
        self._before: list[int] = np.cumsum([0, *lengths]).tolist()

    def __len__(self) -> int:
        return self._before[-1]

    def __getitem__(self, place: int) -> int:
        span = bisect_right(self._before, place) - 1
        return self._starts[span] + int(place) - self._before[span]

    def index(self, number: int) -> int:
        """Place of a number that is among them."""
        span = bisect_right(self._starts, number) - 1
        return self._before[span] + number - self._starts[span]


def members_of(bucket_of: np.ndarray, buckets: int, start: int) -> list[np.ndarray | Spans]:
    """start + the indices of the pictures of each bucket, growing; `bucket_of` (n,) may be a mapped file, or
    make its parts when they are asked for.

    Memory holds a chunk of it, and its spans, or all indices where there are more than a span in 64
    pictures.
    """
    edges = [np.zeros(1, np.int64)]
    for first in range(0, len(bucket_of), _CHUNK):
        part = bucket_of[max(first - 1, 0) : first + _CHUNK]
        edges.append(np.flatnonzero(part[1:] != part[:-1]) + max(first - 1, 0) + 1)
        if sum(map(len, edges)) > max(first, _CHUNK) // 64:
            return [start + np.flatnonzero(bucket_of[:] == b) for b in range(buckets)]
    starts = np.concatenate(edges)[: len(bucket_of)]
    lengths, numbers = np.diff(starts, append=len(bucket_of)), bucket_of[starts]
    return [Spans(start + starts[numbers == b], lengths[numbers == b]) for b in range(buckets)]


class Epochs:
    """Epoch e visits every picture of `pool` once, in the order `epoch_order(seed, e, size, purpose)`.

    The permutation of the next epoch is made in a thread while the last part of an epoch is given: of 100
    million pictures that takes ten seconds.
    """

    sizes = ()

    def __init__(self, pool: Pool, seed: int, purpose: str) -> None:
        self._pool, self._seed, self._purpose = pool, seed, purpose
        self._size = len(pool.members)
        self._epoch, self._order = -1, np.empty(0, np.uint32)
        self._next: tuple[int, Future[np.ndarray]] | None = None
        self._ahead_from = self._size * (1 - _AHEAD_SHARE) if self._size >= _AHEAD_FROM else self._size

    def picture(self, place: int) -> tuple[int, Pool]:
        epoch, place = divmod(place, self._size)
        if epoch != self._epoch:
            made, self._next = self._next, None
            self._order = made[1].result() if made and made[0] == epoch else self._permutation(epoch)
            self._epoch = epoch
        elif place >= self._ahead_from and self._next is None:
            self._next = epoch + 1, _ahead.submit(self._permutation, epoch + 1)
        return int(self._pool.members[int(self._order[place])]), self._pool

    def _permutation(self, epoch: int) -> np.ndarray:
        return epoch_order(self._seed, epoch, self._size, self._purpose)

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
        members_of_all = members_of(bucket_of, len(buckets), start)
        counts = np.array([len(members) for members in members_of_all])
        # A list of keys may leave nothing of a bucket.
        filled = [b for b in range(len(buckets)) if counts[b]]
        self.sizes = tuple(buckets[b] for b in filled)
        self._counts = counts[filled].astype(np.int64)
        self._buckets = []
        for b in filled:
            pool = Pool(name, len(bucket_of), members_of_all[b], long_caption, buckets[b])
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
