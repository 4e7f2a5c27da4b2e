"""A module that every rank holds whole and trains with an AdamW of its own, beside what DeepSpeed shards."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.engine.distributed.process_group import world_size
from millrace.engine.optim.adamw import ADAM_STATE


class Replicated:
    """FP32 parameters, one flat gradient for all of them, and Adam's moments; equal on all ranks.

    backward adds to the gradient; `reduce` averages it over ranks, `apply` takes the step and clears it.

    Args:
        module: whose parameters are trained; all of them are, and get their gradient here.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.to(device, torch.float32).requires_grad_(True)
        self.named = dict(self.module.named_parameters())
        self.flat = torch.zeros(sum(p.numel() for p in self.named.values()), device=device)
        start = 0
        for parameter in self.named.values():
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.named.values(), betas=self.BETAS, eps=self.EPS, weight_decay=0.0, fused=fused or None
        )
        for parameter in self.named.values():
            # Made now and not in the first step, so that a checkpoint has a place to go.
            count = torch.zeros((), device=device if fused else "cpu")
            moments = {name: torch.zeros_like(parameter) for name in ADAM_STATE}
            self.optimizer.state[parameter] = {"step": count, **moments}

    def reduce(self) -> Tensor:
        """Average the gradient over ranks; its norm () FP32, on the device. Collective."""
        if world_size() > 1:
            dist.all_reduce(self.flat)
            self.flat /= world_size()
        return torch.linalg.vector_norm(self.flat)

    def apply(self, lr: float, clip: float, norm: Tensor) -> None:
        """One step with the gradient scaled down to norm `clip` where it is longer (0: as it is)."""
        if clip:
            self.flat *= (clip / (norm + 1e-6)).clamp_max(1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradient."""
        self.flat.zero_()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that the next step depends on, by name: weights, moments, count of steps."""
        for name, parameter in self.named.items():
            state = self.optimizer.state[parameter]
            yield f"master/{name}", parameter.detach()
            for moment in ADAM_STATE:
                yield f"{moment}/{name}", state[moment]
        yield "updates", self.optimizer.state[next(iter(self.named.values()))]["step"]

    def share_updates(self) -> None:
        """After a load into what `state` names: the count of steps is that of the first parameter for all."""
        first, *others = (self.optimizer.state[parameter]["step"] for parameter in self.named.values())
        for count in others:
            count.copy_(first)
