"""From the events of a profiler to what each instant of a step was spent on.

On CUDA every instant of the step belongs to the kernel that runs, in the order of CATEGORIES where several
do, so that communication counts only as far as nothing hides it; an instant without a kernel is the host's.
On a CPU it belongs to the innermost operator of the training thread. So the categories add up to the step.
"""

import itertools
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType

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
    waiting = mine.spans(step.start, step.end)
    starts = [piece.start for piece in waiting]
    for span in kernel_spans(kernels, step.start, step.end):
        if span.category != "host gaps":
            spans.append(span)
            continue
        # The device waits for the host: for pictures and captions, or for anything else.
        for piece in waiting[bisect_right(starts, span.start) - 1 : bisect_right(starts, span.end - 1)]:
            prepares = piece.category == "data and conditioning"
            left, right = max(piece.start, span.start), min(piece.end, span.end)
            spans.append(Span(left, right, piece.category if prepares else "host gaps", piece.name))
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
        "step_seconds": length / 1e9,
        "seconds": {category: times[category] / 1e9 for category in CATEGORIES},
        "heaviest": [
            {"name": name, "category": category, "seconds": time / 1e9}
            for (name, category), time in heavy.most_common(TOP)
        ],
    }
