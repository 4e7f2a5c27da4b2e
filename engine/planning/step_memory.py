"""Memory of a process through a training step: what is held all the time, and what comes and goes.

Psi is the size of the trained parameters in FP32, N the processes, b DeepSpeed's reduction bucket. From
the code of DeepSpeed 0.19 (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`), as this engine
sets it:

| stage | always held                 | forward, backward         | reduction               | update  |
|-------|-----------------------------|---------------------------|-------------------------|---------|
| 0     | Psi + state                 | activations, gradients    | Psi + flat bucket       | Psi     |
| 1     | Psi + master/N + state/N    | activations, gradients, b | Psi in b + Psi/N        | 2 Psi/N |
| 2     | the same                    | activations, b            | b + 2 Psi/N             | 2 Psi/N |
| 3     | 3 Psi/N + state/N + b       | activations, live weights | flat bucket             |         |

Frozen parameters are held besides, as they are stored. At stages 0 to 2 a run in BF16 also holds working
copies of Psi/2, not of an adapter's factors. At stage 3 weights, their masters and the gradients are Psi/N
each. The peak is that of the worst phase. `state` is the optimizer's, unless the host has it, and the EMA's.
The flat bucket is a copy that DeepSpeed makes to reduce pieces of several processes at once; alone it needs
none, nor do stages 1 and 2 without `reduce_scatter`. Where a run draws samples, that is a phase between two
steps, with one whole FP32 copy of the weights, gathered and sampled from: Psi; at stage 0 the weights or
averages themselves are sampled from, where they are FP32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from millrace.engine.config import Config
from millrace.engine.distributed.zero_settings import BUCKET, zero_section
from millrace.engine.model.adapters import is_factor
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.freezing import lay_out
from millrace.engine.model.working_weights import has_working_weights
from millrace.engine.optim.training_optimizer import NO_EXCHANGE, Exchange, optimizer_entry
from millrace.engine.planning.activations import Traced

LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered (`stage3_max_live_parameters`)."""
PREFETCH = 50_000_000
"""Elements that ZeRO-3 fetches together by default."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's parameters, in elements."""

    parameters: int
    """That are trained."""
    largest: int
    """Of the largest single tensor of those."""
    tensors: int
    state: Mapping[str, float] = field(default_factory=dict)
    """Bytes of the optimizer's, by purpose."""
    host_state: float = 0.0
    """Bytes of the optimizer's in the memory of the host."""
    exchange: Exchange = NO_EXCHANGE
    """What the optimizer sends and computes besides its element-wise update."""
    frozen: int = 0
    """Parameters that are not trained."""
    frozen_bytes: float = 0.0
    """Of those, as they are stored."""
    factors: int = 0
    """Of what is trained, an adapter's, which has no working copies."""


def element_bytes(config: Config) -> int:
    """Of a weight, a gradient and an average, as `precision.master` stores them."""
    return 4 if config.precision.master == "float32" else 2


def shape_of(config: Config) -> Shape:
    """Of the denoiser of a configuration."""
    with torch.device("meta"):
        denoiser = Denoiser(config.model, config.routing)
    lay_out(denoiser, config)
    every = list(denoiser.named_parameters())
    named = [(name, p) for name, p in every if p.requires_grad]
    sizes = [p.numel() for _, p in named]
    still = [p for _, p in every if not p.requires_grad]
    entry, settings = optimizer_entry(config.optimizer.kind), (config.optimizer, config.model)
    state = entry.state_bytes(named, *settings, element_bytes(config))
    exchange = entry.exchange(named, *settings)
    return Shape(
        sum(sizes),
        max(sizes),
        len(sizes),
        state,
        entry.host_bytes(named),
        exchange,
        frozen=sum(p.numel() for p in still),
        frozen_bytes=float(sum(p.numel() * p.element_size() for p in still)),
        factors=sum(p.numel() for name, p in named if is_factor(name)),
    )


def fetched(section: Mapping[str, Any], shape: Shape) -> int:
    """Elements of weights that ZeRO-3 fetches together at most (`stage3_prefetch_bucket_size`); `section` is
    `zero_optimization`."""
    group = section.get("stage3_prefetch_bucket_size", section.get("prefetch_bucket_size", PREFETCH))
    return min(shape.parameters, max(int(group), 1))


