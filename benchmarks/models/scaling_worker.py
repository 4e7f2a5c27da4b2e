"""One process of `scaling` or `weights`: measures its machine, or training steps at one ZeRO stage.

python -m millrace.benchmarks.models.scaling_worker JOBS RESULT     with the variables of a launcher

JOBS is a JSON file of jobs, done one after another; RESULT receives what this rank saw of each, as JSON.
"""

import bisect
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from millrace.engine.cli import run_command
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed import process_group

COLLECTIVES = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "reduce_scatter_tensor": 1,
    "_reduce_scatter_base": 1,
    "all_gather_into_tensor": 0,
    "_all_gather_base": 0,
    "all_gather": 0,
    "reduce_scatter": 0,
}
"""Functions of torch.distributed, and which argument holds the whole tensor of the operation."""
MARK = "millrace step"
WEIGHT = 1 << 14
"""Elements from which a tensor of `weights`'s model is a weight."""
MEMORY_STEPS = 3
SMALL = 4096
"""Bytes below which an operation is an agreement (a norm, a flag) and no part of the model's state."""


class Traffic:
    """Counts what goes through torch.distributed's collectives: operations and bytes of the whole tensor."""

    def __init__(self) -> None:
        self.calls: dict[str, list[int]] = defaultdict(list)
        self._depth = 0

    def watch(self) -> None:
        """From here on, also for functions that others hold on to later."""
        for name, place in COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counting(name, getattr(dist, name), place))

    def _counting(self, name: str, call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                whole = [*args, *kwargs.values()][place]
                tensors = [whole] if isinstance(whole, Tensor) else list(whole)
                self.calls[name.removeprefix("_")].append(sum(t.nbytes for t in tensors))
            self._depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1

        return counting

    def summary(self, steps: int) -> dict[str, dict[str, float]]:
        """For each kind the operations of a step and their bytes, without agreements."""
        found = {}
        for name, sizes in self.calls.items():
            large = [size for size in sizes if size > SMALL]
            if large:
                found[name] = {"calls": len(large) / steps, "bytes": sum(large) / steps}
        return found


TRAFFIC = Traffic()


@contextmanager
def allocations(device: torch.device) -> Iterator[dict[str, int]]:
    """Bytes that PyTorch's CPU allocator has handed out since the block began: {"between_steps", "peak"}.

    Steps are announced by `mark`; the peak is the least of the steps' peaks, because gloo's threads now and
    then let go of a tensor too late, when the next one is there already.
    """
    found: dict[str, int] = {}
    if device.type == "cuda":
        yield found
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    marks, heap, series = [], Heap(), []
    for event in _in_order(recorded.profiler.kineto_results.experimental_event_tree()):
        if event.name == MARK:
            marks.append(len(series))
        elif event.tag == _EventType.Allocation:
            heap.record(event.extra_fields.ptr, event.extra_fields.alloc_size)
            series.append(heap.held)
    peaks = [max(series[begin:end]) for begin, end in pairwise([*marks, len(series)])]
    found["between_steps"], found["peak"] = series[marks[0] - 1], min(peaks)


class Heap:
    """What an allocator holds, from its allocations and the releases that are known of.

    PyTorch's profiler does not see what other threads release, such as gloo's. A block that overlaps a new
    one must have been released, so it is.
    """

    def __init__(self) -> None:
        self.held = 0
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def record(self, address: int, size: int) -> None:
        """`size` bytes at `address` are handed out, or come back if it is negative."""
        if size < 0:
            self._release(address)
            return
        place = bisect.bisect_right(self._starts, address)
        if place and self._starts[place - 1] + self._sizes[self._starts[place - 1]] > address:
            self._release(self._starts[place - 1])
        while (place := bisect.bisect_left(self._starts, address)) < len(self._starts):
            if self._starts[place] >= address + max(size, 1):
                break
            self._release(self._starts[place])
        bisect.insort(self._starts, address)
        self._sizes[address] = size
        self.held += size

    def _release(self, address: int) -> None:
        size = self._sizes.pop(address, None)
        if size is not None:
            del self._starts[bisect.bisect_left(self._starts, address)]
            self.held -= size


def _in_order(tree: list[Any]) -> list[Any]:
    """All events of the profiler's tree by time."""
    waiting, found = list(tree), []
    while waiting:
        event = waiting.pop()
        found.append(event)
        waiting.extend(event.children)
    return sorted(found, key=lambda event: event.start_time_ns)


def mark() -> None:
    """A step begins."""
    with torch.profiler.record_function(MARK):
        pass


def measure_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Training steps at one stage: seconds and communication of each, and peak memory where asked."""
    from millrace.benchmarks.step.throughput_inputs import Cached

    config = parse_config(job["config"], "scaling")
    device = process_group.choose_device(config.run.device)
    before = job["warmup"] + MEMORY_STEPS * job["memory"]
    with allocations(device) if job["memory"] else nullcontext({}) as memory:
        trainer = Cached(config, job["text_tokens"])
        for _ in range(job["warmup"]):
            trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            memory["between_steps"] = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(MEMORY_STEPS * job["memory"]):
            mark()
            trainer.train_step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        memory["peak"] = torch.cuda.max_memory_allocated(device)
    TRAFFIC.calls.clear()
    seconds, processor = [], []
    gc.collect()
    gc.freeze()
    for _ in range(job["steps"]):
        process_group.wait_for_all()
        started, used = time.perf_counter(), time.process_time()
        trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    trainer.sample_log.close()
    trainer.stream.close()
    trainer.run_log.close()
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "memory": memory,
        "traffic": TRAFFIC.summary(job["steps"]),
        "flops": trainer.flops / (before + job["steps"]),
        "skipped": trainer.skipped,
    }


def count_weights(job: dict[str, Any]) -> dict[str, Any]:
    """What the weights of a training step cost, with the optimizer that CUDA has."""
    from millrace.benchmarks.models.weight_ledger import WeightLedger
    from millrace.benchmarks.step.throughput_inputs import Cached
    from millrace.engine.optim import adamw

    def fused(*arguments: Any) -> dict[str, Any]:
        return adamw_settings(*arguments) | {"fused": True}

    adamw_settings = adamw.adamw_settings
    with mock.patch.object(adamw, "adamw_settings", fused):
        trainer = Cached(parse_config(job["config"], "weights"), job["text_tokens"])
    for _ in range(2):
        trainer.train_step()
    with WeightLedger(trainer, WEIGHT) as ledger:
        trainer.train_step()
    trainer.sample_log.close()
    trainer.stream.close()
    trainer.run_log.close()
    return ledger.summary()


def timed(call: Callable[[], Any], device: torch.device, seconds: float, least: int = 3) -> float:
    """Median seconds of a call that all ranks make together, over about `seconds`."""

    def once() -> float:
        process_group.wait_for_all()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first = process_group.gather_objects(once())
    number = max(least, int(seconds / max(*first, 1e-5)))
    return float(np.median([once() for _ in range(number)]))


def measure_machine(job: dict[str, Any]) -> dict[str, Any]:
    """What a process reaches while all others do the same: products, copies, and collectives by size."""
    device = process_group.choose_device(job["device"])
    process_group.initialize(device)
    dtype, each = getattr(torch, job["dtype"]), job["seconds"]
    rows, width, columns = job["rows"], job["width"], job["columns"]
    shapes = (rows, width), (width, columns)
    left, right = (torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)
    gemm = timed(lambda: torch.mm(left, right), device, each)
    source = torch.randn(job["copied"] // 4, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, each)
    found = {
        "gemm_flops_per_second": 2 * rows * width * columns / gemm,
        "copy_bytes_per_second": 2 * source.nbytes / copy,
        "collectives": {},
    }
    ranks, rank = process_group.world_size(), process_group.rank()
    if ranks == 1:
        return found
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        points = []
        for size in job["sizes"]:
            whole = torch.randn(size // 4 // ranks * ranks, device=device)
            part = whole.chunk(ranks)[rank].clone()
            calls = {
                "all_reduce": lambda whole=whole: dist.all_reduce(whole),
                "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
                "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
            }
            points.append((whole.nbytes, timed(calls[name], device, each)))
        found["collectives"][name] = points
    return found


def main() -> int:
    """Do the jobs and write what was found."""
    TRAFFIC.watch()
    file, result = (Path(argument) for argument in sys.argv[1:3])
    kinds = {"steps": measure_steps, "machine": measure_machine, "weights": count_weights}
    found = [kinds[job["kind"]](job) for job in json.loads(file.read_text())]
    result.write_text(json.dumps(found))
    process_group.wait_for_all()
    return 0


if __name__ == "__main__":
    run_command(main)
