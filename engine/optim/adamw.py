"""AdamW that can skip a step."""

from typing import Any

import torch

from millrace.engine.config import Model, Optimizer
from millrace.engine.optim.training_optimizer import (
    Named,
    OptimizerEntry,
    TrainingOptimizer,
    elementwise_groups,
)

ADAM_STATE = ("exp_avg", "exp_avg_sq")
"""Adam's moments."""
PASSES = 18
"""Of an update as a loop: lerp 3, mul 2, addcmul 3, sqrt 2, quotient 2, add 2, addcdiv 4."""
FUSED_PASSES = 7
"""In one kernel: reads weight, gradient and two moments, writes all but the gradient."""
TEMPORARIES = 2
"""Of the loop: sqrt(v), and its quotient."""


class SkippableAdamW(TrainingOptimizer, torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter, arXiv 1711.05101) that changes nothing while `skip` is set."""

    title = "AdamW"

    def state_names(self, _name: str) -> tuple[str, ...]:
        return ADAM_STATE

    def counts_updates(self, _name: str) -> bool:
        return True

    def step(self, closure: None = None) -> None:
        """Update the weights and moments, unless the step is skipped."""
        if self.skip:
            return
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_scale = None
        if self.gradient_scale != 1.0 and gradients:
            if self.defaults["fused"]:
                # torch's kernel divides by it while it updates; `full` fills without a copy from the host.
                self.grad_scale = torch.full((), 1 / self.gradient_scale, device=gradients[0].device)
            else:
                torch._foreach_mul_(gradients, self.gradient_scale)
        super().step(closure)


def adamw_settings(config: Optimizer, device: torch.device) -> dict[str, Any]:
    """Arguments of torch's AdamW: one fused kernel on CUDA, one loop over tensors elsewhere."""
    return {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": True if device.type == "cuda" else None,
    }


def _build(named: Named, config: Optimizer, device: torch.device, _model: Model | None) -> TrainingOptimizer:
    return SkippableAdamW(elementwise_groups(named, config), **adamw_settings(config, device))


def _state_bytes(named: Named, _config: Optimizer, _model: Model, stored: int) -> dict[str, float]:
    return {"Adam moments": 2.0 * stored * sum(p.numel() for _, p in named)}


ENTRY = OptimizerEntry(
    build=_build,
    state=ADAM_STATE,
    state_bytes=_state_bytes,
    passes=PASSES,
    fused_passes=FUSED_PASSES,
    temporaries=TEMPORARIES,
)
