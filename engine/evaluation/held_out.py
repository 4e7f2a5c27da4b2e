"""Held-out loss: the flow-matching loss of a model on pictures that it never saw, at fixed times and noise.

    held-out picture ──largest centred crop, its caption──▶ encoded once ──noise of (seed, key, time)──▶
      denoiser in FP32, all tokens ──▶ loss of each picture at each time ──mean in float64, by key──▶ a record

The times are the middles of equal intervals of (0, 1), by default the eight of torchtitan's validation of
FLUX; each picture has all of them. (PRX draws times at random and sorts the errors into bins.) Two runs that
look at the same set see the same noise, so their losses differ by the models alone, picture by picture.

Pictures are looked at in parts of a fixed size, part p by process p mod their number. So who is in a batch
with whom depends on neither micro-batch nor processes, and the losses of the same weights are the same bits.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from millrace.engine.config import Config
from millrace.engine.data import Batch
from millrace.engine.data.crop import crop_box, cut, output_size
from millrace.engine.data.latent_cache import CachedText, Caches, leaf_of
from millrace.engine.data.sources.held_out_split import HeldOut
from millrace.engine.data.sources.pictures import UnreadablePicture, key_alone
from millrace.engine.distributed import process_group
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.frozen_networks import open_caches
from millrace.engine.evaluation.evaluator import agreed, untouched_randomness
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256
from millrace.engine.util.randomness import Purpose
from millrace.kernels.support.keys import stream_key

PART = 32
"""Pictures that are encoded, and denoised at one time, together."""


class HeldOutScores(NamedTuple):
    """Losses of one model."""

    loss: float
    """Mean over pictures and times."""
    times: tuple[float, ...]
    by_time: list[float]
    """Mean over pictures at each of the times."""
    losses: list[float]
    """Mean over times of each picture that could be read, by key."""
    set: str
    """SHA-256 of what was looked at: keys, times, seed, and how pictures become latents."""
    unreadable: dict[str, str]
    """Reasons by key."""
    seconds: float


class _Sample(NamedTuple):
    pixels: torch.Tensor | None
    caption: str
    text: CachedText | None
    moments: torch.Tensor | None


class HeldOutLoss:
    """The held-out pictures of a run, and the loss on them.

    Args:
        config: of the stage.
        held_out: its pictures.
        prepare: the batch encoder of the training, whose frozen networks are used.
    """

    def __init__(self, config: Config, held_out: HeldOut, prepare: BatchEncoder) -> None:
        section = config.validation
        self.config, self.source, self.prepare = config, held_out.source, prepare
        chosen = np.argsort(held_out.hashes, kind="stable")[: section.samples].tolist()
        named = sorted((key_alone(self.source, place), place) for place in chosen)
        self.keys = [key for key, _ in named]
        """Of the pictures, growing."""
        self._places = [place for _, place in named]
        self._numbers = held_out.hashes[self._places].view(np.int64)
        self.times = tuple((i + 0.5) / section.times for i in range(section.times))
        self._edge = config.model.patch_size * prepare.autoencoder.factor
        self._caches: Caches | None = open_caches(self.source, config) if section.path is None else None
        # The loss of the flow alone. Each time has noise of its own, or one draw would count for all of them.
        objective = config.objective.model_copy(update={"contrastive_weight": 0.0})
        seeds = [stream_key(section.seed, Purpose.NOISE.at(i)) for i in range(section.times)]
        self._flows = [FlowMatching(objective, seed, self._edge) for seed in seeds]

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> HeldOutScores:
        """Losses of a denoiser in FP32, the same one on every process. Collective.

        Raises UserError, on every process, where one cannot read a data set, or no picture can be read.
        """
        tower, begun = self.prepare.text_encoder, time.perf_counter()
        truncated = tower.truncated
        with untouched_randomness(self.prepare.device):
            rows, unreadable = agreed(lambda: self._own(denoiser))
        tower.truncated = truncated  # counted for the training's log, which knows nothing of these
        rows = _joined(process_group.gather_objects(rows))
        unreadable = _joined(process_group.gather_objects(unreadable))
        if not rows:
            key, reason = next(iter(unreadable.items()))
            raise UserError(f"none of {len(self.keys)} held-out pictures can be read; {key}: {reason}")
        columns = list(zip(*rows.values(), strict=True))
        losses = [_mean(row) for row in rows.values()]
        return HeldOutScores(
            loss=_mean(losses),
            times=self.times,
            by_time=[_mean(column) for column in columns],
            losses=losses,
            set=self._identity([self.keys[number] for number in rows]),
            unreadable={self.keys[number]: reason for number, reason in unreadable.items()},
            seconds=time.perf_counter() - begun,
        )

    def describe(self) -> str:
        """A line for people."""
        section = self.config.validation
        where = section.path or f"{section.share:g} of the pictures, {len(self.source)}, not trained on"
        return (
            f"held-out loss: {len(self.keys)} pictures ({where}) at {section.times} times, every "
            f"{section.every_steps} steps"
        )

    def _identity(self, keys: list[str]) -> str:
        section, data, objective = self.config.validation, self.config.data, self.config.objective
        view = data.aspect, data.resolution, section.caption, self.prepare.autoencoder.identity
        parts = [self.times, section.seed, *view, objective.noise_scale, keys]
        return sha256(repr(parts).encode())

    def _own(self, denoiser: Denoiser) -> tuple[dict[int, list[float]], dict[int, str]]:
        """Of the pictures of this process, by number: losses at each time, or why one cannot be read."""
        rows: dict[int, list[float]] = {}
        unreadable: dict[int, str] = {}
        prepare = self.prepare
        encoder = BatchEncoder(
            prepare.autoencoder,
            prepare.text_encoder,
            denoiser.layouts,
            prepare.patch,
            self.config.validation.seed,
            prepare.device,
        )
        workers = min(self.config.data.workers, process_group.cores_here())
        with ThreadPoolExecutor(max(workers, 1), "held-out pictures") as threads:
            for part in _shares(len(self.keys)):
                found = dict(zip(part, threads.map(self._read, part), strict=True))
                unreadable |= {n: one for n, one in found.items() if isinstance(one, str)}
                samples = {n: one for n, one in found.items() if isinstance(one, _Sample)}
                if samples:
                    losses = self._losses(denoiser, encoder, self._batch(samples))
                    rows |= dict(zip(samples, losses, strict=True))
        return rows, unreadable

    def _read(self, number: int) -> _Sample | str:
        """A picture as evaluation sees it, in any thread; the reason where it cannot be read."""
        place, key, data = self._places[number], self.keys[number], self.config.data
        try:
            caption = self.source.captions(place).chosen(self.config.validation.caption)
            text = moments = pixels = None
            if self._caches is not None:
                text = self._caches.text(place, self.config.validation.caption)
                moments = self._caches.moments(place)
            if moments is None:
                image = self.source.image(place)
                size = self._size(place, image.width, image.height)
                pixels = cut(image, crop_box(image.width, image.height, size, data, None, key), size)
            return _Sample(pixels, caption, text, moments)
        except UnreadablePicture as problem:
            return problem.reason

    def _size(self, place: int, width: int, height: int) -> tuple[int, int]:
        """(h, w) in pixels that a picture is trained at."""
        if self.config.data.aspect == "bucket":
            leaf, index = leaf_of(self.source, place)
            if getattr(leaf, "buckets", None):
                return leaf.buckets[leaf.bucket_of[index]]
        return output_size(width, height, self.config.data, self._edge)

    def _batch(self, samples: dict[int, _Sample]) -> Batch:
        caption, cached = self.config.validation.caption, self._caches is not None
        return Batch(
            images=[one.pixels for one in samples.values()],
            captions=[one.caption for one in samples.values()],
            keys=[self.keys[number] for number in samples],
            sample_index=torch.from_numpy(self._numbers[list(samples)]),
            which=[caption] * len(samples),
            text=[one.text for one in samples.values()] if cached else [],
            posteriors=[one.moments for one in samples.values()] if cached else [],
        )

    def _losses(self, denoiser: Denoiser, encoder: BatchEncoder, batch: Batch) -> list[list[float]]:
        """At each time, of each sample of a batch."""
        encoded, found = encoder(batch), []
        clean, layout, index, text = encoded.clean, encoded.layout, encoded.sample_index, encoded.text.float()
        for flow, at in zip(self._flows, self.times, strict=True):
            t = torch.full((len(batch.keys),), at, device=clean.device)
            noisy, noise = flow.noisy(clean, index, t, layout)
            with torch.autocast(clean.device.type, enabled=False):
                prediction = denoiser(noisy, t, text, layout, None).prediction
            found.append(flow.loss(prediction, clean, noise, t, layout))
        return torch.stack(found, 1).tolist()


def exact(config: Config) -> Config:
    """The configuration of a denoiser that computes in FP32, which not every attention backend can."""
    model = config.model.model_copy(update={"attention_backend": "auto"})
    return config.model_copy(update={"model": model})


def _shares(count: int) -> Iterator[range]:
    """The parts of `count` pictures that this process looks at."""
    for start in range(process_group.rank() * PART, count, process_group.world_size() * PART):
        yield range(start, min(start + PART, count))


def _joined(parts: list[dict[int, object]]) -> dict[int, object]:
    """The entries of all processes, by number."""
    return dict(sorted(entry for part in parts for entry in part.items()))


def _mean(values: list[float] | tuple[float, ...]) -> float:
    """In float64, rounded once; NaN where a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return math.fsum(values) / len(values)
