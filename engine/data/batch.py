"""What one process trains on in one forward pass."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples on the CPU; in `mixed` aspect their sizes differ."""

    images: list[Tensor]
    """B tensors (3, h, w) float32 in [-1, 1]; h and w are multiples of the patch in pixels."""
    captions: list[str]
    """The caption chosen for each sample; "" where it was dropped."""
    keys: list[str]
    """Name of each sample for people: "builtin/astronaut", or the path relative to the data folder."""
    sample_index: Tensor
    """(B,) int64: global index of each sample in the training stream, the root of all its randomness."""
