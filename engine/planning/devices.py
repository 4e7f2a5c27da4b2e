"""Devices of the planner: what one reaches, alone and with others, from its data sheet and assumptions.

Data sheets are those of `engine/util/data_sheets.py`. The shares that are reached of them, and the latencies,
are assumptions (`ASSUMED`), not measurements.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

from millrace.engine.util.data_sheets import PEAK_BF16, SHEETS, LinkKind, Sheet, chip_of, sheet_name

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

ASSUMED = {
    "share of the peak FLOP/s in matrix products": 0.80,
    "share of the peak FLOP/s in attention": 0.50,
    "most FLOP/s in attention, FlashAttention-2": 257e12,
    "share of the memory bandwidth in other operators": 0.90,
    "step over the roofline of its products and its memory traffic": 1.25,
    "share of the NVLink bandwidth": 0.80,
    "share of the PCIe bandwidth": 0.60,
    "share of the Infinity Fabric bandwidth": 0.70,
    "share of the network bandwidth": 0.80,
    "latency of a hop within a node, s": 3e-6,
    "latency of a hop between nodes, s": 10e-6,
    "share of the memory that a process may fill": 0.92,
    "host time of ZeRO-3 for each tensor that it gathers, s": 30e-6,
}
"""Not measured here. The shares of the peak in products and of the bandwidth are what `python -m benchmarks
traffic` assumes as well. Attention, forward and backward together: FlashAttention-2 reaches 50 to 73 % of
an A100's peak (arXiv 2307.08691, abstract), and does not use what Hopper added: 306 TFLOP/s forward and 238
backward on an H100 at head_dim 64 and 1024 tokens (arXiv 2407.08608, figures 5 and 6), which is also taken
for what came later. PCIe reaches least: what goes from one GeForce card to another goes through the memory
of the host."""

NEWER_ATTENTION = 372e12
"""FLOP/s of FlashAttention-3 where FlashAttention-2 reaches its most: 392 forward, 363 backward (the same
figures). Taken for a Hopper or later at hand on which it, or version 4, is installed."""

_SLACK = "step over the roofline of its products and its memory traffic"


@dataclass(frozen=True)
class Link:
    """One device's way to others of its group."""

    bandwidth: float
    """Bytes/s that it sends while it receives as much."""
    latency: float
    """Seconds of one hop."""


class Network(Protocol):
    """How long the collectives of a job take."""

    def seconds(self, kind: Kind, size: float, ranks: int) -> float:
        """Of one operation on a tensor of `size` bytes (as a whole, gathered) on `ranks` processes."""
        ...