def gigabytes(size: float) -> str:
    """Bytes in units of 1e9: a decimal, of what is below 0.1 two digits."""
    return f"{size / 1e9:.1f}" if size == 0 or size >= 1e8 else f"{size / 1e9:.2g}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    parts: dict[str, float]
    """Held all the time, by purpose."""
    phases: dict[str, float]
    """Held beside that in each phase of a step, and between steps while samples are drawn."""
    gradients: float
    """Of the phases', the gradients when the backward pass ends; what is held and they need no estimate."""

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def held(self) -> float:
        """Between two steps."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """Most at once."""
        return self.held + self.phases[self.worst]

    @property
    def certain(self) -> float:
        """Needs no estimate: what is held, with all gradients or with the copy that draws samples."""
        return self.held + max(self.gradients, self.phases.get("sampling", 0.0))

    def table(self) -> str:
        """The parts of the peak in GB, for people."""
        parts = self.parts | {_IN_PHASE[self.worst]: self.phases[self.worst]}
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


_IN_PHASE = {
    "backward": "activations and gradients",
    "reduction": "gradients and their copies",
    "update": "temporaries of the update",
    "sampling": "an FP32 copy for sampling",
}
"""What is held in a phase beside what is always held."""


def held_bytes(config: Config, stage: int, ranks: int, shape: Shape) -> dict[str, float]:
    """Bytes that each of `ranks` processes holds all the time for the model and its optimizer, by purpose.

    Stage 3 has masters of its own: DeepSpeed 0.19 would share them with FP32 weights, but compares a
    torch.device with a string first.
    """
    stored = element_bytes(config)
    share = ranks if stage > 0 else 1
    averages = config.ema.enabled * (1 if config.ema.second_decay is None else 2)
    found = {
        "weights": stored * shape.parameters / (ranks if stage == 3 else 1),
        "frozen weights": shape.frozen_bytes,
        "working copies": 2.0
        * (shape.parameters - shape.factors)
        * has_working_weights(config.precision, stage),
        "master weights": 4 * shape.parameters / share if stage else 0.0,
        **{name: size / share for name, size in shape.state.items()},
        "EMA": averages * stored * shape.parameters / share,
    }
    return {name: float(size) for name, size in found.items() if size}


def saved_bytes(config: Config, ranks: int, shape: Shape) -> float:
    """Bytes of the training state that each of `ranks` processes writes to a checkpoint, the same at every
    stage; unless `checkpoint.blocking` is set, it holds a copy of them in host memory."""
    stored = element_bytes(config)
    averages = config.ema.enabled * (1 if config.ema.second_decay is None else 2)
    trained = stored * (1 + averages) * shape.parameters + sum(shape.state.values()) + shape.host_state
    return (trained + shape.frozen_bytes) / ranks


def memory_of(
    config: Config,
    stage: int,
    ranks: int,
    traced: Traced,
    shape: Shape,
    frozen: float = 0.0,
    fused: bool = True,
) -> Memory:
    """Memory of each of `ranks` processes.

    Args:
        traced: one micro-batch of the configuration. Alignment heads are not in it.
        frozen: bytes of the frozen networks that the run loads.
        fused: whether the device has optimizers that are one kernel.
    """
    parts = held_bytes(config, stage, ranks, shape)
    if frozen:
        parts["frozen networks"] = frozen
    stored = element_bytes(config)
    whole = stored * shape.parameters
    share = whole / ranks
    zero = zero_section(config, stage, ranks, shape.parameters)
    bucket = stored * int(zero["reduce_bucket_size"])
    flat = min(bucket, whole) if ranks > 1 and zero["reduce_scatter"] else 0.0
    entry = optimizer_entry(config.optimizer.kind)
    alone = fused and entry.fused_passes is not None
    update = 0.0 if alone else entry.temporaries * (stored * shape.largest if stage == 0 else share)
    buckets = bucket * (2 if zero["overlap_comm"] else 1)
    if stage == 0:
        flat = stored * min(shape.parameters, BUCKET + shape.largest) if ranks > 1 else 0.0
        phases = {"backward": traced.peak, "reduction": whole + flat, "update": whole + update}
    elif stage == 1:
        rest = max(whole - bucket, 0.0)
        phases = {
            "backward": traced.peak + buckets,
            "reduction": rest + buckets + max(flat, share),
            "update": share + max(share, update),
        }
    elif stage == 2:
        owned = share if whole > bucket else 0.0
        phases = {
            "backward": traced.peak_without_gradients + buckets + owned,
            "reduction": buckets + max(flat, share) + owned,
            "update": share + max(share, update),
        }
    else:
        parts["reduction bucket"], parts["gradients"] = float(bucket), share
        # Beside the weights that are cut out of it, the flat tensor of a fetch was seen to live on.
        live = stored * (min(shape.parameters, LIVE) + fetched(zero, shape)) if ranks > 1 else 0.0
        phases = {
            "backward": traced.peak_without_gradients + live,
            "reduction": min(bucket, whole) + live,
            "update": update,
        }
    if config.sampling.every_steps or config.evaluation.every_steps or config.validation.every_steps:
        shared = stage == 0 and stored == 4 and not shape.frozen
        phases["sampling"] = 0 if shared else 4 * (shape.parameters - shape.factors + shape.frozen)
    gradients = (whole, whole, share, 0.0)[stage]  # at stage 3 they are among the parts
    return Memory(parts, {name: float(size) for name, size in phases.items()}, gradients)
