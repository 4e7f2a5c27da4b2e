"""Where the time of one training step went, against the least that it could take.

One step of the trainer runs under torch.profiler. On CUDA every instant of the step belongs to the kernel
that runs, in the order of CATEGORIES where several do, so that communication counts only as far as nothing
hides it; an instant without a kernel is the host's. On a CPU it belongs to the innermost operator of the
training thread. So the categories add up to the step.

The roofline of a category is what `traffic.py`'s ledger says of its operators, at ceilings measured on the
same device just before: products take the longer of their arithmetic and their bytes, attention its
arithmetic at the rate of products, all else its bytes. To it come, for AdamW, 28 bytes a parameter and 4 for
the norm; for BF16 arithmetic on FP32 weights, 12 bytes a parameter and micro-batch for the casts of weights
and gradients; and the FLOPs of the frozen networks at the rate of products.
"""

import argparse
import functools
import itertools
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import recording
import timing
import torch
import traffic
import training_steps as steps
import waterfall_chart
from ledger import Entry
from throughput_inputs import Live
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from millrace.engine.config import Config
from millrace.engine.runtime import distributed, zero
from millrace.kernels.operators import HAS_TRITON

Row = dict[str, Any]

CATEGORIES = (
    "GEMM",
    "attention",
    "fused kernels",
    "other operators",
    "optimizer",
    "data and conditioning",
    "communication",
    "host gaps",
)
STEP, CONDITIONING, OPTIMIZER = "millrace.step", "millrace.conditioning", "millrace.optimizer"
TOP = 20
"""Heaviest operators in the JSON."""

_PRODUCTS = re.compile(
    r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|convolution\w*|_convolution|mkldnn_\w+)$|mkldnn::_linear"
)
_PRODUCT_KERNELS = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|splitK", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|flash|fmha|varlen_attn", re.IGNORECASE)
_COMMUNICATION = re.compile(r"nccl|gloo|c10d::|record_param_comms", re.IGNORECASE)


class Event(NamedTuple):
    """What the profiler saw: an operator or range on a thread, or a kernel on a stream. Times in ns."""

    name: str
    start: int
    end: int
    lane: int
    """Thread or stream."""
    number: int = 0
    """Of an operator, its number; of a kernel, that of the operator which launched it."""


class Span(NamedTuple):
    """A piece of time and what it was spent on."""

    start: int
    end: int
    category: str
    name: str


def category_of(chain: Sequence[str], kernel: str = "") -> str | None:
    """Of an operator, by the names from the outermost range to itself, and the kernel's if there is one.

    None where nothing computes: between operators, and in autograd's own frames.
    """
    if CONDITIONING in chain:
        return "data and conditioning"
    if (kernel and _COMMUNICATION.search(kernel)) or any(_COMMUNICATION.search(name) for name in chain):
        return "communication"
    if any(name == OPTIMIZER or name.startswith("Optimizer.step") for name in chain):
        return "optimizer"
    operators = [name for name in chain if "::" in name and not name.startswith("autograd::")]
    if any(_ATTENTION.search(name) for name in operators):
        return "attention"
    if any(_PRODUCTS.match(name) for name in operators):
        return "GEMM"
    if any(name.startswith("millrace::") for name in operators):
        # Some of our operators make products too; on a GPU those kernels say so.
        return "GEMM" if _PRODUCT_KERNELS.search(kernel) else "fused kernels"
    if kernel.startswith("triton_"):
        return "fused kernels"
    if not operators and kernel:
        if _ATTENTION.search(kernel):
            return "attention"
        return "GEMM" if _PRODUCT_KERNELS.search(kernel) else "other operators"
    return "other operators" if operators else None


