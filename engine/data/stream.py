"""The endless stream of training samples.

    global sample i ──▶ place i - origin ──▶ picture (`mixture.py`) ──▶ crop, flip, caption, drop ──▶ Batch

Sample i is the same for any number of processes, micro-batch size, number of threads and point of resumption,
because each choice about it is drawn from (seed, i, purpose). The only state of the stream is a counter.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.engine.config import Data
from millrace.engine.config.data import value_at
from millrace.engine.data.batch import Batch
from millrace.engine.data.crop import check_resolution, crop_box, cut, output_size
from millrace.engine.data.mixture import order_of
from millrace.engine.data.order import Pool
from millrace.engine.data.pictures import Source, UnreadablePicture
from millrace.engine.errors import UserError
from millrace.engine.randomness import host_generator

log = logging.getLogger(__name__)


class _Sample(NamedTuple):
    image: Tensor
    caption: str
    key: str
    pool: Pool
    bad: tuple[tuple[str, UnreadablePicture], ...]
    """Unreadable pictures, by key, that this sample passed over."""


class SampleStream:
    """Endless micro-batches of one process; a pure function of (seed, sample index).

    Step k takes the global samples first_sample + [k G, (k + 1) G), G = data.global_batch. Process `rank` of
    `world_size` takes the rank-th contiguous part of G / world_size samples, in parts of data.micro_batch.
    Epoch e visits every picture once, in the order `epoch_order(seed, e, len(source))`; in a mixture every
    part has epochs of its own.

    `origin` is (sample, step) of the run at which training on this data set began: epochs and shares of a
    mixture are counted from there, and sample i belongs to step origin step + (i - origin sample) // G of the
    run, at which schedules are read. Randomness stays with the sample's number in the run.

    `patch` is the edge of a token in pixels; `caption_drop` the share of samples whose caption becomes "".
    `bad` maps the key of each unreadable picture that this process met to the reason. Such a picture is
    replaced by the next readable one in the order of the source.

    Raises UserError for a global batch that does not divide, at construction; and from iteration for pictures
    that are too small, or unreadable beyond data.max_bad_share. An error closes the stream.
    """

    def __init__(
        self,
        source: Source,
        config: Data,
        *,
        seed: int,
        patch: int,
        caption_drop: float,
        rank: int,
        world_size: int,
        first_sample: int = 0,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        if first_sample < origin[0]:
            raise ValueError(f"first_sample is {first_sample}, before the origin at sample {origin[0]}")
        check_resolution(config, patch)
        _check_division(config, world_size)
        self.bad: dict[str, str] = {}
        self._source = source
        self._config = config
        self._seed = seed
        self._patch = patch
        self._caption_drop = caption_drop
        self._share = config.global_batch // world_size
        self._first = first_sample + rank * self._share
        self._submitted = 0
        self._origin_sample, self._origin_step = origin
        self._order = order_of(source, config, seed, self._origin_step)
        self._bad_in: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(config.workers, "pictures") if config.workers else None
        self._ahead: deque[tuple[range, list[Future[_Sample]]]] = deque()
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this SampleStream is closed")
        try:
            if self._pool is None:
                indices = self._next_indices()
                return self._collect(indices, [self._load(i, *self._picture(i)) for i in indices])
            # One more than asked for: the first is the one that is handed out now.
            while len(self._ahead) <= self._config.prefetch:
                indices = self._next_indices()
                futures = [self._pool.submit(self._load, i, *self._picture(i)) for i in indices]
                self._ahead.append((indices, futures))
            indices, futures = self._ahead.popleft()
            return self._collect(indices, [future.result() for future in futures])
        except BaseException:
            self.close()
            raise

    def given(self, sample: int) -> dict[str, int]:
        """How many samples before number `sample` of the run each part of the mixture gave since the origin,
        over all processes; empty without a mixture."""
        return self._order.given(sample - self._origin_sample)

    def close(self) -> None:
        """Stop decoding ahead. Returns at once; decodes in progress end by themselves."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_indices(self) -> range:
        """Global sample indices of the next micro-batch of this process."""
        micro = self._config.micro_batch
        step, part = divmod(self._submitted, self._share // micro)
        start = self._first + step * self._config.global_batch + part * micro
        self._submitted += 1
        return range(start, start + micro)

    def _picture(self, i: int) -> tuple[int, Pool]:
        """Index in the source of sample `i`, and the pictures among which it is."""
        return self._order.picture(i - self._origin_sample)

    def _collect(self, indices: range, samples: list[_Sample]) -> Batch:
        # Bad pictures are counted here, in sample order, so the count does not depend on how far threads are.
        for sample in samples:
            for key, problem in sample.bad:
                if key not in self.bad:
                    self.bad[key] = problem.reason
                    log.warning("%s; the next readable picture takes its place", problem)
                    self._bad_in[sample.pool.name] += 1
                    self._check_bad(self._bad_in[sample.pool.name], sample.pool, problem)
        return Batch(
            images=[sample.image for sample in samples],
            captions=[sample.caption for sample in samples],
            keys=[sample.key for sample in samples],
            sample_index=torch.tensor(indices, dtype=torch.int64),
        )

    def _load(self, i: int, picture: int, pool: Pool) -> _Sample:
        """Sample `i` from picture `picture` or the first readable one after it in `pool`, in any thread."""
        config = self._config
        bad: list[tuple[str, UnreadablePicture]] = []
        while True:
            key = self._source.key(picture)
            try:
                image = self._source.image(picture)
                break
            except UnreadablePicture as problem:
                bad.append((key, problem))
                self._check_bad(len(bad), pool, problem)
                picture = pool.after(picture)
        rng = self._generator(i, "crop") if config.crop == "random" else None
        size = output_size(image.width, image.height, config, self._patch)
        pixels = cut(image, crop_box(image.width, image.height, size, config, rng, key), size)
        if self._chance(i, "flip", config.flip):
            pixels = pixels.flip(-1)
        captions = self._source.captions(picture)
        step = self._origin_step + (i - self._origin_sample) // config.global_batch
        share = value_at(pool.long_caption, step)
        caption = captions.long if self._chance(i, "caption", share) else captions.short
        if self._chance(i, "caption drop", self._caption_drop):
            caption = ""
        return _Sample(pixels, caption, key, pool, tuple(bad))

    def _generator(self, i: int, purpose: str) -> np.random.Generator:
        return host_generator(self._seed, i, purpose)

    def _chance(self, i: int, purpose: str, share: float) -> bool:
        return self._generator(i, purpose).random() < share

    def _check_bad(self, count: int, pool: Pool, latest: UnreadablePicture) -> None:
        limit = self._config.max_bad_share
        if count / pool.part_size > limit:
            pictures = f"pictures of part {pool.name!r}" if pool.name else "pictures"
            raise UserError(
                f"{latest.where}: cannot be read: {latest.reason}; repair or remove it "
                f"({count} of {pool.part_size} {pictures} unreadable so far, data.max_bad_share is {limit:g})"
            )


def _check_division(config: Data, world_size: int) -> None:
    """Every process must get the same whole number of micro-batches in every step."""
    total, micro = config.global_batch, config.micro_batch
    unit = world_size * micro
    if total % unit == 0:
        return
    low = total // unit * unit
    choices = "data.global_batch " + " or ".join(str(size) for size in (low, low + unit) if size)
    if total % world_size == 0:
        share = total // world_size
        fitting = max(size for size in range(1, min(share, micro) + 1) if share % size == 0)
        choices += f", or data.micro_batch {fitting}"
    raise UserError(
        f"data.global_batch {total} is not a multiple of {world_size} processes x data.micro_batch {micro} "
        f"= {unit}; set {choices}"
    )
