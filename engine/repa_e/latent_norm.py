"""Batch normalisation without affine parameters between an autoencoder that learns and the denoiser.

    training      (z - mean) / sqrt(variance + eps)     mean and variance over the global batch, of each
    channel evaluation    the same with their running averages update        running += momentum * (batch's -
    running), with the unbiased variance

As `torch.nn.BatchNorm2d(C, eps, momentum, affine=False)` (Ioffe & Szegedy, arXiv 1502.03167), which REPA-E
(arXiv 2504.10483) puts in front of its denoiser. It works on packed patches, so pictures of any sizes count
by their positions, and on the sums of each sample, so that what a batch gives does not depend on how it is
cut into micro-batches and processes.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from millrace.engine.encoders.pretrained import load
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

STATISTICS_FILE = "latent_statistics.safetensors"
"""Beside the weights of a tuned autoencoder: `scale` and `shift` (C,) FP32."""


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


def save_statistics(folder: Path, scale: Tensor, shift: Tensor) -> None:
    """Write how the denoiser of an autoencoder normalises its latents, scale * (z - shift), each (C, 1,
    1)."""
    tensors = {"scale": scale, "shift": shift}
    content = save({name: x.flatten().cpu().contiguous() for name, x in tensors.items()})
    write_atomically(folder / STATISTICS_FILE, content)


def load_statistics(
    folder: Path, channels: int, device: torch.device, key: str
) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), each (C, 1, 1) FP32, that `save_statistics` wrote in a folder; None if it has none.

    Raises UserError, naming setting `key`, if they cannot be read or are not of `channels` channels.
    """
    path = folder / STATISTICS_FILE
    if not path.is_file():
        return None
    found = load(load_file, str(path), key)
    if {name: tuple(x.shape) for name, x in found.items()} != dict.fromkeys(("scale", "shift"), (channels,)):
        raise UserError(
            f"{path}: not the statistics of {channels} channels; export the autoencoder again, see {key}"
        )
    scale, shift = (found[name].float().to(device)[:, None, None] for name in ("scale", "shift"))
    return scale, shift
