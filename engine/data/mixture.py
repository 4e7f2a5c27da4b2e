"""Several sources as one, and which picture of which of them a place in the stream is.

    place ──▶ step place // G, slot place % G ──▶ part of the slot ──▶ its next picture ──▶ picture

How many slots of a step a part has follows from the weights (`shares.py`); which ones is a permutation drawn
from (seed, step). Each part counts its own epochs. Nothing depends on processes, micro-batches or resuming.
"""

import json
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part, Points
from millrace.engine.data.pictures import Captions, Source
from millrace.engine.data.shares import SharePlan
from millrace.engine.randomness import epoch_order, host_generator


class Pool(NamedTuple):
    """The pictures of a source among which one may take another's place: all of them, or one part."""

    name: str
    """Of the part; empty without a mixture."""
    start: int
    """Index of its first picture in the source."""
    size: int
    long_caption: float | Points


class MixtureSource:
    """The pictures of all parts one after another; keys begin with the part's name and a slash."""

    def __init__(self, parts: tuple[Part, ...], sources: list[Source]) -> None:
        self.parts = parts
        self.sources = sources
        self.offsets = np.cumsum([0, *map(len, sources)])
        """(parts + 1,) int64: part p has the pictures from offsets[p] to offsets[p + 1]."""

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def key(self, index: int) -> str:
        part, place = self._find(index)
        return f"{self.parts[part].name}/{self.sources[part].key(place)}"

    def captions(self, index: int) -> Captions:
        part, place = self._find(index)
        return self.sources[part].captions(place)

    def image(self, index: int) -> Image.Image:
        part, place = self._find(index)
        return self.sources[part].image(place)

    def description(self) -> str:
        """What the order of samples depends on besides keys: names, sizes and weights of the parts."""
        sizes = np.diff(self.offsets).tolist()
        return json.dumps([[part.name, n, part.weight] for part, n in zip(self.parts, sizes, strict=True)])

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return part, index - int(self.offsets[part])


class Order(Protocol):
    """Which picture each place of a stream is. Places may be asked in any order; growing ones are cheap."""

    def picture(self, place: int) -> tuple[int, Pool]:
        """Index in the source, and the pool it belongs to."""

    def given(self, places: int) -> dict[str, int]:
        """How many of the first `places` places each part has; empty without a mixture."""


class Epochs:
    """One source: epoch e visits every picture once, in the order `epoch_order(seed, e, size)`."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self._pool, self._seed = pool, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def picture(self, place: int) -> tuple[int, Pool]:
        epoch, place = divmod(place, self._pool.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._pool.start + int(self._order[place]), self._pool

    def given(self, places: int) -> dict[str, int]:
        return {self._pool.name: places} if self._pool.name else {}

    def _shuffled(self, epoch: int) -> np.ndarray:
        if not self._pool.name:
            return epoch_order(self._seed, epoch, self._pool.size)
        # By name, so that parts of one size do not go through their pictures in step.
        return host_generator(self._seed, epoch, f"order of {self._pool.name}").permutation(self._pool.size)


class Mixture:
    """Parts in their shares; `first_step` is the step of the run in which place 0 is."""

    def __init__(self, source: MixtureSource, config: Data, seed: int, first_step: int) -> None:
        self._batch, self._seed, self._first_step = config.global_batch, seed, first_step
        self._plan = SharePlan([part.weight for part in source.parts], config.global_batch, first_step)
        self._names = [part.name for part in source.parts]
        self._parts = []
        for p, part in enumerate(source.parts):
            start, end = source.offsets[p : p + 2].tolist()
            share = config.long_caption if part.long_caption is None else part.long_caption
            self._parts.append(Epochs(Pool(part.name, start, end - start, share), seed))
        self._step = -1
        self._part_of_slot = self._place_in_part = np.empty(0, np.int64)

    def picture(self, place: int) -> tuple[int, Pool]:
        step, slot = divmod(place, self._batch)
        self._deal(step)
        return self._parts[self._part_of_slot[slot]].picture(int(self._place_in_part[slot]))

    def given(self, places: int) -> dict[str, int]:
        step, slots = divmod(places, self._batch)
        counts = self._plan.given(step)
        if slots:
            self._deal(step)
            counts = counts + np.bincount(self._part_of_slot[:slots], minlength=len(counts))
        return dict(zip(self._names, counts.tolist(), strict=True))

    def _deal(self, step: int) -> None:
        """Fill the slots of a step: (G,) part of each, and its place in the stream of that part."""
        if step == self._step:
            return
        before = self._plan.given(step)
        counts = self._plan.given(step + 1) - before
        places = np.concatenate([np.arange(n) + first for n, first in zip(counts, before, strict=True)])
        shuffle = host_generator(self._seed, self._first_step + step, "mixture").permutation(self._batch)
        # Slots are shuffled, not the pictures of a part: each part's places grow from slot to slot.
        self._part_of_slot = np.repeat(np.arange(len(counts)), counts)[shuffle]
        self._place_in_part = np.empty(self._batch, np.int64)
        self._place_in_part[np.argsort(self._part_of_slot, kind="stable")] = places
        self._step = step


def order_of(source: Source, config: Data, seed: int, first_step: int) -> Order:
    """The order in which a stream visits `source`; place 0 is in step `first_step` of the run."""
    if isinstance(source, MixtureSource):
        return Mixture(source, config, seed, first_step)
    return Epochs(Pool("", 0, len(source), config.long_caption), seed)
