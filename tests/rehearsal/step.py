"""A training step of a configuration at its published size, on a device that is not there."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from millrace.benchmarks.step import frozen_networks
from millrace.engine.config import Config, TextTower
from millrace.engine.data import Batch
from millrace.engine.data.crop import buckets
from millrace.engine.encoders import dino
from millrace.engine.encoders.autoencoder import Autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.lpips import Lpips
from millrace.engine.encoders.pretrained import import_class
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.encoders.text_encoder import TextEncoder
from millrace.engine.trainer import Trainer
from millrace.kernels.support.compilation import Specialisation
from tests.rehearsal.backward_pass import backward
from tests.rehearsal.launches import noting_launches
from tests.rehearsal.pretended_cuda import DEVICE, pretended_cuda

ARCHITECTURE = 90


@dataclass
class Rehearsed:
    """What a step asks of the operators."""

    calls: Counter[str] = field(default_factory=Counter)
    """By operator."""
    launches: int = 0
    specialisations: set[Specialisation] = field(default_factory=set)


class Step(Trainer):
    """The trainer's micro-batch with the parts that it needs, and neither data nor optimizer.

    Frozen networks have their published shape and random weights, as in benchmarks.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.device, self.zero_stage = config, DEVICE, 0
        conditioning, dtype = config.conditioning, getattr(torch, config.precision.compute)
        autoencoder = frozen_networks.open_autoencoder(conditioning.autoencoder, DEVICE)
        text = open_text_encoder(conditioning.text, config.model.context_dim, DEVICE, dtype)
        teacher = frozen_networks.open_teacher(config.alignment, DEVICE, "")
        self._build_model(None, teacher.dim if teacher else 0)
        self.engine = self._forward
        self._build_loss(autoencoder.factor)
        self.batch_encoder = BatchEncoder(
            autoencoder,
            text,
            self.denoiser.layouts,
            config.model.patch_size,
            config.run.seed,
            DEVICE,
            self.loss_fn.needs_images,
            teacher,
        )

    def init_weights(self, seed: int) -> None:
        """There are no values."""

    def _forward(self, *inputs: Any) -> Any:
        half = self.config.precision.compute == "bfloat16"
        with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
            return self.model(*inputs)

    def run(self, batch: Batch) -> dict[Tensor, Tensor]:
        """Encode, forward, losses, backward; the gradients by parameter."""
        encoded = self.batch_encoder(batch)
        terms, t = self.sample_losses(encoded)
        gradients = backward(sum(terms.values()).mean())
        self.loss_buffer.add(terms, t)
        return gradients


def open_text_encoder(
    config: TextTower, dim: int, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """As in benchmarks; of a network whose published shape is not known a small one with its features."""
    return frozen_networks.open_text_encoder(config, dim, device, dtype)


def batches(config: Config, patch: int) -> Iterator[Batch]:
    """A ragged micro-batch and a uniform one: pictures on the host, and captions.

    Args:
        patch: edge of a token in pixels.
    """
    square = (config.data.resolution,) * 2
    sizes = buckets(config.data.resolution, patch) if config.data.aspect == "mixed" else (square,)
    samples = config.data.micro_batch
    ragged = [" ".join(["word"] * (11 * i % 97)) for i in range(samples)]
    yield _batch([sizes[i % len(sizes)] for i in range(samples)], ragged)
    yield _batch([square] * samples, ["word " * 400] * samples)


def _batch(sizes: Sequence[tuple[int, int]], captions: list[str]) -> Batch:
    pictures = [torch.empty(3, *size, dtype=torch.uint8) for size in sizes]
    return Batch(pictures, captions, [f"picture {i}" for i in range(len(sizes))], torch.arange(len(sizes)))


def rehearse(config: Config) -> Rehearsed:
    """The step on each of its batches."""
    _import_networks()
    with ExitStack() as stack:
        stack.enter_context(pretended_cuda(ARCHITECTURE))
        launches = stack.enter_context(noting_launches(ARCHITECTURE))
        for target, stand_in in _STAND_INS.items():
            stack.enter_context(mock.patch(target, stand_in))
        step = Step(config)
        encoder = step.batch_encoder
        for batch in batches(config, encoder.patch * encoder.autoencoder.factor):
            step.run(batch)
    return Rehearsed(launches.calls, launches.launches, set(launches.noted))


@functools.cache
def _import_networks() -> None:
    """Packages keep what they find out while they are imported, so that must not be the pretended device."""
    for package, names in _NETWORKS.items():
        for name in names:
            import_class(package, name, "the rehearsal")


_NETWORKS = {
    "transformers": ("T5GemmaEncoderModel", "Qwen3VLModel", "Dinov2WithRegistersModel", "DINOv3ViTModel"),
    "diffusers": ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC"),
}


def _lpips(_path: str, device: torch.device, dtype: torch.dtype) -> Lpips:
    network = Lpips()
    network.stages.to(dtype)
    return network.requires_grad_(False).eval().to(device)


def _dino(kind: str, _path: str | None, key: str, device: torch.device, dtype: torch.dtype, _default: str) -> Any:
    dino.register_attention(key)
    entry = vision_entry(kind)
    network = dino.random_network(
        lambda: entry.new_network(entry.base.shape, attn_implementation=dino.ATTENTION), device, dtype
    )
    return dino.Dino(network, kind, device, dtype)


_STAND_INS = {
    "millrace.engine.losses.perceptual.load_lpips": _lpips,
    "millrace.engine.losses.perceptual.load_dino": _dino,
    "millrace.engine.encoders.teacher.weights_digest": lambda _network: "random",
}
