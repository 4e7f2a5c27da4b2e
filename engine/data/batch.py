"""Batch: what collate makes of the samples of one micro-batch, and the range of its pixels."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from millrace.engine.data.captions import WhichCaption
from millrace.engine.data.latent_cache import CachedText


@dataclass(frozen=True)
class Batch:
    """B samples; in `mixed` aspect their sizes differ."""

    images: list[Tensor | None]
    """B tensors (3, h, w) uint8, on the CPU unless a GPU decoded them; h and w are multiples of the patch in
    pixels. Bytes are what is pinned and copied to the device; `signed_unit` makes of them what networks take.
    None for a sample whose posterior is cached: its picture is not decoded."""
    captions: list[str]
    """The caption chosen for each sample; "" where it was dropped."""
    keys: list[str]
    """Name of each sample for people: "builtin/astronaut", or the path relative to the data folder; in a
    mixture after the name of its part and a slash."""
    sample_index: Tensor
    """(B,) int64: global index of each sample in the training stream, the root of all its randomness."""
    which: list[WhichCaption] = field(default_factory=list)
    """Which caption of its picture each is."""
    text: list[CachedText | None] = field(default_factory=list)
    """Rows of each sample's caption where they are cached; empty if no sample's are."""
    posteriors: list[Tensor | None] = field(default_factory=list)
    """What the autoencoder made of each sample's picture where that is cached, (2, C, h, w) mean and log-
    variance, or (1, C, h, w) of an autoencoder without a posterior; empty if no sample's is."""

    @property
    def dropped(self) -> Tensor:
        """(B,) bool: whose caption was dropped. No source has empty captions of its own."""
        return torch.tensor([not caption for caption in self.captions], dtype=torch.bool)


def signed_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as FP32 in [-1, 1], on their device: 0 is -1, 255 is 1."""
    # Divided by a tensor: by a number, CUDA would multiply with its reciprocal and round differently.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.float().div_(half).sub_(1)
