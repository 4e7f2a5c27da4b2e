"""AdamW over all parameters, able to sit out a step."""

from collections.abc import Iterable

import torch
from torch import nn

from millrace.engine.config import Optimizer


class SkippableAdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter, arXiv 1711.05101) that changes nothing while `skip` is set.

    At ZeRO stage 0 DeepSpeed applies gradients that are not finite; the trainer sets `skip` instead.
    """

    skip = False

    def step(self, closure: None = None) -> None:
        """Update the weights and moments, unless the step is skipped."""
        if not self.skip:
            super().step(closure)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: Optimizer, device: torch.device
) -> SkippableAdamW:
    """AdamW in one fused kernel on CUDA, one loop over tensors elsewhere. The trainer sets `lr` each step."""
    return SkippableAdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True if device.type == "cuda" else None,
    )
