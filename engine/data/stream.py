"""Data loader: the endless, deterministic stream of training samples.

    global sample i ──▶ place i - origin ──▶ picture (`mixture.py`, `order.py`)
                    ──▶ caption, crop, flip (`sample_choices.py`) ──▶ pixels (`decoding.py`) ──▶ Batch

Sample i is the same for any number of processes, micro-batch size, number of threads and point of resumption,
because each choice about it is drawn from (seed, i, purpose). The only state of the stream is a counter.
"""

import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.engine.config import Data
from millrace.engine.data.batch import Batch
from millrace.engine.data.captions import WhichCaption
from millrace.engine.data.crop import check_bucket, check_resolution
from millrace.engine.data.dealing import Dealing, Place
from millrace.engine.data.decoding import Encoded, PythonDecoder, open_decoder, parts
from millrace.engine.data.latent_cache import CachedText, Caches
from millrace.engine.data.order import Pool
from millrace.engine.data.sample_choices import Choices
from millrace.engine.data.sources.mixture import order_of
from millrace.engine.data.sources.pictures import (
    Source,
    UnreadablePicture,
    forget_ahead,
    read_ahead,
    samples_ahead,
)
from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
Bad = tuple[tuple[str, UnreadablePicture], ...]
"""Unreadable pictures, by key, that a sample passed over."""


class _Sample(NamedTuple):
    index: int
    picture: int
    pool: Pool
    key: str
    caption: str
    which: WhichCaption
    pixels: Tensor | Encoded | None
    bad: Bad
    text: CachedText | None = None
    moments: Tensor | None = None


