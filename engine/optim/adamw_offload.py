"""AdamW on the host: its moments take no memory of the device (ZeRO-Offload, arXiv 2101.06840).

    device   weight, gradient ──▶ buffers ──▶ host: torch's AdamW, with the moments
             weight          ◀── buffer  ◀──

At ZeRO stages 1 to 3 each process does this with the shard that it has. A part of a master is on its way to
the host while the part before it is updated. Only the two pairs of buffers are page-locked; the moments never
travel. DeepSpeed's own offload needs its compiled Adam, and keeps FP32 masters beside our FP32 weights.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from millrace.engine.config import Model, Optimizer
from millrace.engine.optim.adamw import ADAM_STATE, PASSES
from millrace.engine.optim.training_optimizer import (
    Named,
    OptimizerEntry,
    TrainingOptimizer,
    elementwise_groups,
)

PART = 2**24
"""Elements that are updated at once: 64 MB of each buffer."""


class _Part(NamedTuple):
    """A range of a master's elements that is updated at once."""

    master: Tensor
    weight: Tensor
    """On the device, as the gradient."""
    gradient: Tensor
    moments: list[Tensor]
    """On the host."""
    group: dict[str, Any]


class _Buffers:
    """Host memory through which a part passes, and when it is free or filled."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.elements, self.on_gpu = elements, device.type == "cuda"
        self._memory = torch.empty(2, elements, pin_memory=self.on_gpu)
        if self.on_gpu:
            self._filled, self._emptied = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, part: _Part, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy a part's weights and gradients here."""
        with torch.cuda.stream(stream):  # nothing without a stream
            if stream is not None:
                stream.wait_event(self._emptied)
            for held, tensor in zip(self.of(part), (part.weight, part.gradient), strict=True):
                held.copy_(tensor, non_blocking=True)
            if stream is not None:
                self._filled.record(stream)

    def of(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Weights and gradients of the part that is here."""
        weight, gradient = self._memory[:, : part.weight.numel()]
        return weight, gradient

    def wait(self) -> None:
        """Until all is here."""
        if self.on_gpu:
            self._filled.synchronize()

    def empty(self, part: _Part, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy the weights back."""
        with torch.cuda.stream(stream):
            part.weight.copy_(self.of(part)[0], non_blocking=True)
            if stream is not None:
                self._emptied.record(stream)


class OffloadedAdamW(TrainingOptimizer):
    """AdamW (arXiv 1711.05101) whose moments and update are the host's; `fused` as torch's AdamW has it."""

    title = "AdamW on the host"
    storage = "as the masters, in the memory of the host"

    def __init__(self, groups: list[dict[str, Any]], fused: bool, **settings: object) -> None:
        super().__init__(groups, settings)
        self.fused = fused
        self._buffers: list[_Buffers] = []
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def state_names(self, _name: str) -> tuple[str, ...]:
        return ADAM_STATE

    def counts_updates(self, _name: str) -> bool:
        return True

    def zeros_like(self, master: Tensor) -> Tensor:
        return torch.zeros_like(master, device="cpu")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights and moments, unless the step is skipped. The host waits for the gradients."""
        if self.skip:
            return
        parts = list(self._parts())
        if not parts:
            return
        device = parts[0].weight.device
        there, back = self._ways(device)
        longest = max(part.weight.numel() for part in parts)
        if not self._buffers or self._buffers[0].elements < longest:  # DeepSpeed steps a group at a time
            self._buffers = [_Buffers(longest, device) for _ in range(2)]
        if there is not None:
            there.wait_stream(torch.cuda.current_stream())
        self._buffers[0].fill(parts[0], there)
        for i, part in enumerate(parts):
            here, other = self._buffers[i % 2], self._buffers[(i + 1) % 2]
            if i + 1 < len(parts):
                other.fill(parts[i + 1], there)
            here.wait()
            self._update(part, *here.of(part))
            here.empty(part, back)
        if back is not None:
            torch.cuda.current_stream().wait_stream(back)
        for master in dict.fromkeys(part.master for part in parts):
            self.state[master]["step"] += 1

    def _parts(self) -> Iterator[_Part]:
        for group in self.param_groups:
            masters = [master for master in group["params"] if master.grad is not None]
            if masters and self.gradient_scale != 1.0:
                torch._foreach_mul_([master.grad for master in masters], self.gradient_scale)
            for master in masters:
                if not self.state[master]:
                    self.begin(master, "")
                flat = [master.detach().view(-1), master.grad.reshape(-1)]
                flat += [self.state[master][kind].view(-1) for kind in ADAM_STATE]
                for pieces in zip(*(tensor.split(PART) for tensor in flat), strict=True):
                    weight, gradient, *moments = pieces
                    yield _Part(master, weight, gradient, moments, group)

    def _ways(self, device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
        """Streams to the host and back; a CPU has none."""
        if device.type != "cuda":
            return None, None
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams

    def _update(self, part: _Part, weight: Tensor, gradient: Tensor) -> None:
        group = part.group
        adamw(
            [weight],
            [gradient],
            *([moment] for moment in part.moments),
            [],
            [self.state[part.master]["step"].clone()],  # of the whole master; `adamw` adds 1 to it
            foreach=False,
            fused=self.fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _build(named: Named, config: Optimizer, device: torch.device, _model: Model | None) -> TrainingOptimizer:
    # One kernel where a GPU waits; on a CPU the loop that `adamw` is there, whose bits it has.
    return OffloadedAdamW(
        elementwise_groups(named, config), device.type == "cuda", betas=config.betas, eps=config.eps
    )


def _state_bytes(_named: Named, _config: Optimizer, _model: Model, _stored: int) -> dict[str, float]:
    return {}


def _host_bytes(named: Named) -> float:
    return 2.0 * 4 * sum(p.numel() for _, p in named)


ENTRY = OptimizerEntry(
    build=_build, state=ADAM_STATE, state_bytes=_state_bytes, host_bytes=_host_bytes, passes=PASSES
)
