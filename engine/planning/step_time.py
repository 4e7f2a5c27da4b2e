"""Time of a training step: a roofline of the device, the update's traffic, and what the network adds.

    step = micro_batches x (products / FLOP/s + attention / its FLOP/s + other operators / bandwidth) x slack
           + (casts of the weights + micro_batches x casts of their gradients) / bandwidth
           + (micro_batches - 1) x accumulation of the gradients
           + copies of the gradients + optimizer + EMA + communication that nothing hides

What DeepSpeed 0.19 sends at each stage, Psi the size of the parameters (ZeRO, arXiv 1910.02054, section 7,
has 2 Psi for stages 0 to 2 and 3 Psi for stage 3 through every process):

| stage | a micro-batch                                    | a step                             |
|-------|--------------------------------------------------|------------------------------------|
| 0     |                                                  | all-reduce Psi: 2 Psi              |
| 1     |                                                  | all-reduce Psi, all-gather: 3 Psi  |
| 2     | all-reduce Psi: 2 Psi                            | all-gather Psi: Psi                |
| 3     | gather Psi once or twice, reduce-scatter: 2 to 3 |                                    |

Stages 1 and 2 reduce with an all-reduce, of which each process keeps its part: DeepSpeed's default
(`use_multi_rank_bucket_allreduce`), a third more than the paper's reduce-scatter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from millrace.engine.config import Config
from millrace.engine.distributed.zero_settings import zero_section
from millrace.engine.model.working_weights import has_working_weights
from millrace.engine.optim.training_optimizer import optimizer_entry
from millrace.engine.planning.activations import Traced
from millrace.engine.planning.devices import Device, Kind, sent_bytes
from millrace.engine.planning.step_memory import LIVE, Shape, element_bytes, fetched

REFRESH = 6
"""Bytes of a parameter whose working copy is made anew: reads FP32, writes BF16."""
AVERAGE = 3
"""EMA: reads both, writes one."""
HOST_LINK = 25e9
"""Bytes/s from a device to its host, assumed: 80 % of 16 lanes of PCIe 4.0."""
HOST_BANDWIDTH = 60e9
"""Bytes/s that a process reads and writes in the memory of its host, assumed: 80 % of two channels of
DDR5-4800."""
HOST_UPDATE = 28
"""Bytes of a parameter in torch's AdamW on the host: reads weight, gradient and two moments, writes three."""
BACKWARD = 2 / 3
"""Of the products of forward and backward."""


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in a step."""

    kind: Kind
    size: float
    """Bytes of the whole tensor, all operations together."""
    calls: int
    beside_backward: bool = False
    """Whether it may run while gradients of other parameters are still computed."""


def transfers(config: Config, stage: int, ranks: int, shape: Shape, micro_batches: int) -> list[Transfer]:
    """What a step sends between `ranks` processes, gradients and weights alike."""
    if ranks == 1:
        return []
    stored = element_bytes(config)
    reduced = 2 if config.precision.reduce == "bfloat16" else stored
    whole = stored * shape.parameters
    zero = zero_section(config, stage, ranks, shape.parameters)
    buckets = max(1, math.ceil(shape.parameters / int(zero["reduce_bucket_size"])))
    gradients = reduced * shape.parameters
    times = micro_batches if stage >= 2 else 1
    if stage < 3:
        found = [Transfer("all_reduce", times * gradients, times * buckets, beside_backward=True)]
        if stage:
            found.append(Transfer("all_gather", whole, 1))
    else:
        passes = gathers(shape)
        calls = times * passes * fetches(zero, shape)
        found = [
            Transfer("all_gather", times * passes * whole, calls, beside_backward=True),
            Transfer("reduce_scatter", times * gradients, times * buckets, beside_backward=True),
        ]
    sent = shape.exchange.bytes
    if sent:
        # Whole matrices to their owners and back, or at stage 0 their updates from owners to all.
        found.append(Transfer("all_to_all", 2 * sent, 2) if stage else Transfer("all_gather", sent, 1))
    return found


def gathers(shape: Shape) -> int:
    """How often a micro-batch of ZeRO-3 gathers the weights: for forward, and again for backward if they were
    let go in between, which DeepSpeed does where more than LIVE elements run before they are needed again."""
    return 1 if 2 * shape.parameters <= LIVE else 2


def fetches(section: Mapping[str, Any], shape: Shape) -> int:
    """All-gathers of ZeRO-3 for all weights once: they are fetched ahead in groups of this many elements;
    `section` is `zero_optimization`."""
    return min(shape.tensors, math.ceil(shape.parameters / fetched(section, shape)))


@dataclass(frozen=True)
class Step:
    """Seconds of a step by cause, and what it sends."""

    compute: float
    """Forward and backward of all micro-batches, recomputation and frozen networks included."""
    casts: float
    """Of all micro-batches: FP32 weights to what autocast computes in, their gradients back to FP32."""
    accumulation: float
    """Gradients of each micro-batch after the first, added to those before."""
    copies: float
    """Gradients in and out of buckets, their norm, weights out of their masters."""
    optimizer: float
    averages: float
    """EMA, in the mean over the steps."""
    communication: float
    hidden: float
    """Of the communication, beside the backward pass."""
    starving: float
    """Waiting for the loader beyond all that."""
    sent: float
    """Bytes that each process sends."""

    @property
    def exposed(self) -> float:
        """Seconds of communication that the step waits for."""
        return self.communication - self.hidden

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.terms.values()) + self.exposed + self.starving

    @property
    def terms(self) -> dict[str, float]:
        """Seconds of work on the device, by names for people."""
        return {
            "forward and backward": self.compute,
            "casts of weights and gradients": self.casts,
            "gradient accumulation": self.accumulation,
            "gradient copies": self.copies,
            "optimizer": self.optimizer,
            "EMA": self.averages,
        }


def copy_passes(stage: int, ranks: int) -> float:
    """Passes over memory in units of the parameters' size, beside forward, backward and the update.

    Stage 0 takes the norm (1); several processes flatten the gradients and copy them back (4). Stages 1 and 2
    bring them into buckets (2), and treat their own share: out of the bucket (2), norm (1), into one tensor
    (2), updated weights back (2). Stage 3: `_gathered_passes`, and of its share norm, copies (5). Counted by
    `python -m benchmarks weights`.
    """
    if stage == 0:
        return 1.0 + 4.0 * (ranks > 1)
    if stage == 3:
        return _gathered_passes(ranks) + 5.0 / ranks
    return 2.0 + 7.0 / ranks


def accumulation_passes(stage: int, ranks: int, working: bool) -> float:
    """Passes, in the same units, that each micro-batch after the first adds beside its forward and backward.

    Stages 0 and 1 add to the gradients of before: two reads, one write. A gradient in BF16 (`working`) is
    added in place of a cast: 1. Stages 2 and 3 reduce every micro-batch, and add their own share.
    """
    if stage < 2:
        return 1.0 if working else 3.0
    return _gathered_passes(ranks) if stage == 3 else 2.0 + 5.0 / ranks


def _gathered_passes(ranks: int) -> float:
    """Of ZeRO-3 in every micro-batch: weights out of what was gathered (1.5; with several processes, where
    they are copied as well, 3.5), gradients concatenated and divided (5), the own share out of them (2)."""
    return (3.5 if ranks > 1 else 1.5) + 5.0 + 2.0 / ranks


def optimizer_bytes(config: Config, stage: int, ranks: int, shape: Shape, fused: bool) -> float:
    """Bytes that the optimizer moves on each process; what is done with whole matrices is apart."""
    entry = optimizer_entry(config.optimizer.kind)
    passes = entry.passes if entry.fused_passes is None or not fused else entry.fused_passes
    return passes * _owned_bytes(config, stage, ranks, shape)


def host_seconds(config: Config, stage: int, ranks: int, shape: Shape) -> float:
    """Of the update where it is the host's: weights and gradients go there while it is computed."""
    owned = _owned_bytes(config, stage, ranks, shape)
    return max(2 * owned / HOST_LINK, HOST_UPDATE / element_bytes(config) * owned / HOST_BANDWIDTH)


