"""Dealing: which samples of a step a process takes, in which of its micro-batches.

    step k: samples [k G, (k + 1) G)    process r of W: the r-th G / W of them, in parts of data.micro_batch

Where pictures keep their own shapes (`data.aspect` mixed), frozen networks run once for each size in a
micro-batch, so neighbouring processes sort what they have of a step by size before they share it out. Which
samples a step has, and every choice about each of them, stays as it is; only who computes it changes, and
with it the order of the sums. Sizes are those of the source's index: one without it is dealt as it comes.
"""

from typing import NamedTuple

import numpy as np

from millrace.engine.config import Data
from millrace.engine.data.crop import sizes_of
from millrace.engine.data.order import Order, Pool
from millrace.engine.data.sources.pictures import Source, stored_sizes

_TOGETHER = 2048
"""Samples of a step that are sorted together, at least a process's own: enough for micro-batches of one size,
and milliseconds of every process."""


class Place(NamedTuple):
    """What a sample is made of."""

    sample: int
    """Number in the run."""
    picture: int
    """Index in the source."""
    pool: Pool
    """The pictures among which that is."""


class Dealing:
    """The micro-batches of one process; a function of their number.

    Args:
        order: whose place 0 is sample `origin` of the run.
        patch: edge of a token in pixels.
        rank, world_size: of this process, and how many there are.
        first: sample at which micro-batch 0 of the first step begins.
    """

    def __init__(
        self,
        source: Source,
        config: Data,
        order: Order,
        patch: int,
        rank: int,
        world_size: int,
        first: int,
        origin: int,
    ) -> None:
        self._source, self._order = source, order
        self._micro, self._batch = config.micro_batch, config.global_batch
        self._first, self._origin = first, origin
        self._share = config.global_batch // world_size
        self._shapes: np.ndarray | None = None
        group = 1
        # As `crop.nearest_size` compares shapes, of h/w.
        self._measure = np.log if config.aspect == "mixed" else np.reciprocal
        if config.aspect in ("mixed", "prx") and stored_sizes(source, np.zeros(1, np.int64)) is not None:
            sizes = np.array(sizes_of(config.aspect, config.resolution, patch), float)
            self._shapes = self._measure(sizes[:, 0] / sizes[:, 1])
            group = max(1, _TOGETHER // self._share)
        self._group = range(rank // group * group, min(rank // group * group + group, world_size))
        self._mine = rank - self._group.start
        self._step, self._places = -1, list[Place]()

    def micro_batch(self, number: int) -> list[Place]:
        """Micro-batch `number` of this process, counted from `first` on."""
        step, part = divmod(number, self._share // self._micro)
        if self._shapes is None:
            start = self._first + step * self._batch + self._group.start * self._share + part * self._micro
            return [
                Place(i, *self._order.picture(i - self._origin)) for i in range(start, start + self._micro)
            ]
        if step != self._step:
            self._step, self._places = step, self._sorted(step)
        return self._places[part * self._micro : (part + 1) * self._micro]

    def _sorted(self, step: int) -> list[Place]:
        """This process's samples of a step, after those of its group are sorted by size."""
        start = self._first + step * self._batch + self._group.start * self._share
        place = start - self._origin
        found = [self._order.picture(place + i) for i in range(len(self._group) * self._share)]
        sizes = stored_sizes(self._source, np.array([picture for picture, _ in found]))
        assert sizes is not None  # as when the first was asked for
        order = np.argsort(self._nearest(sizes), kind="stable")
        mine = order[self._mine * self._share : (self._mine + 1) * self._share]
        return [Place(start + i, *found[i]) for i in mine.tolist()]

    def _nearest(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) number of the bucket of pictures (width, height); of one that is not known after all."""
        with np.errstate(divide="ignore", invalid="ignore"):
            shapes = self._measure(sizes[:, 1] / sizes[:, 0])
        nearest = np.abs(shapes[:, None] - self._shapes).argmin(1)
        return np.where(sizes[:, 0] > 0, nearest, len(self._shapes))
