"""Frozen networks of a run: their memory and work.

The published network counts by the size in its entry. One that `path` names counts by its own configuration,
read without its weights from a local folder or from what was fetched of a hub id before; where there is none
to read, it counts as the published one, and the plan says so.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from millrace.engine.config import Config
from millrace.engine.encoders.autoencoder import arithmetic, autoencoder_entry, size_of
from millrace.engine.encoders.pretrained import NetworkSize
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.encoders.text_encoder import text_encoder_entry
from millrace.engine.util.errors import UserError


class Load(NamedTuple):
    """A frozen network that a run loads."""

    role: str
    """text, autoencoder, teacher or perceptual."""
    kind: str
    bytes: float
    flops: float
    """For one image."""
    known: bool
    """Whether there is a shape to count by; else it counts as nothing."""
    assumed: str = ""
    """The folder or hub id whose own shape cannot be read, in place of which the published one counts."""


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

    @property
    def assumed(self) -> tuple[str, ...]:
        """Folders and hub ids that count as the published network of their kind."""
        return tuple(f"{load.kind} {load.assumed}" for load in self if load.assumed)


def frozen_networks(config: Config, image_tokens: int, text_tokens: int) -> Loaded:
    """Live ones; what has a complete cache in `data.cached` is neither loaded nor run."""
    conditioning, alignment, dino = config.conditioning, config.alignment, config.objective.dino
    text, autoencoder, teacher = conditioning.text, conditioning.autoencoder, alignment.teacher
    compute = getattr(torch, config.precision.compute)
    found: list[Load] = []
    encoder = text_encoder_entry(text.kind)
    # MDS shards lack the empty caption, so their tower is loaded all the same.
    cached = "text" in config.data.cached and "mds" not in config.data.named_sources.values()
    if encoder.source is not None and not cached:
        own = encoder.size, encoder.size_of, text.path or encoder.source
        found.append(_load("text", text, *own, text_tokens, compute))
    network = autoencoder_entry(autoencoder.kind).network
    if network is not None and "latents" not in config.data.cached:
        pixels = config.data.resolution**2
        own = network.size, lambda _: size_of(autoencoder), autoencoder.path
        found.append(_load("autoencoder", autoencoder, *own, pixels, arithmetic(autoencoder)))
    if alignment.active and teacher.cache is None:
        vision = vision_entry(teacher.kind)
        own = getattr(vision.large, "size", None), vision.size_of, teacher.path
        found.append(_load("teacher", teacher, *own, image_tokens, getattr(torch, teacher.dtype)))
    if dino.weight:
        vision = vision_entry(dino.kind)
        # Forward of both pictures, and backward to the predicted one.
        patches = 3 * (dino.size // vision.patch) ** 2
        own = getattr(vision.base, "size", None), vision.size_of, dino.path
        found.append(_load("perceptual", dino, *own, patches, getattr(torch, dino.dtype)))
    return Loaded(found)


def _own(size_of: Callable[[str], NetworkSize], source: str) -> NetworkSize | None:
    try:
        return size_of(source)
    except (OSError, ValueError, TypeError, UserError):  # what is wrong there is said by who opens it
        return None


class _Section(Protocol):
    kind: str
    path: str | None


def _load(
    role: str,
    section: _Section,
    published: NetworkSize | None,
    size_of: Callable[[str], NetworkSize] | None,
    source: str | None,
    units: float,
    dtype: torch.dtype,
) -> Load:
    """By its own shape where it is not the published network, or one whose size the entry does not have."""
    size, assumed = published, ""
    if size_of is not None and source is not None and (section.path is not None or published is None):
        own = _own(size_of, source)
        size, assumed = own or published, "" if own or published is None else source
    if size is None:
        return Load(role, section.kind, 0.0, 0.0, known=False)
    return Load(
        role, section.kind, float(size.parameters * dtype.itemsize), size.flops * units, True, assumed
    )
