"""Optimizer interface: what training asks of an optimizer besides its update; the registry of its kinds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from millrace.engine.config import Model, Optimizer
from millrace.engine.distributed.zero_shards import Shard
from millrace.engine.model.freezing import HEADS
from millrace.engine.util import registry

Named = Iterable[tuple[str, nn.Parameter]]


class Stored(NamedTuple):
    """Elements [start, start + data.numel()) of what a checkpoint calls `kind/<parameter>`."""

    kind: str
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    data: Tensor
    """1-D, the optimizer's own memory."""


class TrainingOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that training can skip, save, shard and describe.

    It updates flat FP32 tensors: at ZeRO stages 1 to 3 a master is a slice of many parameters.
    """

    title: str
    """For people."""
    skip = False
    """`step` changes nothing while this is set: at stage 0 DeepSpeed applies gradients that are infinite."""
    gradient_scale = 1.0
    """What `step` multiplies gradients by, to clip them."""
    storage = "as the masters"
    """How its state is stored, for people."""
    quantized: tuple[str, ...] = ()
    """What of its state has 8 bits by design, as checkpoints name it."""
    rest = "everything"
    """What the group besides those of special parameters is called."""

    @abstractmethod
    def state_names(self, name: str) -> tuple[str, ...]:
        """What is stored of a parameter."""

    def state_shape(self, _kind: str, shard: Shard) -> tuple[int, ...]:
        """Shape of one of them, of the whole parameter that the shard is of."""
        return shard.shape

    def counts_updates(self, _name: str) -> bool:
        """Whether the state of a parameter has "step", the number of its updates."""
        return False

    def attach(self, shards: list[Shard], stage: int) -> None:
        """Learn where the shards of this rank are; what is element-wise need not know. Collective."""

    def begin(self, master: Tensor, name: str, updates: int = 0) -> None:
        """Give a master, where the parameter of that name lies, a state of zeros after so many updates."""
        state = {kind: self.zeros_like(master) for kind in self.state_names(name)}
        if self.counts_updates(name):
            where = master.device if self.defaults.get("fused") else "cpu"
            state["step"] = torch.tensor(float(updates), device=where)
        self.state[master] = state

    def zeros_like(self, master: Tensor) -> Tensor:
        """New state in the layout of a master."""
        return torch.zeros_like(master)

    def stored(self, shard: Shard, written: bool = True) -> Iterator[Stored]:
        """The state of a shard, or of a part of it, once it has begun: what this rank writes to a checkpoint,
        or, where that differs, reads from one."""
        state = self.state.get(shard.master, {})
        for kind in self.state_names(shard.name):
            if kind in state:
                yield Stored(kind, shard.shape, shard.start, shard.of(state[kind]))

    def stored_bytes(self, shard: Shard) -> int:
        """Bytes of what is written of a shard."""
        return shard.count * shard.master.element_size() * len(self.state_names(shard.name))

    def describe(self, group: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
        """A parameter group in one line for people."""
        names = group["names"]
        what = "heads" if names[0].startswith(HEADS) else self.rest
        elements = sum(torch.Size(shapes[name]).numel() for name in names)
        return (
            f"{self.title}, lr {group['peak_lr']:g}: {what}, {len(names)} parameters, {elements:,} elements"
        )


def parameter_group(
    named: Named, peak_lr: float, weight_decay: float, rate: str = "lr"
) -> list[dict[str, Any]]:
    """A parameter group, or none for no parameters; `rate` is what the log calls its learning rate."""
    named = list(named)
    group = {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "rate": rate,
        "lr": peak_lr,
        "peak_lr": peak_lr,
        "weight_decay": weight_decay,
    }
    return [group] if named else []


def elementwise_groups(named: Named, config: Optimizer) -> list[dict[str, Any]]:
    """Groups of an element-wise update. Heads that only training has are one of their own: where they come or
    go between the stages of a run, nothing changes for the others."""
    named = list(named)
    rest = [(name, p) for name, p in named if not name.startswith(HEADS)]
    heads = [(name, p) for name, p in named if name.startswith(HEADS)]
    return [
        *parameter_group(rest, config.lr, config.weight_decay),
        *parameter_group(heads, config.lr, config.weight_decay),
    ]


class Exchange(NamedTuple):
    """Matrices that a step brings together on one process each and takes back."""

    bytes: float
    """Of all of them, as they are sent."""
    flops: float
    """Of what is done with them, over all processes."""


NO_EXCHANGE = Exchange(0.0, 0.0)


def _no_bytes(_named: Named) -> float:
    return 0.0


def _nothing(_named: Named, _config: Optimizer, _model: Model) -> Exchange:
    return NO_EXCHANGE


@dataclass(frozen=True)
class OptimizerEntry:
    """A kind of optimizer (`optimizer.kind`): all that the engine asks of it.

    Its module in `optim/` has the kind's name.
    """

    build: Callable[[Named, Optimizer, torch.device, Model | None], TrainingOptimizer]
    """As `build_optimizer`, of parameters that need a gradient."""
    state: tuple[str, ...]
    """All that it stores of some parameter, as checkpoints name it."""
    state_bytes: Callable[[Named, Optimizer, Model, int], dict[str, float]]
    """Bytes of that state for some parameters, by purpose, for people and the planner; the last argument is
    bytes of an element of the masters. On the device."""
    passes: int
    """Passes over memory of an update, reads and writes, as a loop over operations."""
    fused_passes: int | None = None
    """The same in one kernel on CUDA; None where there is none."""
    temporaries: int = 0
    """Temporaries of the loop, in units of the largest tensor that it updates at once."""
    host_bytes: Callable[[Named], float] = _no_bytes
    """Bytes of state in the host's memory; weights and gradients go there, and weights come back."""
    exchange: Callable[[Named, Optimizer, Model], Exchange] = _nothing
    """What is sent and computed besides the element-wise update."""


def optimizer_entry(kind: str) -> OptimizerEntry:
    """The entry of a kind."""
    return registry.entry("optim", kind)


def optimizer_kinds() -> tuple[str, ...]:
    """All that a configuration can name."""
    return get_args(Optimizer.model_fields["kind"].annotation)