class Chains:
    """Operators of one thread, nested as they were called."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = sorted(events, key=lambda event: (event.start, -event.end))
        self.parents: list[int] = []
        open_: list[int] = []
        for i, event in enumerate(self.events):
            while open_ and self.events[open_[-1]].end <= event.start:
                open_.pop()
            self.parents.append(open_[-1] if open_ else -1)
            open_.append(i)
        self.starts = [event.start for event in self.events]

    def chain(self, i: int) -> list[str]:
        """Names from the outermost to event `i`."""
        names = []
        while i >= 0:
            names.append(self.events[i].name)
            i = self.parents[i]
        return names[::-1]

    def at(self, instant: int) -> int:
        """The innermost event at an instant, or -1."""
        i = bisect_right(self.starts, instant) - 1
        while i >= 0 and self.events[i].end <= instant:
            i = self.parents[i]
        return i

    def spans(self, start: int, end: int) -> list[Span]:
        """The window cut where an event begins or ends, each piece with its innermost event."""
        edges = {start, end}
        for event in self.events:
            edges |= {edge for edge in (event.start, event.end) if start < edge < end}
        order = sorted(edges)
        found = []
        for left, right in itertools.pairwise(order):
            i = self.at(left)
            chain = self.chain(i) if i >= 0 else []
            name = chain[-1] if chain else ""
            found.append(Span(left, right, category_of(chain) or "host gaps", name))
        return found


def kernel_spans(kernels: Sequence[Span], start: int, end: int) -> list[Span]:
    """The window cut where a kernel begins or ends, each piece with the first category that runs; pieces
    without a kernel are host gaps."""
    rank = {category: i for i, category in enumerate(CATEGORIES)}
    changes: list[tuple[int, int, int]] = []
    for i, kernel in enumerate(kernels):
        left, right = max(kernel.start, start), min(kernel.end, end)
        if left < right:
            changes += [(left, 1, i), (right, 0, i)]
    running: set[int] = set()
    found, at = [], start
    for instant, begins, i in sorted(changes):
        if instant > at:
            first = min(running, key=lambda k: (rank[kernels[k].category], k), default=None)
            category, name = (
                ("host gaps", "") if first is None else (kernels[first].category, kernels[first].name)
            )
            found.append(Span(at, instant, category, name))
            at = instant
        running.add(i) if begins else running.discard(i)
    if at < end:
        found.append(Span(at, end, "host gaps", ""))
    return found


def attribute(host: Sequence[Event], device: Sequence[Event]) -> tuple[int, list[Span]]:
    """Length of the last step in ns, and its pieces.

    Args:
        host: operators and ranges, of all threads; STEP marks the steps.
        device: kernels; empty on a CPU.
    """
    step = max((event for event in host if event.name == STEP), key=lambda event: event.start)
    lanes: dict[int, list[Event]] = defaultdict(list)
    for event in host:
        if event.name != STEP:
            lanes[event.lane].append(event)
    chains = {lane: Chains(events) for lane, events in lanes.items()}
    mine = chains.get(step.lane) or Chains([])
    if not device:
        return step.end - step.start, mine.spans(step.start, step.end)
    where = {
        event.number: (lane, i)
        for lane, chain in chains.items()
        for i, event in enumerate(chain.events)
        if event.number
    }
    kernels = []
    for kernel in device:
        lane, i = where.get(kernel.number, (step.lane, -1))
        chain = chains[lane].chain(i) if i >= 0 else []
        category = category_of(chain, kernel.name) or "other operators"
        kernels.append(Span(kernel.start, kernel.end, category, kernel.name))
    spans = []
    for span in kernel_spans(kernels, step.start, step.end):
        if span.category != "host gaps":
            spans.append(span)
            continue
        # The device waits for the host: for pictures and captions, or for anything else.
        for piece in mine.spans(span.start, span.end):
            waits = piece.category == "data and conditioning"
            spans.append(piece._replace(category=piece.category if waits else "host gaps"))
    return step.end - step.start, spans


def events_of(recorded: Any) -> tuple[list[Event], list[Event]]:
    """Host and device events of a finished `torch.profiler.profile`."""
    host, device = [], []
    for event in recorded.profiler.kineto_results.events():
        start = event.start_ns()
        name, end = event.name(), start + event.duration_ns()
        if event.device_type() == DeviceType.CPU:
            if not name.startswith("[") and not event.is_async():
                # Calls of the CUDA runtime have numbers too, of another series.
                number = 0 if event.linked_correlation_id() else event.correlation_id()
                host.append(Event(name, start, end, event.start_thread_id(), number))
        elif not event.is_user_annotation() and name not in (STEP, CONDITIONING, OPTIMIZER):
            number = event.linked_correlation_id()
            device.append(Event(name, start, end, event.device_resource_id(), number))
    return host, device


@functools.cache
def ceilings(device: torch.device) -> Row:
    """What the device reaches in a large copy and a large product, measured once."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = timing.ceilings(timing.timer_for(device), device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def profile(trainer: Live, limits: Row) -> Row:
    """Run two steps of the trainer under the profiler and account for the second.

    Args:
        limits: of the device, as `ceilings` gives them.

    Returns:
        step_seconds; categories with seconds, share and roofline; the heaviest operators.
    """
    device = trainer.device
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with ExitStack() as stack:
        for owner, name, label in (
            (trainer, "next_batch", CONDITIONING),
            (zero, "apply_gradients", OPTIMIZER),
        ):
            stack.enter_context(mock.patch.object(owner, name, _labelled(label, getattr(owner, name))))
        recorded = stack.enter_context(torch.profiler.profile(activities=activities))
        for _ in range(2):
            with record_function(STEP):
                trainer.train_step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    length, spans = attribute(*events_of(recorded))
    return account(length, spans) | _roofline_row(trainer, limits)