class SampleStream:
    """Endless micro-batches of one process; a pure function of (seed, sample index).

    Step k takes the global samples first_sample + [k G, (k + 1) G), G = data.global_batch. Process `rank` of
    `world_size` takes G / world_size of them, in parts of data.micro_batch (`dealing.py`).
    Epoch e visits every picture once, in the order `epoch_order(seed, e, len(source))`; in a mixture every
    part has epochs of its own.

    `origin` is (sample, step) of the run at which training on this data set began: epochs and shares of a
    mixture are counted from there, and sample i belongs to step origin step + (i - origin sample) // G of the
    run, at which schedules are read. Randomness stays with the sample's number in the run.

    Where `caches` have the latents of a picture, it is not decoded; they are of the crop that is trained on.
    `patch` is the edge of a token in pixels; `caption_drop` the share of samples whose caption becomes "".
    `device` is where pixels are wanted: a decoder that works there leaves them there. `loader` says who
    decodes. `bad` maps the key of each unreadable picture that this process met to the reason. Such a picture
    is replaced by the next readable one in the order of the source, in buckets by the next of its bucket.

    Raises UserError at construction for a global batch that does not divide, a source without what
    `data.aspect` or `data.loader` need, and a first sample inside a micro-batch of one bucket; and from
    iteration for pictures that are too small, or unreadable beyond data.max_bad_share. An error closes the
    stream.
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
        device: torch.device = _CPU,
        caches: Caches | None = None,
    ) -> None:
        if first_sample < origin[0]:
            raise ValueError(f"first_sample is {first_sample}, before the origin at sample {origin[0]}")
        check_resolution(config, patch)
        _check_division(config, world_size)
        config = config.model_copy(update={"workers": min(config.workers, process_group.cores_here())})
        self.bad: dict[str, str] = {}
        self._source, self._caches = source, caches
        self._config = config
        self._submitted = 0
        self._origin_sample = origin[0]
        self._order = order_of(source, config, seed, origin[1])
        for size in self._order.sizes:
            check_bucket(size, config, patch)
        if self._order.sizes:
            _check_cut(first_sample - origin[0], config.micro_batch)
        self._dealing = Dealing(source, config, self._order, patch, rank, world_size, first_sample, origin[0])
        self._choices = Choices(config, seed, patch, caption_drop, origin)
        self._bad_in: defaultdict[str, set[str]] = defaultdict(set)
        self._untold: list[tuple[str, int, str, str]] = []
        decoded = caches is None or not caches.complete("latents")
        self._decoder = open_decoder(source, config, device) if decoded else PythonDecoder(source, 0)
        threads = f"{config.workers} threads" if config.workers else "in the training thread"
        self.loader = self._decoder.description if decoded else f"latents of the cache, {threads}"
        self._pool = ThreadPoolExecutor(config.workers, "pictures") if config.workers else None
        self._finisher = (
            ThreadPoolExecutor(self._decoder.lanes, "micro-batches")
            if self._pool and self._decoder.lanes
            else None
        )
        self._placed: deque[list[Place]] = deque()
        self._asked_ahead = -(-samples_ahead(source) // config.micro_batch)
        self._ahead: deque[tuple[list[int], Callable[[], list[_Sample]]]] = deque()
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this SampleStream is closed")
        try:
            if self._pool is None:
                places = self._next_places()
                return self._collect(_samples(places), self._finish(self._start_all(places)))
            # One more than asked for: the first is the one that is handed out now.
            while len(self._ahead) <= self._config.prefetch:
                places = self._next_places()
                self._ahead.append((_samples(places), self._submit(places, self._pool)))
            indices, samples = self._ahead.popleft()
            return self._collect(indices, samples())
        except BaseException:
            self.close()
            raise

    def given(self, sample: int) -> dict[str, int]:
        """How many samples before number `sample` of the run each part of the mixture gave since the origin,
        over all processes; empty without a mixture."""
        return self._order.given(sample - self._origin_sample)

    def too_many_bad(self) -> str | None:
        """Exchange the unreadable pictures that processes have met; those of all count from now on.

        Returns why to stop where there are more than data.max_bad_share of a part, the same on every process.
        Collective.
        """
        told, self._untold = process_group.gather_objects(self._untold), []
        found = list(itertools.chain(*told))
        for part, _, key, _ in found:
            self._bad_in[part].add(key)
        for part, size, _, problem in found:  # only when all are counted, so that every process says the same
            count = len(self._bad_in[part])
            if count / size > self._config.max_bad_share:
                return _too_many(problem, count, size, part, self._config.max_bad_share)
        return None

    def close(self) -> None:
        """Stop decoding ahead. Returns at once; decodes in progress end by themselves."""
        self._closed = True
        for pool in (self._pool, self._finisher):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        forget_ahead(self._source)

    def _next_places(self) -> list[Place]:
        """The next micro-batch of this process; a source that is far away hears of those after it."""
        while len(self._placed) <= self._asked_ahead:
            self._placed.append(self._dealing.micro_batch(self._submitted))
            self._submitted += 1
            if self._asked_ahead:
                read_ahead(self._source, [place.picture for place in self._placed[-1]])
        return self._placed.popleft()

    def _submit(self, places: list[Place], pool: ThreadPoolExecutor) -> Callable[[], list[_Sample]]:
        """Begin a micro-batch in threads; what is returned waits for it."""
        started = [pool.submit(self._start_all, part) for part in parts(places, self._config.workers)]

        def samples() -> list[_Sample]:
            return self._finish([sample for future in started for sample in future.result()])

        return samples if self._finisher is None else self._finisher.submit(samples).result

    def _start_all(self, places: Sequence[Place]) -> list[_Sample]:
        found = []
        for place in places:
            if self._closed:
                raise CancelledError
            found.append(self._start(*place))
        return found

    def _start(self, i: int, picture: int, pool: Pool, bad: Bad = ()) -> _Sample:
        """Sample `i` from picture `picture` or the first readable one after it in `pool`, in any thread."""
        while True:
            key = self._source.key(picture)
            try:
                moments = None if self._caches is None else self._caches.moments(picture)
                pixels = None
                if moments is None:
                    pixels = self._decoder.start(picture, self._choices.viewer(i, pool, key))
                which = self._choices.caption(i, pool)
                caption = self._source.captions(picture).chosen(which)
                text = None if self._caches is None else self._caches.text(picture, which)
                return _Sample(i, picture, pool, key, caption, which, pixels, bad, text, moments)
            except UnreadablePicture as problem:
                bad = (*bad, (key, problem))
                self._check_passed(bad, pool)
                picture = pool.after(picture)

    def _finish(self, samples: list[_Sample]) -> list[_Sample]:
        """The samples with pixels; a file that turns out to be unreadable is replaced here."""
        while waiting := [k for k, sample in enumerate(samples) if isinstance(sample.pixels, Encoded)]:
            done = self._decoder.finish([samples[k].pixels for k in waiting])
            for k, pixels in zip(waiting, done, strict=True):
                sample = samples[k]
                if isinstance(pixels, UnreadablePicture):
                    bad = (*sample.bad, (sample.key, pixels))
                    self._check_passed(bad, sample.pool)
                    samples[k] = self._start(
                        sample.index, sample.pool.after(sample.picture), sample.pool, bad
                    )
                else:
                    samples[k] = sample._replace(pixels=pixels)
        return samples

    def _collect(self, indices: list[int], samples: list[_Sample]) -> Batch:
        # Bad pictures are counted here, in sample order, so the count does not depend on how far threads are.
        for sample in samples:
            for key, problem in sample.bad:
                if key not in self.bad:
                    self.bad[key] = problem.reason
                    log.warning("%s; the next readable picture takes its place", problem)
                    self._bad_in[sample.pool.name].add(key)
                    self._untold.append(
                        (
                            sample.pool.name,
                            sample.pool.part_size,
                            key,
                            f"{problem.where}: cannot be read: {problem.reason}",
                        )
                    )
                    self._check_bad(len(self._bad_in[sample.pool.name]), sample.pool, problem)
        return Batch(
            images=[sample.pixels for sample in samples],
            captions=[sample.caption for sample in samples],
            keys=[sample.key for sample in samples],
            sample_index=torch.tensor(indices, dtype=torch.int64),
            which=[sample.which for sample in samples],
            text=[sample.text for sample in samples] if self._caches else [],
            posteriors=[sample.moments for sample in samples] if self._caches else [],
        )

    def _check_passed(self, bad: Bad, pool: Pool) -> None:
        """One sample passed over these pictures of its pool."""
        _, latest = bad[-1]
        try:
            self._check_bad(len(bad), pool, latest)
            if len(bad) == len(pool.members):
                raise UserError(
                    f"{latest.where}: cannot be read: {latest.reason}; nor can any other that might take "
                    f"its place ({len(bad)} of {len(bad)}); repair or remove them"
                )
        except UserError:
            self.bad |= {key: problem.reason for key, problem in bad}
            raise

    def _check_bad(self, count: int, pool: Pool, latest: UnreadablePicture) -> None:
        limit = self._config.max_bad_share
        if count / pool.part_size > limit:
            problem = f"{latest.where}: cannot be read: {latest.reason}"
            raise UserError(_too_many(problem, count, pool.part_size, pool.name, limit))


def _samples(places: list[Place]) -> list[int]:
    return [place.sample for place in places]


def _too_many(problem: str, count: int, size: int, part: str, limit: float) -> str:
    pictures = f"pictures of part {part!r}" if part else "pictures"
    return (
        f"{problem}; repair or remove it ({count} of {size} {pictures} unreadable so far, data.max_bad_share "
        f"is {limit:g})"
    )


def _check_cut(before: int, micro: int) -> None:
    """Micro-batches begin at multiples of their size from the origin, so that none holds two buckets."""
    if before % micro:
        fitting = max(size for size in range(1, micro) if before % size == 0 and micro % size == 0)
        raise UserError(
            f"data.micro_batch {micro} would begin at sample {before} inside a run of one bucket; "
            f"set data.micro_batch to {fitting}, or resume with the one before"
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
