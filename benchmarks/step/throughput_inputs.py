"""Trainers that differ from the training command's in where their inputs come from, and that count."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from millrace.benchmarks.step import frozen_networks
from millrace.engine import config as settings
from millrace.engine.config import Config, Data, TextTower
from millrace.engine.data import Batch, signed_unit
from millrace.engine.distributed import process_group
from millrace.engine.encoders.autoencoder import Autoencoder, Posterior, published_factor
from millrace.engine.encoders.autoencoders.pixels import Pixels
from millrace.engine.encoders.batch_encoder import EncodedBatch
from millrace.engine.encoders.text_encoder import TextEncoder
from millrace.engine.trainer import Trainer
from millrace.engine.util.errors import UserError

FROZEN = ("teacher", "autoencoder", "text")


class Live(Trainer):
    """The trainer, counting what passes through it. Its frozen networks are random where no path is set."""

    includes = "pictures decoded and cropped (ahead), pictures and captions encoded in every step"

    open_autoencoder = staticmethod(frozen_networks.open_autoencoder)
    open_text_encoder = staticmethod(frozen_networks.open_text_encoder)
    open_teacher = staticmethod(frozen_networks.open_teacher)
    shows_steps = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.frozen_flops = dict.fromkeys(FROZEN, 0.0)
        self.count_from_here()

    def _open_logs(self, messages: list[str]) -> None:
        """Without what a run says of itself, which the row has; warnings are said."""
        super()._open_logs([line for line in messages if line.startswith("warning:")])

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random in every parameter, also in those that training starts at zero: a GPU that multiplies
        zeros draws less power and so runs faster."""
        self.model.to(self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)

    def count_from_here(self) -> None:
        """Set the counts of this process to zero."""
        self.flops, self.images, self.image_tokens, self.text_tokens = 0.0, 0, 0, 0

    @property
    def counts(self) -> tuple[float, int, int, int]:
        """Model FLOPs, images, image tokens and text tokens so far."""
        return self.flops, self.images, self.image_tokens, self.text_tokens

    def count_frozen(self) -> None:
        """Prepare one micro-batch and note the FLOPs of each frozen network in it, for one image.

        Where the autoencoder is being tuned it is not frozen, and nothing is counted.
        """
        if self.config.conditioning.autoencoder.tuning.enabled:
            return
        totals = dict.fromkeys(FROZEN, 0)

        def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with FlopCounterMode(display=False) as counter:
                    result = call(*args, **kwargs)
                totals[name] += counter.get_total_flops()
                return result

            return run

        encoder = self.batch_encoder
        parts = {"autoencoder": (encoder.autoencoder, "encode"), "text": (encoder.text_encoder, "encode")}
        if encoder.teacher is not None:
            parts["teacher"] = (encoder.teacher, "features")
        with ExitStack() as stack:
            for name, (owner, method) in parts.items():
                call = counting(name, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, call))
            batch = self.make_batch()
        self.frozen_flops = {name: total / len(batch.keys) for name, total in totals.items()}

    def next_batch(self) -> EncodedBatch:
        batch = self.make_batch()
        self.images += len(batch.keys)
        self.image_tokens += len(batch.clean)
        self.text_tokens += len(batch.text)
        return batch

    def make_batch(self) -> EncodedBatch:
        """One micro-batch on the device."""
        return super().next_batch()

    def _record(
        self, rates: dict[str, float], norm: float, applied: bool, seconds: float, flops: float
    ) -> None:
        self.flops += flops
        super()._record(rates, norm, applied, seconds, flops)


def with_data(config: Config, **changes: Any) -> Config:
    """The configuration with other values in its section `data`."""
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