def average_bytes(config: Config, stage: int, ranks: int, shape: Shape) -> float:
    """Bytes that the EMA moves on each process in a step, in the mean over steps with and without it."""
    averages = config.ema.enabled * (1 if config.ema.second_decay is None else 2)
    return averages * AVERAGE / config.ema.every * _owned_bytes(config, stage, ranks, shape)


def _owned_bytes(config: Config, stage: int, ranks: int, shape: Shape) -> float:
    """Of the master weights that each process updates."""
    stored = element_bytes(config)
    return stored * shape.parameters / (ranks if stage else 1)


def step_of(
    config: Config,
    stage: int,
    ranks: int,
    device: Device,
    traced: Traced,
    shape: Shape,
    flops: float,
    frozen_flops: float = 0.0,
    attention: float = 0.0,
    images_per_second: float | None = None,
) -> Step:
    """Time of one optimizer step.

    Args:
        flops: executed for one image, forward, backward and recomputation.
        attention: share of them in attention.
        frozen_flops: of the frozen networks for one image.
        images_per_second: that the loader of one process delivers; None if it never starves.
    """
    data = config.data
    micro_batches = data.global_batch // (data.micro_batch * ranks)
    images = micro_batches * data.micro_batch
    products = images * ((1 - attention) * flops + frozen_flops) / device.product_flops
    products += images * attention * flops / (device.attention_flops or device.product_flops)
    other = micro_batches * traced.moved / device.copy_bandwidth
    compute = device.slack * (products + other)
    if stage == 3:
        compute += device.gather_overhead * micro_batches * gathers(shape) * shape.tensors
    bandwidth = device.copy_bandwidth
    stored = element_bytes(config)
    a_pass = stored * shape.parameters / bandwidth
    working = has_working_weights(config.precision, stage)
    casts = (micro_batches * traced.casts + working * REFRESH * shape.parameters) / bandwidth
    accumulation = (micro_batches - 1) * accumulation_passes(stage, ranks, working) * a_pass
    copies = copy_passes(stage, ranks) * a_pass
    if shape.host_state:
        optimizer = host_seconds(config, stage, ranks, shape)
    else:
        optimizer = optimizer_bytes(config, stage, ranks, shape, device.fused_optimizer) / bandwidth
    optimizer += shape.exchange.flops / ranks / device.product_flops
    averages = average_bytes(config, stage, ranks, shape) / bandwidth
    communication, hidden, sent = 0.0, 0.0, 0.0
    zero = zero_section(config, stage, ranks, shape.parameters)
    beside = stage > 0 and device.overlaps and zero["overlap_comm"]
    for transfer in transfers(config, stage, ranks, shape, micro_batches):
        each = device.network.seconds(transfer.kind, transfer.size / transfer.calls, ranks)
        seconds = transfer.calls * each
        communication += seconds
        sent += sent_bytes(transfer.kind, transfer.size, ranks)
        if beside and transfer.beside_backward:
            # The last bucket has nothing left to hide behind.
            hidden += seconds * (1 - 1 / transfer.calls)
    # About half of the casts are those of the gradients.
    hidden = min(hidden, compute * BACKWARD + casts / 2)
    step = Step(
        compute,
        casts,
        accumulation,
        copies,
        optimizer,
        averages,
        communication,
        hidden,
        starving=0.0,
        sent=sent,
    )
    if not images_per_second:
        return step
    return replace(step, starving=max(0.0, images / images_per_second - step.seconds))
