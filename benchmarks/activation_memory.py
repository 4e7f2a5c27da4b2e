"""Peak memory of one step beyond what it starts with, as the allocator saw it.

On the CPU every allocation and release is read from PyTorch's profiler; on CUDA the caching allocator keeps
the peak itself. Parameters, inputs and the gradients' final tensors exist before; all else counts: kept
activations, temporaries inside operators, and gradients on their way.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

METHOD = "most bytes allocated at once during forward and backward, beyond parameters, inputs and gradients"


def peak_bytes(
    forward: Callable[[], Tensor], parameters: Sequence[nn.Parameter], device: torch.device
) -> int:
    """Bytes above the start of `forward`, with every gradient tensor already there; adds to the gradients."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().backward()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        forward().backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)
