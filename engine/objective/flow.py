"""Flow matching as PRX trains it: the distribution of times, the noise, and the loss."""

import math

import torch
from torch import Tensor

from millrace.engine.config import Objective
from millrace.engine.model.packing import Layout
from millrace.kernels import add_noise, flow_loss
from millrace.kernels.random import sample_keys, uniform


def shift_time(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): moves times towards noise for s > 1 (Esser et al., arXiv 2403.03206, 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


class FlowMatching:
    """Noise, time and loss of packed batches; every draw is a function of (seed, sample index).

    t = 0 is data and t = 1 noise: x_t = (1 - t) x0 + t n, v = n - x0.
    """

    def __init__(self, config: Objective, seed: int) -> None:
        self.config, self.seed = config, seed
        # PRX redraws times below the floor. Drawing from the normal cut off at the same place by its inverse
        # distribution function gives the same law without a data-dependent number of draws.
        unshifted = config.time_floor / (config.time_shift - (config.time_shift - 1) * config.time_floor)
        cut = torch.tensor(math.log(unshifted / (1 - unshifted)), dtype=torch.float64)
        self._tail = float(torch.special.ndtr(cut))

    def time(self, sample_index: Tensor) -> Tensor:
        """Times (B,) FP32: a shifted sigmoid of a normal, at least `time_floor`; a share is uniform."""
        draws = uniform(sample_keys(self.seed, sample_index, "time"), 3).double()
        place = torch.special.ndtri(self._tail + (1 - self._tail) * draws[:, 0])
        t = shift_time(torch.sigmoid(place), self.config.time_shift)
        floor = self.config.time_floor
        t = torch.where(draws[:, 1] < self.config.time_uniform, floor + (1 - floor) * draws[:, 2], t)
        return t.clamp_min(floor).float()

    def noisy(self, clean: Tensor, sample_index: Tensor, t: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """x_t (T, P) of each sample at its time (B,), and the noise (T, P) FP32 that is in it."""
        return add_noise(
            clean,
            sample_keys(self.seed, sample_index, "noise"),
            t,
            layout.cu_seqlens,
            layout.max_seqlen,
            noise_scale=self.config.noise_scale,
            return_noise=True,
        )

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor, layout: Layout) -> Tensor:
        """Loss of each sample (B,) FP32. Their mean is the training loss.

        The mean over samples, not over elements, so that a batch of mixed sizes weighs the same however
        it is cut into micro-batches and processes; for uniform sizes the two are the same.
        """
        _, per_sample = flow_loss(
            prediction,
            clean,
            noise,
            t,
            layout.cu_seqlens,
            contrastive_weight=self.config.contrastive_weight,
            prediction_type=self.config.prediction,
            t_min=self.config.t_min,
            max_seqlen=layout.max_seqlen,
        )
        return per_sample

    def velocity(self, prediction: Tensor, noisy: Tensor, t: float) -> Tensor:
        """What the sampler integrates: the network's output as v at the common time t of the batch."""
        if self.config.prediction == "velocity":
            return prediction
        return (noisy - prediction) / max(t, self.config.t_min)