def _labelled(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return call(*args, **kwargs)

    return run


def account(length: int, spans: Sequence[Span]) -> Row:
    """Sums of the pieces of a step of `length` ns."""
    times: Counter[str] = Counter()
    heavy: Counter[tuple[str, str]] = Counter()
    for span in spans:
        times[span.category] += span.end - span.start
        heavy[span.name, span.category] += span.end - span.start
    if sum(times.values()) != length:
        raise RuntimeError(f"the pieces of a step of {length} ns add up to {sum(times.values())} ns")
    return {
        "benchmark": "profile",
        "step_seconds": length / 1e9,
        "seconds": {category: times[category] / 1e9 for category in CATEGORIES},
        "heaviest": [
            {"name": name, "category": category, "seconds": time / 1e9}
            for (name, category), time in heavy.most_common(TOP)
        ],
    }


def _roofline_row(trainer: Live, limits: Row) -> Row:
    if not HAS_TRITON:
        return {"ceilings": limits, "roofline_seconds": None, "roofline_missing": "Triton is not installed"}
    lengths = [round(trainer.text_tokens / trainer.images)] * trainer.config.data.micro_batch
    found = roofline(
        trainer.config,
        limits,
        lengths,
        sum(p.numel() for p in trainer.model.parameters()),
        trainer.accumulate,
        sum(trainer.frozen_flops.values()),
    )
    return {"ceilings": limits, "roofline_seconds": found}


def roofline(
    config: Config, limits: Row, lengths: list[int], parameters: int, micro_batches: int, frozen_flops: float
) -> dict[str, float | None]:
    """Least seconds of a step on one process by category; None where no bound is known.

    Args:
        limits: copy_bytes_per_second, gemm_flops_per_second.
        lengths: text tokens of the samples of a micro-batch.
        parameters: of everything that is trained.
        micro_batches: of a step.
        frozen_flops: for one image.
    """
    copy, products = limits["copy_bytes_per_second"], limits["gemm_flops_per_second"]
    backend = "varlen" if config.model.attention_backend == "auto" else config.model.attention_backend
    counted = steps.with_values(config, {"model": {"attention_backend": backend}})
    least: dict[str, float | None] = dict.fromkeys(CATEGORIES, 0.0)
    times: Counter[str] = Counter()
    for entry in traffic.record(counted, "ours", lengths).entries:
        times[_category_of_entry(entry)] += micro_batches * _least(entry, copy, products)
    if config.precision.compute == "bfloat16":
        times["other operators"] += micro_batches * 12 * parameters / copy
    times["data and conditioning"] += micro_batches * len(lengths) * frozen_flops / products
    least |= dict(times)
    shards = distributed.world_size() if zero.zero_stage(config) else 1
    least["optimizer"] = 32 * parameters / shards / copy if config.optimizer.kind == "adamw" else None
    least["communication"] = 0.0 if distributed.world_size() == 1 else None
    return least


def _category_of_entry(entry: Entry) -> str:
    if entry.cost.kind == "other":
        return "fused kernels" if entry.operator.startswith("millrace::") else "other operators"
    return "GEMM" if entry.cost.kind == "gemm" else "attention"


def _least(entry: Entry, copy: float, products: float) -> float:
    cost = entry.cost
    if cost.kind == "gemm":
        return max(cost.flops / products, cost.moved / copy)
    return cost.flops / products if cost.kind == "attention" else cost.moved / copy


def target(arguments: argparse.Namespace, output: Path | None, name: str) -> Path:
    """Where the profile of a case goes, without an ending: the folder of --profile, or beside the results."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
    if arguments.profile != ".":
        return Path(arguments.profile) / f"profile-{slug}"
    if output is not None:
        return output.with_name(f"{output.stem}-profile-{slug}")
    return Path("runs") / "profiles" / f"profile-{slug}"


def write(found: Row, path: Path) -> None:
    """Write a profile as JSON and PNG and print it."""
    if distributed.rank() != 0:
        return
    content = recording.environment() | found
    recording.write(path.with_suffix(".json"), content)
    waterfall_chart.draw(content, path.with_suffix(".png"))
    print("\n".join(lines(found)))
    print(f"written to {path.with_suffix('.json')} and {path.with_suffix('.png')}")


def lines(found: Row) -> list[str]:
    """A profile for people."""
    bounds = found["roofline_seconds"] or {}
    text = [f"one step of {found['config']}, {found['conditioning']}: {found['step_seconds'] * 1e3:.1f} ms"]
    for category, seconds in found["seconds"].items():
        bound = bounds.get(category)
        share = seconds / found["step_seconds"]
        least = "" if bound is None else f"   at least {bound * 1e3:9.2f} ms"
        text.append(f"  {category:22} {seconds * 1e3:9.2f} ms {share:6.1%}{least}")
    return text
