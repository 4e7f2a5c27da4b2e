"""Flow matching as PRX and JiT train it: timestep sampling, the noise path, and the loss."""

import torch
from torch import Tensor

from millrace.engine.config import Objective
from millrace.engine.losses.contrastive import random_negatives
from millrace.engine.model.layout import Grid, Layout
from millrace.engine.util.randomness import Purpose
from millrace.kernels import add_noise, flow_loss
from millrace.kernels.support.packed import rows_from_samples, to_device
from millrace.kernels.support.philox import sample_keys, uniform

_REFERENCE_EDGE = 256
"""Pixels of a picture's edge at which JiT's noise has standard deviation 1."""


def shift_time(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): moves times towards noise for s > 1 (Esser et al., arXiv 2403.03206, 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


class FlowMatching:
    """Noise, time and loss of packed batches; every draw is a function of (seed, sample index).

    t = 0 is data and t = 1 noise: x_t = (1 - t) x0 + t n, v = n - x0.

    Args:
        config: the objective.
        seed: of the run.
        edge: pixels of a token's edge, for a noise scale that follows the resolution.
    """

    def __init__(self, config: Objective, seed: int, edge: int | None = None) -> None:
        if config.noise_scale == "resolution" and edge is None:
            raise ValueError("noise_scale is 'resolution', which needs the edge of a token in pixels")
        self.config, self.seed, self.edge = config, seed, edge
        # PRX redraws times below the floor. Drawing from the normal cut off at the same place by its inverse
        # distribution function gives the same law without a data-dependent number of draws.
        self._tail = float(torch.special.ndtr(torch.tensor(config.cut, dtype=torch.float64)))

    def time(self, sample_index: Tensor) -> Tensor:
        """Times (B,) FP32: a shifted sigmoid of a normal, at least `time_floor`; a share is uniform.

        JiT (arXiv 2511.13720) has t = 1 at the data and draws sigmoid(N(-0.8, 0.8^2)). Here that is
        1 - sigmoid(z) = sigmoid(-z), hence sigmoid(N(0.8, 0.8^2)).
        """
        config = self.config
        draws = uniform(sample_keys(self.seed, sample_index, Purpose.TIME), 3).double()
        place = torch.special.ndtri(self._tail + (1 - self._tail) * draws[:, 0])
        t = shift_time(torch.sigmoid(config.time_mean + config.time_std * place), config.time_shift)
        floor = config.time_floor
        t = torch.where(draws[:, 1] < config.time_uniform, floor + (1 - floor) * draws[:, 2], t)
        return t.clamp_min(floor).float()

    def noise_scale(self, grid: Grid) -> float:
        """Standard deviation of the noise in a picture of `grid` tokens."""
        scale = self.config.noise_scale
        if scale == "resolution":
            return (grid[0] * grid[1]) ** 0.5 * self.edge / _REFERENCE_EDGE
        return scale

    def noisy(self, clean: Tensor, sample_index: Tensor, t: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """x_t (T, P) of each sample at its time (B,), and the noise (T, P) FP32 that is in it."""
        keys = sample_keys(self.seed, sample_index, Purpose.NOISE)
        where = layout.cu_seqlens, layout.max_seqlen
        scales = [self.noise_scale(grid) for grid in layout.grids]
        if len(set(scales)) == 1:
            return add_noise(clean, keys, t, *where, noise_scale=scales[0], return_noise=True)
        # Only pictures of unequal area, under the resolution rule: two more passes over the data.
        _, noise = add_noise(clean, keys, t, *where, return_noise=True)
        scale = to_device(torch.tensor(scales), clean.device)
        noise = noise * rows_from_samples(scale, layout.cu_seqlens, len(clean), layout.max_seqlen)[:, None]
        return add_noise(clean, noise, t, *where), noise

    def loss(
        self,
        prediction: Tensor,
        clean: Tensor,
        noise: Tensor,
        t: Tensor,
        layout: Layout,
        unconditional: Tensor | None = None,
        sample_index: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample (B,) FP32. Their mean is the training loss.

        The mean over samples, not over elements, so that a batch of mixed sizes weighs the same however
        it is cut into micro-batches and processes; for uniform sizes the two are the same.

        Args:
            prediction, clean, noise: (T, P).
            t: (B,).
            layout: of the batch.
            unconditional: (B,) bool, samples without their caption; for `contrastive_empty` false.
            sample_index: (B,) int64; for `contrastive_negatives` random.
        """
        config = self.config
        negative = eligible = None
        if config.contrastive_weight and not config.contrastive_empty:
            if unconditional is None:
                raise ValueError("contrastive_empty is false, which needs to know the unconditional samples")
            eligible = ~unconditional
        if config.contrastive_weight and config.contrastive_negatives == "random":
            if sample_index is None:
                raise ValueError("contrastive_negatives is random, which needs the samples' indices")
            negative, eligible = random_negatives(self.seed, sample_index, eligible), None
        _, per_sample = flow_loss(
            prediction,
            clean,
            noise,
            t,
            layout.cu_seqlens,
            contrastive_weight=config.contrastive_weight,
            negative=negative,
            prediction_type=config.prediction,
            t_min=config.t_min,
            max_seqlen=layout.max_seqlen,
            eligible=eligible,
        )
        return per_sample

    def velocity(self, prediction: Tensor, noisy: Tensor, t: float) -> Tensor:
        """What the sampler integrates: the network's output as v at the common time t of the batch."""
        if self.config.prediction == "velocity":
            return prediction
        return (noisy - prediction) / max(t, self.config.t_min)
