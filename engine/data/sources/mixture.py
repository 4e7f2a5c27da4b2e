"""Mixture of sources, and which picture of which of them a place in the stream is.

    place ──▶ step place // G, slot (place % G) // R ──▶ part of the slot ──▶ its next R pictures ──▶ picture

How many slots of a step a part has follows from the weights (`mixture_shares.py`); which ones is a
permutation drawn from (seed, step). Slots are single pictures (R = 1), or runs of one size where parts are
visited in buckets.
Each part counts its own epochs. Nothing depends on processes, micro-batches or resuming.
"""

import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.order import BucketRuns, Epochs, Order, Pool, deal
from millrace.engine.data.sources.mixture_shares import SharePlan
from millrace.engine.data.sources.pictures import (
    Captions,
    Source,
    encoded,
    key_alone,
    picture_size,
    read_ahead,
    stored_size,
    stored_sizes,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.randomness import Purpose, host_generator


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

    def key_alone(self, index: int) -> str:
        """As `key`, of a picture that is not read."""
        part, place = self._find(index)
        return f"{self.parts[part].name}/{key_alone(self.sources[part], place)}"

    def captions(self, index: int) -> Captions:
        part, place = self._find(index)
        return self.sources[part].captions(place)

    def image(self, index: int) -> Image.Image:
        part, place = self._find(index)
        return self.sources[part].image(place)

    def encoded(self, index: int) -> bytes | None:
        part, place = self._find(index)
        return encoded(self.sources[part], place)

    def stored_size(self, index: int) -> tuple[int, int] | None:
        part, place = self._find(index)
        return stored_size(self.sources[part], place)

    def read_ahead(self, indices: Sequence[int], keys: bool = False) -> None:
        places = [self._find(index) for index in indices]
        for part in {part for part, _ in places}:
            read_ahead(self.sources[part], [place for of, place in places if of == part], keys)

    def header_size(self, index: int) -> tuple[int, int]:
        part, place = self._find(index)
        return picture_size(self.sources[part], place)

    def stored_sizes(self, indices: np.ndarray) -> np.ndarray | None:
        part_of = np.searchsorted(self.offsets, indices, side="right") - 1
        sizes = np.zeros((len(indices), 2), np.int64)
        parts = [
            stored_sizes(source, indices[part_of == p] - self.offsets[p])
            for p, source in enumerate(self.sources)
        ]
        for p, found in enumerate(parts):
            if found is not None:
                sizes[part_of == p] = found
        return None if all(found is None for found in parts) else sizes

    def description(self) -> str:
        """What the order of samples depends on besides keys: names, sizes and weights of the parts."""
        sizes = np.diff(self.offsets).tolist()
        return json.dumps([[part.name, n, part.weight] for part, n in zip(self.parts, sizes, strict=True)])

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return part, index - int(self.offsets[part])


class Mixture:
    """Parts in their shares; `first_step` is the step of the run in which place 0 is."""

    def __init__(self, source: MixtureSource, config: Data, seed: int, first_step: int) -> None:
        self._run = config.bucket_run if config.aspect == "bucket" else 1
        self._slots = config.global_batch // self._run
        self._seed, self._first_step = seed, first_step
        self._plan = SharePlan([part.weight for part in source.parts], self._slots, first_step)
        self._names = [part.name for part in source.parts]
        self._parts = [
            _of_part(whole, config, seed, part, start)
            for part, whole, start in zip(source.parts, source.sources, source.offsets.tolist(), strict=False)
        ]
        self.sizes = tuple(sorted({size for part in self._parts for size in part.sizes}))
        self._step = -1
        self._part_of_slot = self._number_in_part = np.empty(0, np.int64)

    def picture(self, place: int) -> tuple[int, Pool]:
        slot, within = divmod(place, self._run)
        step, slot = divmod(slot, self._slots)
        self._deal(step)
        number = int(self._number_in_part[slot])
        return self._parts[self._part_of_slot[slot]].picture(number * self._run + within)

    def given(self, places: int) -> dict[str, int]:
        slots, within = divmod(places, self._run)
        step, slots = divmod(slots, self._slots)
        counts = self._plan.given(step) * self._run
        if slots or within:
            self._deal(step)
            counts += np.bincount(self._part_of_slot[:slots], minlength=len(counts)) * self._run
            counts[self._part_of_slot[slots]] += within
        return dict(zip(self._names, counts.tolist(), strict=True))

    def _deal(self, step: int) -> None:
        """Fill the slots of a step: of each slot its part, and its number in the sequence of that part."""
        if step == self._step:
            return
        before = self._plan.given(step)
        counts = self._plan.given(step + 1) - before
        generator = host_generator(self._seed, self._first_step + step, Purpose.MIXTURE)
        shuffle = generator.permutation(self._slots)
        self._part_of_slot, self._number_in_part = deal(counts, before, shuffle)
        self._step = step


def order_of(source: Source, config: Data, seed: int, first_step: int) -> Order:
    """The order in which a stream visits `source`; place 0 is in step `first_step` of the run.

    Raises UserError for `data.aspect` bucket where a source has no buckets.
    """
    if isinstance(source, MixtureSource):
        return Mixture(source, config, seed, first_step)
    return _of_part(source, config, seed, None, 0)


def _of_part(source: Source, config: Data, seed: int, part: Part | None, start: int) -> Order:
    """The order of a part whose first picture is number `start` of the mixture, or of the only source."""
    name = part.name if part else ""
    share = config.long_caption if part is None or part.long_caption is None else part.long_caption
    if config.aspect == "bucket":
        buckets = getattr(source, "buckets", None)
        if not buckets:
            where = f"part {name!r} of the mixture" if name else f"data.source {config.source}"
            raise UserError(
                f"{where} is not sorted into buckets; prepare shards of it, or set data.aspect to mixed"
            )
        return BucketRuns(name, start, buckets, source.bucket_of, config.bucket_run, seed, share)
    pool = Pool(name, len(source), range(start, start + len(source)), share)
    # By name, so that parts of one size do not go through their pictures in step.
    return Epochs(pool, seed, Purpose.ORDER.of(name) if name else Purpose.ORDER)
