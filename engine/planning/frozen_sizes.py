"""Frozen networks of a run: their memory and work, by their published sizes."""

from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from millrace.engine.config import Config
from millrace.engine.encoders.autoencoder import arithmetic, autoencoder_entry
from millrace.engine.encoders.pretrained import NetworkSize
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.encoders.text_encoder import text_encoder_entry


class Load(NamedTuple):
    """A frozen network that a run loads."""

    role: str
    """text, autoencoder, teacher or perceptual."""
    kind: str
    bytes: float
    flops: float
    """For one image."""
    known: bool
    """Whether there is a published shape to count by; else it counts as nothing."""


class Loaded(tuple[Load, ...]):
    """The frozen networks that a run loads and what they do for an image."""

    __slots__ = ()

    def of(self, *roles: str) -> "Loaded":
        """Those in some roles."""
        return Loaded(load for load in self if load.role in roles)

    @property
    def bytes(self) -> float:
        """Of all weights."""
        return sum(load.bytes for load in self)

    @property
    def flops(self) -> float:
        """Of all networks for one image."""
        return sum(load.flops for load in self)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Kinds that are not counted."""
        return tuple(load.kind for load in self if not load.known)


def frozen_networks(config: Config, image_tokens: int, text_tokens: int) -> Loaded:
    """Live ones; what has a complete cache in `data.cached` is neither loaded nor run.

    By the published sizes in their entries; a folder of weights that is smaller, as those of a smoke run,
    counts as large as its files.
    """
    conditioning, alignment, dino = config.conditioning, config.alignment, config.objective.dino
    text, autoencoder, teacher = conditioning.text, conditioning.autoencoder, alignment.teacher
    compute = getattr(torch, config.precision.compute)
    found: list[Load] = []
    encoder = text_encoder_entry(text.kind)
    # MDS shards lack the empty caption, so their tower is loaded all the same.
    cached = "text" in config.data.cached and "mds" not in config.data.named_sources.values()
    if encoder.source is not None and not cached:
        found.append(_load("text", text, encoder.size, text_tokens, compute))
    network = autoencoder_entry(autoencoder.kind).network
    if network is not None and "latents" not in config.data.cached:
        pixels = config.data.resolution**2
        found.append(_load("autoencoder", autoencoder, network.size, pixels, arithmetic(autoencoder)))
    if alignment.active and teacher.cache is None:
        size = getattr(vision_entry(teacher.kind).large, "size", None)
        found.append(_load("teacher", teacher, size, image_tokens, getattr(torch, teacher.dtype)))
    if dino.weight:
        vision = vision_entry(dino.kind)
        # Forward of both pictures, and backward to the predicted one.
        patches = 3 * (dino.size // vision.patch) ** 2
        size = getattr(vision.base, "size", None)
        found.append(_load("perceptual", dino, size, patches, getattr(torch, dino.dtype)))
    return Loaded(found)


class _Section(Protocol):
    kind: str
    path: str | None


def _load(role: str, section: _Section, size: NetworkSize | None, units: float, dtype: torch.dtype) -> Load:
    if size is None:
        return Load(role, section.kind, 0.0, 0.0, known=False)
    stored = float(size.parameters * dtype.itemsize)
    if section.path is not None and Path(section.path).is_dir():
        files = Path(section.path).rglob("*.safetensors")
        stored = min(stored, sum(file.stat().st_size for file in files))
    return Load(role, section.kind, stored, size.flops * units, known=True)
