"""Random choices about a sample: caption, caption dropout, crop, flip; each from (seed, sample, purpose)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from millrace.engine.config import Data
from millrace.engine.config.data import value_at
from millrace.engine.data.captions import WhichCaption
from millrace.engine.data.crop import Box, crop_box, output_size
from millrace.engine.data.order import Pool, Size
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import Source, UnreadablePicture
from millrace.engine.util.randomness import Purpose, passing_generator


class View(NamedTuple):
    """What of a picture is seen, and how large."""

    size: Size
    box: Box
    """The part of the picture that becomes `size`."""
    flip: bool
    """Whether it is mirrored left to right, after that."""


Viewer = Callable[[int, int], View]
"""(width, height) of the upright picture in pixels -> what of it is seen."""


LOOKED_AT = 256
"""Pictures of each source whose captions are looked at when a run begins."""


def single_caption_warnings(config: Data, source: Source) -> list[str]:
    """A line for each source that is asked for short captions where pictures have one caption alone.

    Pictures are looked at in equal distances. One whose captions cannot be read is passed over; training will
    say so.
    """
    parts = [(None, source)]
    if isinstance(source, MixtureSource):
        parts = [*zip(source.parts, source.sources, strict=True)]
    found = []
    for part, pictures in parts:
        share = config.long_caption if part is None or part.long_caption is None else part.long_caption
        least = share if isinstance(share, float) else min(value for _, value in share)
        if least == 1:
            continue
        alone = looked_at = 0
        for place in {i * len(pictures) // LOOKED_AT for i in range(LOOKED_AT)}:
            try:
                captions = pictures.captions(place)
            except (UnreadablePicture, OSError):
                continue
            looked_at += 1
            alone += captions.long == captions.short
        if alone:
            where = "" if part is None else f"part {part.name!r}: "
            found.append(
                f"warning: {where}data.long_caption asks for short captions in up to {1 - least:.0%} of the "
                f"samples, but {alone / looked_at:.0%} of the pictures have one caption alone, which they "
                f"get instead ({looked_at} looked at); give each a long and a short one (docs/data_design.md)"
            )
    return found


class Choices:
    """The choices about the samples of a stream; see `SampleStream` for the arguments."""

    def __init__(
        self, config: Data, seed: int, patch: int, caption_drop: float, origin: tuple[int, int]
    ) -> None:
        self._config, self._seed, self._patch, self._caption_drop = config, seed, patch, caption_drop
        self._origin_sample, self._origin_step = origin

    def viewer(self, i: int, pool: Pool, key: str) -> Viewer:
        """Which view of its picture sample `i` is. It raises UserError, naming `key`, for small pictures."""

        def view(width: int, height: int) -> View:
            config = self._config
            size = pool.size or output_size(width, height, config, self._patch)
            rng = self._generator(i, Purpose.CROP) if config.crop == "random" else None
            box = crop_box(width, height, size, config, rng, key)
            return View(size, box, self._chance(i, Purpose.FLIP, config.flip))

        return view

    def caption(self, i: int, pool: Pool) -> WhichCaption:
        """The caption of sample `i`; the empty one where it is dropped."""
        step = self._origin_step + (i - self._origin_sample) // self._config.global_batch
        share = value_at(pool.long_caption, step)
        which: WhichCaption = "long" if self._chance(i, Purpose.CAPTION, share) else "short"
        return "empty" if self._chance(i, Purpose.CAPTION_DROP, self._caption_drop) else which

    def _generator(self, i: int, purpose: Purpose) -> np.random.Generator:
        return passing_generator(self._seed, i, purpose)

    def _chance(self, i: int, purpose: Purpose, share: float) -> bool:
        return self._generator(i, purpose).random() < share
