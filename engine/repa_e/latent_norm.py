"""Batch normalisation of the latents of an autoencoder that learns, without affine parameters.

    training      (z - mean) / sqrt(variance + eps)     mean and variance over the global batch, of each
    channel evaluation    the same with their running averages update        running += momentum * (batch's -
    running), with the unbiased variance

As `torch.nn.BatchNorm2d(C, eps, momentum, affine=False)` (Ioffe & Szegedy, arXiv 1502.03167), which REPA-E
(arXiv 2504.10483) puts in front of its denoiser. It works on packed patches, so pictures of any sizes count
by their positions, and on the sums of each sample, so that what a batch gives does not depend on how it is
cut into micro-batches and processes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Of the latents of a batch, channel by channel."""

    mean: Tensor
    """(C,) FP64."""
    variance: Tensor
    """(C,) FP64, of the batch itself (biased)."""
    count: Tensor
    """() FP64, positions."""


class LatentNorm:
    """The running statistics of C channels, and what follows from them.

    Args:
        channels: C.
        patch: edge of a token in latent positions; a token's features are (channel, row, column).
        momentum: share of a batch in the running statistics.
        eps: added to the variance.
    """

    def __init__(self, channels: int, patch: int, momentum: float, eps: float, device: torch.device) -> None:
        self.patch, self.momentum, self.eps = patch, momentum, eps
        self.mean = torch.zeros(channels, device=device)
        self.variance = torch.ones(channels, device=device)

    @property
    def scale(self) -> Tensor:
        """(C, 1, 1) FP32: normalised latents are scale * (z - shift)."""
        return (self.variance + self.eps).rsqrt()[:, None, None]

    @property
    def shift(self) -> Tensor:
        """(C, 1, 1) FP32."""
        return self.mean[:, None, None]

    def evaluate(self, patches: Tensor) -> Tensor:
        """Patches (T, P) of raw latents under the running statistics, (T, P); differentiable."""
        return self._normalise(patches, self.mean, self.variance)

    def normalise(self, patches: Tensor, statistics: Statistics) -> Tensor:
        """Patches (T, P) of raw latents under a batch's statistics, (T, P)."""
        return self._normalise(patches, statistics.mean, statistics.variance).to(patches.dtype)

    def _normalise(self, patches: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        mean, deviation = (x.repeat_interleave(self.patch**2) for x in (mean, (variance + self.eps).sqrt()))
        return (patches - mean) / deviation

    @staticmethod
    def sums(latents: Tensor) -> Tensor:
        """(B, 2C + 1) FP64 of raw latents (B, C, h, w): sums of each sample's, of their squares, and how many
        positions it has."""
        values = latents.detach().double().flatten(2)
        counts = values.new_full((len(values), 1), values.shape[2])
        return torch.cat([values.sum(2), values.square().sum(2), counts], dim=1)

    @staticmethod
    def statistics(sums: Tensor) -> Statistics:
        """Statistics of a batch from the `sums` (B, 2C + 1) of all its samples."""
        total = sums.sum(0)
        mean, square = (total[:-1] / total[-1]).chunk(2)
        return Statistics(mean, (square - mean.square()).clamp_min(0), total[-1])

    @torch.no_grad()
    def update(self, statistics: Statistics, momentum: float | None = None) -> None:
        """Move the running statistics towards a batch's; momentum 1 puts the batch's in their place."""
        momentum = self.momentum if momentum is None else momentum
        mean, variance, count = statistics
        unbiased = variance * count / (count - 1)
        for running, found in ((self.mean, mean), (self.variance, unbiased)):
            running.lerp_(found.to(running.dtype), momentum)
