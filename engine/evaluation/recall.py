"""Recall: the nearest training picture of a generated one; does a caption bring back its own picture?"""

import torch
from torch import Tensor


def nearest_picture(generated: Tensor, references: Tensor) -> Tensor:
    """Index (M,) of the reference (N, 3, h, w) with the least mean squared difference of pixels to each
    generated picture (M, 3, h, w)."""
    return torch.cdist(generated.flatten(1).double(), references.flatten(1).double()).argmin(1)


def recall(generated: Tensor, references: Tensor, own: Tensor) -> float:
    """Share of generated pictures whose nearest reference is `own` (M,), the one their caption describes."""
    return (nearest_picture(generated, references) == own.to(generated.device)).double().mean().item()