def sent_bytes(kind: Kind, size: float, ranks: int) -> float:
    """Bytes that each of `ranks` processes sends for a tensor of `size` bytes, in a ring.

    Rajbhandari et al., ZeRO (arXiv 1910.02054), section 7: an all-reduce is a reduce-scatter and an
    all-gather, each moves (N - 1) / N of the tensor through every process.
    """
    return (2 if kind == "all_reduce" else 1) * size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Hierarchy:
    """Rings within nodes and between them, one level after the other.

    reduce-scatter of S bytes on g x m devices: (g-1)/g S through a node's links, then (m-1)/m of the S/g that
    each device has left through the network. An all-gather is the reverse, an all-reduce is both. The levels
    do not overlap here, which NCCL's pipelining does: the time is an upper estimate of what the links allow.
    """

    per_node: int
    inside: Link
    between: Link

    def seconds(self, kind: Kind, size: float, ranks: int) -> float:
        """As of any `Network`."""
        near = min(ranks, self.per_node)
        nodes = -(-ranks // near)
        if kind == "all_to_all":
            # A process keeps 1/N, sends to those of its node through its links and to the others outside.
            share = size / ranks
            inside, outside = share * (near - 1) / ranks, share * (ranks - near) / ranks
            seconds = max(inside / self.inside.bandwidth, outside / self.between.bandwidth)
            return seconds + (self.between if nodes > 1 else self.inside).latency
        level = (near - 1) * (size / near / self.inside.bandwidth + self.inside.latency)
        level += (nodes - 1) * (size / near / nodes / self.between.bandwidth + self.between.latency)
        return 2 * level if kind == "all_reduce" else level


@dataclass(frozen=True)
class MeasuredNetwork:
    """Times of collectives between the processes at hand, measured at some sizes.

    Args:
        points: (bytes of the whole tensor, seconds) by kind, ascending; linear between and beyond them.
    """

    points: dict[str, Sequence[tuple[float, float]]]

    def seconds(self, kind: Kind, size: float, ranks: int) -> float:
        """As of any `Network`; `ranks` is that of the measurement."""
        if ranks == 1:
            return 0.0
        points = self.points[kind]
        upper = next((i for i, (at, _) in enumerate(points) if at >= size), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(upper - 1, 0)], points[max(upper, 1)]
        return max(y0 + (size - x0) * (y1 - y0) / (x1 - x0), min(seconds for _, seconds in points))


@dataclass(frozen=True)
class Device:
    """A processor that trains, with what it reaches."""

    name: str
    product_flops: float
    """FLOP/s reached in matrix products."""
    copy_bandwidth: float
    """Bytes/s, read plus written, reached in other operators."""
    memory: float
    """Bytes that it has."""
    network: Network
    attention_flops: float | None = None
    """FLOP/s reached in attention, forward and backward together; None: as in other products."""
    slack: float = 1.0
    """Time of forward and backward over the roofline of the two above."""
    fused_optimizer: bool = True
    """Whether AdamW is one kernel; else passes over memory for each of its operations."""
    peak_flops: float | None = None
    """Of the data sheet."""
    gather_overhead: float = 0.0
    """Seconds of the host for each tensor that ZeRO-3 gathers."""
    overlaps: bool = True
    """Whether it computes while it communicates."""
    usable: float = 1.0
    """Share of the memory that a process may fill."""
    assumed: tuple[str, ...] = field(default=tuple(ASSUMED))
    """Names in ASSUMED of what was not measured."""

    @property
    def capacity(self) -> float:
        """Bytes that a process may fill."""
        return self.memory * self.usable

    def with_attention(self, flops: float) -> "Device":
        """With another rate of attention, FLOP/s."""
        return replace(
            self, attention_flops=flops, assumed=tuple(a for a in self.assumed if "attention" not in a)
        )

    def calibrated(self, slack: float) -> "Device":
        """With a slack that follows from a measured step."""
        return replace(self, slack=slack, assumed=tuple(a for a in self.assumed if a != _SLACK))


def _gpu(sheet: Sheet) -> Device:
    link_share = f"share of the {sheet.link_kind} bandwidth"
    peak = PEAK_BF16[sheet.chip]
    inside = Link(ASSUMED[link_share] * sheet.link, ASSUMED["latency of a hop within a node, s"])
    between = Link(
        ASSUMED["share of the network bandwidth"] * sheet.network,
        ASSUMED["latency of a hop between nodes, s"],
    )
    links = {f"share of the {kind} bandwidth" for kind in get_args(LinkKind)}
    return Device(
        name=sheet.title,
        product_flops=ASSUMED["share of the peak FLOP/s in matrix products"] * peak,
        attention_flops=min(
            ASSUMED["share of the peak FLOP/s in attention"] * peak,
            ASSUMED["most FLOP/s in attention, FlashAttention-2"],
        ),
        copy_bandwidth=ASSUMED["share of the memory bandwidth in other operators"] * sheet.bandwidth,
        memory=sheet.memory,
        slack=ASSUMED[_SLACK],
        network=Hierarchy(8, inside, between),
        peak_flops=peak,
        usable=ASSUMED["share of the memory that a process may fill"],
        gather_overhead=ASSUMED["host time of ZeRO-3 for each tensor that it gathers, s"],
        assumed=tuple(name for name in ASSUMED if name not in links or name == link_share),
    )


CALIBRATION = Path(__file__).with_name("calibration.json")
"""Slack by the names in `GPUS`; `python -m benchmarks scaling --calibrate` writes it from measured steps."""


def _gpus(calibration: dict[str, float]) -> dict[str, Device]:
    """The devices of the data sheets, with what was measured in place of what is assumed."""
    sheets = {name: _gpu(sheet) for name, sheet in SHEETS.items()}
    return {
        name: device.calibrated(calibration[name]) if name in calibration else device
        for name, device in sheets.items()
    }


GPUS = _gpus(json.loads(CALIBRATION.read_text()))


def gpu_like(name: str, memory: float) -> Device:
    """The device of a GPU that is there.

    Args:
        name: as torch gives it.
        memory: bytes that it has.

    A GPU without a data sheet is taken as the one whose memory is nearest, at its own peak where that is
    known.
    """
    own = sheet_name(name)
    if own is not None:
        return replace(GPUS[own], memory=memory)
    near = min(SHEETS, key=lambda key: abs(math.log(SHEETS[key].memory / memory)))
    chip = chip_of(name)
    device = GPUS[near] if chip is None else _gpu(replace(SHEETS[near], chip=chip))
    return replace(device, name=f"{name} (taken as {SHEETS[near].title})", memory=memory)
