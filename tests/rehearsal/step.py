"""A training step of a configuration at its published size, on a device that is not there."""

import functools
import importlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from millrace.benchmarks.step import frozen_networks
from millrace.benchmarks.step.throughput_inputs import RandomLatents, RandomText
from millrace.engine.config import Alignment, Config
from millrace.engine.data import Batch
from millrace.engine.data.crop import buckets
from millrace.engine.encoders import dino
from millrace.engine.encoders.autoencoder import Autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.encoders.lpips import Lpips
from millrace.engine.encoders.pretrained import import_class, random_network
from millrace.engine.encoders.teacher import Teacher, vision_entry
from millrace.engine.encoders.text_encoder import TextEncoder
from millrace.engine.encoders.text_encoders.qwen3vl import Qwen3VL
from millrace.engine.trainer import Trainer
from millrace.kernels.support.compilation import Specialisation
from millrace.kernels.support.packages import is_importable
from tests.rehearsal.backward_pass import backward
from tests.rehearsal.launches import noting_launches
from tests.rehearsal.pretended_cuda import DEVICE, pretended_cuda

ARCHITECTURE = 90


class Rehearsed(NamedTuple):
    """What a step asks of the operators."""

    calls: Counter[str]
    """By operator."""
    launches: int
    specialisations: frozenset[Specialisation]


class Step(Trainer):
    """The trainer's micro-batch with the parts that it needs, and neither data nor optimizer.

    Args:
        config: of a stage.
        whole: kinds of text encoders and autoencoders that run in their published shape with random weights.
            Of the others only what they return is there. A teacher is always whole.
    """

    def __init__(self, config: Config, whole: Collection[str]) -> None:
        self.config, self.device, self.zero_stage = config, DEVICE, 0
        autoencoder = _autoencoder(config, whole)
        teacher = _teacher(config.alignment)
        self._build_model(None, teacher.dim if teacher else 0)
        self.engine = self._forward
        self._build_loss(autoencoder.factor)
        self.batch_encoder = BatchEncoder(
            autoencoder,
            _text_encoder(config, whole),
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


class Rows(RandomText):
    """Stands in for a text encoder: a row for every word and one for the end."""

    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        lengths = [min(len(caption.split()) + 1, self.length) for caption in captions]
        rows = torch.empty(sum(lengths), self.dim, device=self.device, dtype=self.dtype)
        return [(part, False) for part in rows.split(lengths)]


def _text_encoder(config: Config, whole: Collection[str]) -> TextEncoder:
    section, dim = config.conditioning.text, config.model.context_dim
    dtype = getattr(torch, config.precision.compute)
    if section.kind not in whole:
        return Rows(section.kind, section.max_tokens, dim, DEVICE, dtype)
    if section.kind == "qwen3vl":  # whose published shape is not known
        shape = {"hidden_size": dim, "intermediate_size": dim, "num_hidden_layers": 2, "head_dim": 16}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
        whole_network = random_network(lambda: Qwen3VL.tiny_network(shape), DEVICE, dtype)
        tokenizer = frozen_networks.PieceTokenizer(shape["vocab_size"])
        return Qwen3VL(section, tokenizer, whole_network.model.language_model, "qwen3vl", DEVICE, dtype)
    return frozen_networks.open_text_encoder(section, dim, DEVICE, dtype)


def _autoencoder(config: Config, whole: Collection[str]) -> Autoencoder:
    section = config.conditioning.autoencoder
    if section.kind == "pixels" or section.kind in whole:
        return frozen_networks.open_autoencoder(section, DEVICE)
    return RandomLatents(section, config.model.in_channels)


def _teacher(config: Alignment) -> Teacher | None:
    """Of a hub id, ViT-B, which HASTE's configuration names; else the default."""
    if config.teacher.path is None:
        return frozen_networks.open_teacher(config, DEVICE, "")
    return dino.DinoTeacher(
        config.teacher,
        _dino(config.teacher.kind, None, "", DEVICE, getattr(torch, config.teacher.dtype), ""),
        DEVICE,
        config.attention,
    )


def batches(config: Config, patch: int) -> Iterator[Batch]:
    """A ragged micro-batch and a uniform one: pictures on the host, and captions.

    Args:
        patch: edge of a token in pixels.
    """
    square = (config.data.resolution,) * 2
    sizes = [square]
    if config.data.aspect == "mixed":
        every = buckets(config.data.resolution, patch)
        sizes = [every[0], square, every[-1]]
    samples = config.data.micro_batch
    ragged = [" ".join(["word"] * (11 * i % 97)) for i in range(samples)]
    yield _batch([sizes[i % len(sizes)] for i in range(samples)], ragged)
    yield _batch([square] * samples, ["word " * 400] * samples)


def _batch(sizes: Sequence[tuple[int, int]], captions: list[str]) -> Batch:
    pictures = [torch.empty(3, *size, dtype=torch.uint8) for size in sizes]
    return Batch(pictures, captions, [f"picture {i}" for i in range(len(sizes))], torch.arange(len(sizes)))


def rehearsed_config(config: Config) -> Config:
    """`config` without what a rehearsal cannot do: read weights, compile a graph, or tune an autoencoder."""
    values = config.model_dump(mode="json")
    values["run"] |= {"compile": False, "init_from": None}
    values["conditioning"]["autoencoder"]["tuning"] = {"enabled": False}
    return Config.model_validate_json(json.dumps(values), strict=True)


def rehearse(config: Config, whole: Collection[str] = ()) -> Rehearsed:
    """The step on each of its batches; `whole` as of `Step`."""
    _import_networks()
    with ExitStack() as stack:
        copies = stack.enter_context(pretended_cuda(ARCHITECTURE))
        launches = stack.enter_context(noting_launches(ARCHITECTURE))
        for target, stand_in in _STAND_INS.items():
            stack.enter_context(mock.patch(target, stand_in))
        step = Step(rehearsed_config(config), whole)
        encoder, copies.in_step = step.batch_encoder, True
        for batch in batches(config, encoder.patch * encoder.autoencoder.factor):
            step.run(batch)
    return Rehearsed(launches.calls, launches.launches, frozenset(launches.noted))


@functools.cache
def _import_networks() -> None:
    """Packages keep what they find out while they are imported, so that must not be the pretended device."""
    for package, names in _NETWORKS.items():
        for name in names:
            import_class(package, name, "the rehearsal")
    if is_importable("liger_kernel.ops"):
        importlib.import_module("liger_kernel.ops")


_NETWORKS = {
    "transformers": ("T5GemmaEncoderModel", "Qwen3VLModel", "Dinov2WithRegistersModel", "DINOv3ViTModel"),
    "diffusers": ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC"),
}


def _lpips(_path: str, device: torch.device, dtype: torch.dtype) -> Lpips:
    network = Lpips()
    network.stages.to(dtype)
    return network.requires_grad_(False).eval().to(device)


def _dino(
    kind: str, _path: str | None, key: str, device: torch.device, dtype: torch.dtype, _default: str
) -> Any:
    dino.register_attention(key)
    entry = vision_entry(kind)
    network = random_network(
        lambda: entry.new_network(entry.base.shape, attn_implementation=dino.ATTENTION), device, dtype
    )
    return dino.Dino(network, kind, device, dtype)


_STAND_INS = {
    "millrace.engine.losses.perceptual.load_lpips": _lpips,
    "millrace.engine.losses.perceptual.load_dino": _dino,
    "torch.nn.init._no_grad_trunc_normal_": lambda tensor, *_, **__: tensor,
    "millrace.engine.encoders.teacher.weights_digest": lambda _network: "random",
}
