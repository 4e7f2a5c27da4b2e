"""ZeRO shards: where this rank's FP32 master weights lie, at any stage.

DeepSpeed keeps FP32 masters in flat tensors whose layout depends on the stage. A `Shard` says which elements
of which named parameter lie where in which of them. Checkpoints, EMA, the precision audit and sampling
all work on shards, so none of them knows about stages, and optimizer state is found under the same tensor.

- stage 0: the parameter itself, whole, on every rank.
- stages 1 and 2: a slice of the rank's partition of the flattened parameter group.
- stage 3: the rank's slice of each parameter, gathered in sub-group tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.engine.distributed.process_group import rank, world_size


@dataclass(frozen=True)
class Shard:
    """A contiguous run of one parameter's elements held by this rank, possibly of none."""

    name: str
    shape: tuple[int, ...]
    """Full shape of the parameter."""
    start: int
    """First element held, counted in the flattened parameter."""
    count: int
    """Elements held."""
    master: Tensor
    """Tensor that the optimizer updates, and the key of its state."""
    offset: int
    """Place of the first element in the flattened `master`."""
    written: range | None = None
    """The elements that this rank writes to a checkpoint, where they are not all that it holds: at stage 0,
    where every rank holds everything, its equal share."""

    def of(self, like_master: Tensor) -> Tensor:
        """These elements (count,) in a tensor laid out like `master`: itself, a moment, an average."""
        return like_master.detach().view(-1)[self.offset : self.offset + self.count]

    def part(self, elements: range) -> "Shard":
        """Some of these elements, counted in the flattened parameter."""
        place = self.offset + elements.start - self.start
        return replace(self, start=elements.start, count=len(elements), offset=place, written=None)

    @property
    def to_write(self) -> "Shard":
        """Those that this rank writes to a checkpoint."""
        return self if self.written is None else self.part(self.written)

    @property
    def copies(self) -> "list[Shard]":
        """Those that another rank writes: what lies before and after its own."""
        if self.written is None:
            return []
        end = self.start + self.count
        return [self.part(range(self.start, self.written.start)), self.part(range(self.written.stop, end))]


def local_shards(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]], optimizer: object, stage: int
) -> list[Shard]:
    """Shards of this rank, one for each trained parameter in order; empty where it holds nothing of it.

    Args:
        parameters: a module, or (name, parameter) of what it trains.
        optimizer: what `deepspeed.initialize` returned.
        stage: ZeRO stage.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    named = [(name, p) for name, p in parameters if p.requires_grad]
    if stage == 0:
        return _whole(named)
    if stage == 3:
        return [_stage3_shard(optimizer, name, p) for name, p in named]
    groups = {id(p): i for i, group in enumerate(optimizer.bit16_groups) for p in group}
    return [_partition_shard(optimizer, name, p, groups[id(p)]) for name, p in named]


def frozen_shards(module: nn.Module) -> list[Shard]:
    """Shards of the parameters that are not trained: whole on every rank at stages 0 to 2, of which each
    writes its equal share to a checkpoint."""
    return _whole([(name, p) for name, p in module.named_parameters() if not p.requires_grad])


def _whole(named: list[tuple[str, nn.Parameter]]) -> list[Shard]:
    """All elements of all parameters, as at stage 0, of which each rank writes one run of the same length."""
    total, shards, before = sum(p.numel() for _, p in named), [], 0
    first, stop = (total * number // world_size() for number in (rank(), rank() + 1))
    for name, p in named:
        low, high = (min(max(bound - before, 0), p.numel()) for bound in (first, stop))
        written = None if (low, high) == (0, p.numel()) else range(low, high)
        shards.append(Shard(name, tuple(p.shape), 0, p.numel(), p, 0, written))
        before += p.numel()
    return shards


def _partition_shard(optimizer: object, name: str, parameter: nn.Parameter, group: int) -> Shard:
    shape, master = tuple(parameter.shape), optimizer.single_partition_of_fp32_groups[group]
    mapping = parameter._hp_mapping
    if mapping is None:
        return Shard(name, shape, 0, 0, master, 0)
    held, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Shard(name, shape, held.start, held.numel, master, place.start)


def _stage3_shard(optimizer: object, name: str, parameter: nn.Parameter) -> Shard:
    group, offset, slice_size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    shape, master = tuple(parameter.ds_shape), optimizer.fp32_partitioned_groups_flat[group]
    start = slice_size * optimizer._get_param_partition_rank(parameter)
    count = min(slice_size, parameter.ds_numel - start)  # the last rank's slice is padded
    if count <= 0:
        return Shard(name, shape, 0, 0, master, 0)
    return Shard(name, shape, start, count, master, offset)


def masters(shards: list[Shard]) -> list[Tensor]:
    """The distinct master tensors of this rank, in order."""
    return list({id(shard.master): shard.master for shard in shards}.values())


def gather_parameters(
    named_shapes: list[tuple[str, tuple[int, ...]]],
    shards: list[Shard],
    stage: int,
    source: Callable[[Tensor], Tensor],
    frozen: Sequence[Shard] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters in FP32, one by one, from all ranks' shards. Collective: no rank may stop early.

    At stage 0 they share the memory of what `source` gives where that is FP32, so they are only to be read.
    At the other stages each is a tensor of its own.

    Args:
        named_shapes: of all parameters, the same on every rank.
        shards: of this rank.
        stage: ZeRO stage; at stage 0 every rank holds everything.
        source: maps a master tensor to what is wanted in its layout (itself, its average).
        frozen: shards of parameters that are not trained, given as they are stored.
    """
    held = {shard.name: shard for shard in shards}
    stored = {shard.name: shard.master for shard in frozen}
    device = shards[0].master.device if shards else torch.device("cpu")
    for name, shape in named_shapes:
        if name in stored:
            yield name, stored[name].detach()
            continue
        if stage == 0 and name in held:
            yield name, held[name].of(source(held[name].master)).float().view(shape)
            continue
        whole = torch.zeros(torch.Size(shape).numel(), device=device)
        if name in held:
            shard = held[name]
            whole[shard.start : shard.start + shard.count] = shard.of(source(shard.master))
        if stage > 0 and world_size() > 1:
            dist.all_reduce(whole)
        yield name, whole.view(shape)
