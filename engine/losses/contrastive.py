"""Contrastive flow matching (Stoica et al., arXiv 2506.05350): its negatives, and its correction in sampling.

    loss = |v(x_t, c) - u|^2 - w |v(x_t, c) - u'|^2          u target of the sample, u' of another one, w < 1

For a given (x_t, c) the other sample is independent, so only the mean m = E u' of all targets matters, and
where u has the conditional mean u_c the minimum is at

    v = (u_c - w m) / (1 - w)        hence        u_c = (1 - w) v + w m

Noise has mean zero: m is minus the mean of the clean latents. The authors store that mean latent (their
interference vector) and write 0.95 v - 0.05 mean. In x-prediction targets below t_min are scaled down by
t / t_min; m leaves that out, as their formula does.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.model.layout import Grid, patchify
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically
from millrace.engine.util.randomness import Purpose
from millrace.kernels.support.philox import sample_keys, uniform

_NAME = "mean_target"


def require_partners(config: Config) -> None:
    """Raise UserError where contrastive flow matching has no other sample to push away from."""
    if config.objective.contrastive_weight > 0 and config.data.micro_batch == 1:
        raise UserError(
            "objective.contrastive_weight pushes each sample away from another of its micro-batch, and "
            "data.micro_batch is 1, so it would do nothing; set data.micro_batch to 2 or more"
        )


def random_negatives(seed: int, sample_index: Tensor, eligible: Tensor | None = None) -> Tensor:
    """For each sample another one of its micro-batch (B,) int64, all with the same chance; -1 where none is.

    The draw belongs to the sample; whom it names depends on the micro-batch, as negatives always do.

    Args:
        seed: of the run.
        sample_index: (B,) int64.
        eligible: (B,) bool, samples that take part; the others get -1 and are nobody's negative.
    """
    draw = uniform(sample_keys(seed, sample_index, Purpose.NEGATIVE))[:, 0].double()
    if eligible is None:
        eligible = torch.ones_like(sample_index, dtype=torch.bool)
    # Those that take part stand in a circle; the draw says how many places on.
    others = eligible.sum() - 1
    place, order = eligible.cumsum(0) - 1, torch.argsort(~eligible, stable=True)
    step = 1 + torch.minimum((draw * others).long(), others - 1)
    found = order[(place + step) % (others + 1).clamp_min(1)]
    return torch.where(eligible & (others > 0), found, -1)


class MeanTarget:
    """The mean velocity target m of a data set.

    Args:
        values: (C, h, w) FP32 for pictures of one size in latent positions or pixels, or (C, 1, 1), the mean
            over positions too, for any size.
        count: pictures it was computed from.
        autoencoder: identity of the network that made the latents.
    """

    def __init__(self, values: Tensor, count: int, autoencoder: str = "") -> None:
        self.values, self.count, self.autoencoder = values, count, autoencoder

    def apply(self, velocity: Tensor, weight: float, grids: Sequence[Grid], patch: int) -> Tensor:
        """(1 - weight) v + weight m of packed velocities (T, P): what flow matching alone would have learned.

        It is for predictions that the contrastive term shaped: without captions only if `contrastive_empty`.
        Affine in v, so it commutes with guidance, whose weights add up to one.

        Raises UserError for a grid that a mean per position does not fit.
        """
        parts = {grid: self._tokens(grid, patch).to(velocity) for grid in set(grids)}
        mean = torch.cat([parts[grid] for grid in grids])
        return torch.lerp(velocity, mean, weight)

    def _tokens(self, grid: Grid, patch: int) -> Tensor:
        """m as patches (N, P) of a picture of `grid`."""
        channels, height, width = self.values.shape
        wanted = grid[0] * patch, grid[1] * patch
        if (height, width) != (1, 1) and (height, width) != wanted:
            raise UserError(
                f"the mean target is of latents of {height} x {width}, these have {wanted[0]} x {wanted[1]}; "
                "compute it for this size, or per channel"
            )
        return patchify(self.values.expand(channels, *wanted), patch)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file. Raises UserError if it cannot be written."""
        path = Path(path)
        about = {"count": str(self.count), "autoencoder": self.autoencoder}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({_NAME: self.values.detach().to("cpu").contiguous()}, about))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {_reason(error)}") from None

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> "MeanTarget":
        """Read a file of `save`. Raises UserError if it is none."""
        try:
            with safe_open(path, "pt", str(device)) as file:
                values, about = file.get_tensor(_NAME), file.metadata() or {}
            if values.ndim != 3:
                raise ValueError(f"{_NAME} has shape {tuple(values.shape)}, expected (channels, h, w)")
            return cls(values.float(), int(about.get("count", 0)), about.get("autoencoder", ""))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"cannot load the mean target {str(path)!r}: {_reason(error)}; make one with "
                "millrace sample --compute-mean-target FILE"
            ) from None


def _shape(values: Tensor) -> str:
    return " x ".join(map(str, values.shape))


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error)).strip(" .:")


def mean_target(
    latents: Iterable[Tensor], per: Literal["position", "channel"] = "position", autoencoder: str = ""
) -> MeanTarget:
    """Mean of the velocity target over a data set: minus the mean of its latents, since noise has mean zero.

    Args:
        latents: batches (B, C, h, w) of what the denoiser is trained on, each picture once.
        per: a mean for each channel and position, which needs one size; or for each channel, where every
            picture counts the same whatever its size.
        autoencoder: identity of the network that made them.

    Raises UserError for no latents, or for several sizes per position.
    """
    total, count = None, 0
    for batch in latents:
        part = batch.double()
        part = part.sum(0) if per == "position" else part.mean((2, 3), keepdim=True).sum(0)
        if total is not None and part.shape != total.shape:
            raise UserError(
                f"latents of {_shape(part)} and {_shape(total)} (channels x height x width) have no mean per "
                "position; set data.aspect to square, or compute it per channel"
            )
        total, count = part if total is None else total + part, count + len(batch)
    if total is None or not count:
        raise UserError("the mean target needs at least one picture")
    return MeanTarget((-total / count).float(), count, autoencoder)
