"""AdamW that can skip a step."""

import torch

from millrace.engine.distributed.zero_shards import Shard

ADAM_STATE = ("exp_avg", "exp_avg_sq")
"""Adam's moments."""


class SkippableAdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter, arXiv 1711.05101) that changes nothing while `skip` is set.

    At ZeRO stage 0 DeepSpeed applies gradients that are not finite; the trainer sets `skip` instead.
    """

    skip = False

    def state_names(self, _name: str) -> tuple[str, ...]:
        """What is stored for the elements of a parameter."""
        return ADAM_STATE

    def attach(self, shards: list[Shard], stage: int) -> None:
        """Learn where the shards of this rank are; AdamW is element-wise and need not know. Collective."""

    def step(self, closure: None = None) -> None:
        """Update the weights and moments, unless the step is skipped."""
        if not self.skip:
            super().step(closure)
