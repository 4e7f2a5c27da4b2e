"""End of an optimizer step at any ZeRO stage: gradient clipping, skipped steps, and the host's one wait.

DeepSpeed 0.19 makes the host wait for the device several times in a step (throughput timer, overflow check,
norm, the end of an overlapped reduction), reads the gradients once more to clip them, and writes them once
more to average them. Here the average is part of the loss, the norm is read once, and the optimizer clips or
skips while it updates.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.engine.distributed.process_group import world_size
from millrace.engine.optim.training_optimizer import TrainingOptimizer

NORM_EPS = 1e-6
"""Added to the norm before the limit is divided by it, as `torch.nn.utils.clip_grad_norm_` does."""


class OptimizerStep:
    """Applies what micro-batches have accumulated.

    Args:
        engine: DeepSpeed's engine.
        zero: DeepSpeed's optimizer around `optimizer`; at stage 0 that is `optimizer` itself.
        optimizer: what updates the masters.
        model: that is trained.
        stage: ZeRO stage.
        clip: largest norm of the gradient, 0 for any.
    """

    def __init__(
        self,
        engine: Any,
        zero: Any,
        optimizer: TrainingOptimizer,
        model: nn.Module,
        stage: int,
        clip: float,
    ) -> None:
        self.engine, self.zero, self.optimizer, self.stage, self.clip = engine, zero, optimizer, stage, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.norm = 0.0
        """Of the gradient of the last step."""
        self.loss_factor = 1.0 if stage == 3 else 1 / world_size()
        """What the loss is multiplied by before the backward pass, so that sums over processes are means."""
        if stage == 0:
            engine.gradient_average = False
            engine.enable_backward_allreduce = world_size() > 1
        elif stage == 3:
            if (stream := zero.reduce_and_partition_stream) is not None:
                zero.reduce_and_partition_stream = _ReductionStream(
                    stream_id=stream.stream_id,
                    device_index=stream.device_index,
                    device_type=stream.device_type,
                )
            zero._get_norm_groups = lambda: [self._take_norm(self._partitions())]
            zero.unscale_and_clip_grads = lambda *_: None
        else:
            zero.gradient_average = False
            zero.scaled_global_norm = lambda *_: self._take_norm(self._partitions())
            if zero.overlap_comm:
                self._epilogue = zero.independent_gradient_partition_epilogue
                zero.independent_gradient_partition_epilogue = self._finish_reduction

    def apply(self) -> tuple[float, bool]:
        """Update the weights, unless the gradient is not finite: (its norm, whether applied). Collective."""
        if self.stage == 0:
            for parameter in self.parameters:
                if parameter.grad is None:  # as where its term of the loss has ended
                    parameter.grad = torch.zeros_like(parameter)
            self._take_norm([parameter.grad for parameter in self.parameters])
            # DeepSpeed has no say at stage 0, and would apply what is not finite.
            self.optimizer.skip = not math.isfinite(self.norm)
        self.engine.step()
        return self.norm, math.isfinite(self.norm)

    def _take_norm(self, gradients: list[Tensor]) -> float:
        """Norm of the whole gradient, given this process's part; tell the optimizer what to scale by.

        The only place of a step where the host waits for the device.
        """
        norm = torch.zeros((), device=self.parameters[0].device)
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.stage > 0 and world_size() > 1:
            norm = norm.square()
            dist.all_reduce(norm, group=self.zero.dp_process_group)
            norm = norm.sqrt()
        self.norm = float(norm)
        clipped = self.clip and self.norm > self.clip
        self.optimizer.gradient_scale = self.clip / (self.norm + NORM_EPS) if clipped else 1.0
        return self.norm

    def _partitions(self) -> list[Tensor]:
        """Averaged gradients of the elements whose masters this process has, without padding."""
        groups = self.zero.averaged_gradients
        return [
            gradient
            for i in sorted(groups)
            for gradient in groups[i]
            if gradient is not None and not getattr(gradient, "_zero_padding", False)
        ]

    def _finish_reduction(self) -> None:
        """DeepSpeed's epilogue of a backward pass; the device waits for the reductions, not the host."""
        zero = self.zero
        zero.reduce_ipg_grads()
        if zero.reduction_stream is not None:
            torch.cuda.current_stream().wait_stream(zero.reduction_stream)
        zero._clear_previous_reduced_grads()
        zero.overlap_comm = False
        try:
            self._epilogue()
        finally:
            zero.overlap_comm = True


class _ReductionStream(torch.cuda.Stream):
    """A stream for whose work the current stream waits where DeepSpeed would have the host wait."""

    def synchronize(self) -> None:
        torch.cuda.current_stream().wait_stream(self)