class RandomLatents(Autoencoder):
    """Stands in for an autoencoder: latents of the true shape, without weights."""

    stochastic = False

    def __init__(self, config: settings.Autoencoder, channels: int) -> None:
        self.channels, self.factor = channels, published_factor(config)
        self.identity = f"random numbers for {config.kind}"

    def _posterior(self, images: Tensor) -> Posterior:
        height, width = images.shape[-2:]
        shape = (len(images), self.channels, height // self.factor, width // self.factor)
        return Posterior(torch.randn(shape, device=images.device), None)

    def _sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        return posterior.sampled(noise)

    def _decode(self, latents: Tensor) -> Tensor:
        raise RuntimeError("random numbers are no pictures")


class RandomText(TextEncoder):
    """Stands in for a text encoder: `length` rows for every caption, without weights."""

    def __init__(self, kind: str, length: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dim, f"random numbers for {kind}", device, dtype)
        self.length = length

    @staticmethod
    def clean(caption: str) -> str:
        return caption

    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        shape = (len(captions), self.length, self.dim)
        return [(rows, False) for rows in torch.randn(shape, device=self.device).to(self.dtype)]


class Pictures(Live):
    """The trainer with text from memory; pictures are decoded and encoded, also those with caches.

    Args:
        caption_tokens: text tokens of every sample.
    """

    includes = "pictures decoded and cropped (ahead) and encoded in every step; random text rows"

    def __init__(self, config: Config, caption_tokens: int) -> None:
        self.caption_tokens = caption_tokens
        super().__init__(with_data(config, cached=()))

    def open_text_encoder(
        self, config: TextTower, dim: int, device: torch.device, dtype: torch.dtype
    ) -> RandomText:
        return RandomText(config.kind, self.caption_tokens, dim, device, dtype)


class Cached(Pictures):
    """The trainer on one micro-batch of random numbers; it opens no pictures, no text encoder and no
    autoencoder. The teacher of an alignment runs in every step.

    Args:
        caption_tokens: text tokens of every sample.
    """

    includes = "random latents (or pixels) and text rows, already on the device; a teacher runs in every step"

    def __init__(self, config: Config, caption_tokens: int) -> None:
        # No pictures: neither a size of theirs nor a decoder.
        plain = {"source": "builtin", "path": None, "keys": None, "mixture": (), "aspect": "square"}
        super().__init__(with_data(config, **plain, loader="python"), caption_tokens)
        edge, samples = config.data.resolution, config.data.micro_batch
        names = [f"random/{i}" for i in range(samples)]
        index = torch.arange(samples) + process_group.rank() * samples
        generator = torch.Generator().manual_seed(config.run.seed)
        pictures = list(torch.randint(256, (samples, 3, edge, edge), generator=generator, dtype=torch.uint8))
        self.batch = self.batch_encoder(Batch(pictures, names, names, index))
        side = edge // (self.batch_encoder.patch * self.batch_encoder.autoencoder.factor)
        self.grids = [(side, side)] * samples
        self.pictures = (
            [signed_unit(picture.to(self.device)) for picture in pictures]
            if self.batch_encoder.teacher is not None
            else []
        )

    def make_batch(self) -> EncodedBatch:
        if self.batch_encoder.teacher is None:
            return self.batch
        features = self.batch_encoder.teacher.features(self.pictures, self.grids, self.batch.keys)
        return replace(self.batch, teacher=features)

    def look_ahead(self) -> None:
        """The one micro-batch is there."""

    def open_source(self, _config: Data, _opened: object) -> tuple:
        return ()

    def open_autoencoder(self, config: settings.Autoencoder, _device: torch.device) -> Autoencoder:
        if config.kind == "pixels":
            return Pixels()
        return RandomLatents(config, self.config.model.in_channels)


TRAINERS = {"cached": Cached, "pictures": Pictures, "live": Live}


def open_trainer(config: Config, conditioning: str, text_tokens: int | None) -> Live:
    """The trainer of a kind of inputs.

    Args:
        conditioning: a name of TRAINERS.
        text_tokens: of each sample where text comes from memory; default the longest allowed.
    """
    if conditioning == "live":
        return Live(config)
    if conditioning == "cached" and config.conditioning.autoencoder.tuning.enabled:
        raise UserError(
            "cached inputs have no pictures, and this run tunes its autoencoder on them; measure it with "
            "--conditioning pictures or live"
        )
    return TRAINERS[conditioning](config, text_tokens or config.conditioning.text.max_tokens)
