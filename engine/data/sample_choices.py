"""Random choices about a sample: caption, caption dropout, crop, flip; each from (seed, sample, purpose)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from millrace.engine.config import Data
from millrace.engine.config.data import value_at
from millrace.engine.data.captions import WhichCaption
from millrace.engine.data.crop import Box, crop_box, output_size
from millrace.engine.data.order import Pool, Size
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
