"""How long a call takes on the device, without the host's share, and what the device can do at most.

On CUDA the calls of a batch wait behind a delay, so that the host has queued all of them before the first one
starts: the events around a call then enclose its kernels and the gaps between them, not Python. A batch that
starts before it is queued is repeated behind a longer delay; if that does not help either, the call waits for
the device itself, and its times are marked. Before every call the L2 cache is filled with something else, by
reading: after writing, the call would be charged for storing it. Contestants take turns within one run, every
second round in reverse order, so that a device that changes its clock does so for all of them.
"""

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20
"""Several times the L2 of any GPU that this runs on."""
ATTEMPTS = 3
LONGEST_DELAY = 0.2
CALLS = 4
"""Calls in a batch."""

Call = Callable[[], object]


@dataclass
class Samples:
    """Seconds of single calls."""

    seconds: list[float] = field(default_factory=list)
    host_gaps: bool = False
    """Whether the device waited for the host in some of them, so that they are too long."""

    def percentiles(self) -> tuple[float, float, float]:
        """20th, 50th and 80th percentile, seconds."""
        return tuple(np.percentile(self.seconds, (20, 50, 80)).tolist())


@dataclass
class WarmCall:
    """A call that has run: whatever it compiles or allocates is there."""

    call: Call
    delay: float = 0.0
    """Seconds that the device must wait so that the host can queue a batch."""


class CudaTimer:
    """Times calls on the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        self.cycles_per_second = cycles / self._batch(lambda: torch.cuda._sleep(cycles), 0, 1)[0][0]

    def warm_up(self, call: Call) -> WarmCall:
        """Call until compiled and allocated, then note how long the host takes to queue a batch."""
        for _ in range(2):
            call()
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        delay = 1.5 * (time.perf_counter() - started) + 5e-4
        torch.cuda.synchronize(self.device)
        return WarmCall(call, min(delay, LONGEST_DELAY))

    def measure(self, warm: WarmCall, into: Samples) -> None:
        """Add one batch of CALLS calls."""
        for _ in range(ATTEMPTS):
            seconds, queued_in_time = self._batch(warm.call, warm.delay, CALLS)
            if queued_in_time:
                break
            warm.delay = min(2 * warm.delay, LONGEST_DELAY)
        into.seconds += seconds
        into.host_gaps |= not queued_in_time

    def _batch(self, call: Call, delay: float, calls: int) -> tuple[list[float], bool]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize(self.device)
        if delay:
            torch.cuda._sleep(int(delay * self.cycles_per_second))
        for start, end in pairs:
            self.flush.amax()
            start.record()
            call()
            end.record()
        queued_in_time = not pairs[0][0].query()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs], queued_in_time


class CpuTimer:
    """Times calls on the CPU by the wall clock; to try the programs, not to compare anything."""

    def warm_up(self, call: Call) -> WarmCall:
        """One call."""
        call()
        return WarmCall(call)

    def measure(self, warm: WarmCall, into: Samples) -> None:
        """Add CALLS calls."""
        for _ in range(CALLS):
            started = time.perf_counter()
            warm.call()
            into.seconds.append(time.perf_counter() - started)


def timer_for(device: torch.device) -> CudaTimer | CpuTimer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(
    timer: CudaTimer | CpuTimer, calls: Mapping[Hashable, WarmCall], rounds: int
) -> dict[Hashable, Samples]:
    """`rounds` batches of every call, in turns."""
    samples = {name: Samples() for name in calls}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
                timer.measure(calls[name], samples[name])
    finally:
        gc.enable()
    return samples


def ceilings(timer: CudaTimer | CpuTimer, device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """What the device reaches in a large copy (bytes read plus written) and a large random product.

    Returns:
        copy_bytes_per_second, gemm_flops_per_second, and how they were measured.
    """
    on_gpu = device.type == "cuda"
    copied, edge = (2**32, 8192) if on_gpu else (2**24, 256)
    source, target = (torch.empty(copied, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_(0, 256)
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(left, right, out=product)}
    measured = interleave(timer, {name: timer.warm_up(call) for name, call in calls.items()}, rounds=10)
    medians = {name: samples.percentiles()[1] for name, samples in measured.items()}
    return {
        "copy_bytes_per_second": 2 * copied / medians["copy"],
        "copy_bytes": copied,
        "gemm_flops_per_second": 2 * edge**3 / medians["gemm"],
        "gemm_edge": edge,
        "gemm_dtype": str(dtype).removeprefix("torch."),
    }
