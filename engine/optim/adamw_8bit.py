"""AdamW with 8-bit moments, at any ZeRO stage: torchao's update on the shards that ZeRO made.

Each moment is one byte an element and one FP32 scale for 256 of them, by the dynamic map of Dettmers et al.
(arXiv 2110.02861). Weights and gradients stay FP32, and an update uses its moments before they are rounded.
As in torchao and bitsandbytes, parameters below 4,096 elements keep FP32 moments, and so do those whose
elements are no multiple of 256.

ZeRO cuts the flattened weights anywhere, so a block of 256 may lie on several processes:

    parameter        |    block 0    |    block 1    |    block 2    |
    rank 0, rank 1   [ whole blocks, its own  . shared][. whole blocks]

Blocks are counted from the parameter's first element. Whole ones are updated where they lie. Of a shared one
the processes agree on the largest magnitude in one all-reduce, so it has one scale everywhere: the state does
not depend on the stage or on the number of processes, and a checkpoint holds one code for each element.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from millrace.engine.config import Model, Optimizer
from millrace.engine.distributed.process_group import gather_objects, world_size
from millrace.engine.distributed.zero_shards import Shard
from millrace.engine.model.fp8 import TORCHAO
from millrace.engine.optim.adamw import ADAM_STATE
from millrace.engine.optim.training_optimizer import (
    Named,
    OptimizerEntry,
    Stored,
    TrainingOptimizer,
    elementwise_groups,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.quiet_imports import quiet_imports

BLOCK = 256
"""Elements that share a scale."""
SMALLEST = 4096
"""Elements of the smallest parameter that has 8-bit moments."""
CODES = tuple(f"{moment}_8bit" for moment in ADAM_STATE)
"""Places in the dynamic map, one byte an element."""
SCALES = tuple(f"{moment}_scale" for moment in ADAM_STATE)
"""Largest magnitude of each block."""
COMPILED_BLOCKS, LOOP_BLOCKS = 2**16, 2**12
"""Blocks that are updated at once: as one kernel, and as a loop over operations, whose temporaries take
about 100 bytes an element."""
LOOP_PASSES = 330
"""Of an update as a loop: the search for the nearest of 256 values 146 for each moment, the rest 38."""
KERNEL_PASSES = 4
"""In one kernel: reads weight, gradient and two bytes, writes all but the gradient."""


def has_8bit_moments(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this shape has them, or keeps FP32 moments."""
    elements = math.prod(shape)
    return elements >= SMALLEST and elements % BLOCK == 0


@dataclass(frozen=True)
class _Place:
    """Where the moments of a shard lie in the state of its master."""

    shard: Shard
    quantized: bool
    at: int
    """First element, among those of the master that are quantized, or among those that are not."""
    block_at: int
    """First block, among those of the master."""

    @property
    def first_block(self) -> int:
        return self.shard.start // BLOCK

    @property
    def blocks(self) -> int:
        """Blocks that have an element here."""
        return _blocks(self.shard.start + self.shard.count) - self.first_block if self.shard.count else 0


@dataclass
class _Layout:
    """The state of a master: FP32 moments of some shards, codes and scales of the others."""

    places: list[_Place] = field(default_factory=list)
    codes: int = 0
    blocks: int = 0
    plain: int = 0
    shared: list[tuple[str, int]] = field(default_factory=list)
    """Parameter and number of each block that lies on several processes, the same on all of them."""

    def add(self, shard: Shard) -> _Place:
        quantized = has_8bit_moments(shard.shape)
        place = _Place(shard, quantized, self.codes if quantized else self.plain, self.blocks)
        self.places.append(place)
        if quantized:
            self.codes += shard.count
            self.blocks += place.blocks
        else:
            self.plain += shard.count
        return place


class AdamW8bit(TrainingOptimizer):
    """AdamW (arXiv 1711.05101) with block-wise quantized moments.

    `attach` must be called before the first step: it says where the shards are.
    """

    title = "AdamW, 8-bit moments"
    storage = "uint8 and a float32 scale for 256 elements, float32 of small parameters"
    quantized = CODES

    def __init__(self, groups: list[dict[str, Any]], **settings: object) -> None:
        super().__init__(groups, settings)
        self._torchao = _torchao()
        self._layouts: dict[int, _Layout] = {}
        self._places: dict[str, _Place] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def state_names(self, name: str) -> tuple[str, ...]:
        return (*CODES, *SCALES) if has_8bit_moments(self._shapes[name]) else ADAM_STATE

    def state_shape(self, kind: str, shard: Shard) -> tuple[int, ...]:
        return (math.prod(shard.shape) // BLOCK,) if kind in SCALES else shard.shape

    def counts_updates(self, _name: str) -> bool:
        return True

    def attach(self, shards: list[Shard], stage: int) -> None:
        """Lay out the state of each master, and find the blocks that lie on several processes. Collective."""
        self._shapes = {shard.name: shard.shape for shard in shards}
        for shard in shards:
            layout = self._layouts.setdefault(id(shard.master), _Layout())
            self._places[shard.name] = layout.add(shard)
        if stage == 0 or world_size() == 1:
            return
        held = gather_objects([(shard.start, shard.count) for shard in shards])
        for i, shard in enumerate(shards):
            if has_8bit_moments(shard.shape):
                cuts = {start for start, count in (of_rank[i] for of_rank in held) if count}
                shared = sorted({cut // BLOCK for cut in cuts if cut % BLOCK})
                self._layouts[id(shard.master)].shared += [(shard.name, block) for block in shared]

    def begin(self, master: Tensor, _name: str, updates: int = 0) -> None:
        layout, device = self._layouts[id(master)], master.device
        state = {"step": torch.tensor(float(updates))}
        state |= {kind: torch.zeros(layout.codes, dtype=torch.uint8, device=device) for kind in CODES}
        state |= {kind: torch.zeros(layout.blocks, device=device) for kind in SCALES}
        state |= {kind: torch.zeros(layout.plain, device=device) for kind in ADAM_STATE}
        self.state[master] = state

    def stored(self, shard: Shard, written: bool = True) -> Iterator[Stored]:
        state, place = self.state.get(shard.master, {}), self._places[shard.name]
        if not state:
            return
        start, end = shard.start, shard.start + shard.count
        at = place.at + start - place.shard.start
        for kind in CODES if place.quantized else ADAM_STATE:
            yield Stored(kind, shard.shape, start, state[kind][at : at + shard.count])
        if not place.quantized:
            return
        # Who has the first element of a block writes its scale; who has any element reads it.
        first, last = (_blocks(start) if written else start // BLOCK), _blocks(end)
        at = place.block_at + first - place.first_block
        for kind in SCALES:
            yield Stored(kind, self.state_shape(kind, shard), first, state[kind][at : at + last - first])

    def stored_bytes(self, shard: Shard) -> int:
        if not has_8bit_moments(shard.shape):
            return 2 * 4 * shard.count
        return 2 * (shard.count + 4 * (_blocks(shard.start + shard.count) - _blocks(shard.start)))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights and moments, unless the step is skipped. Collective at ZeRO stages 1 to 3."""
        if self.skip:
            return
        for group in self.param_groups:
            masters = [master for master in group["params"] if master.grad is not None]
            if masters and self.gradient_scale != 1.0:
                torch._foreach_mul_([master.grad for master in masters], self.gradient_scale)
            lr = torch.tensor(group["lr"], dtype=torch.float32)
            for master in masters:
                self._update(master, group, lr)

    def _update(self, master: Tensor, group: dict[str, Any], lr: Tensor) -> None:
        if id(master) not in self._layouts:
            raise RuntimeError("AdamW8bit.attach(shards, stage) has to be called before the first step")
        if not self.state[master]:
            self.begin(master, "")
        layout, state = self._layouts[id(master)], self.state[master]
        state["step"] += 1
        (beta1, beta2), decay, eps = group["betas"], group["weight_decay"], group["eps"]
        fused = master.device.type == "cuda"
        compiled = self._torchao.compiled if fused else self._torchao.update
        gradient = master.grad.reshape(-1)

        def update(function: Callable, shard: Shard, at: int, count: int, moments: list[Tensor]) -> None:
            """Of `count` elements from `at` on, counted in the shard."""
            part = slice(shard.offset + at, shard.offset + at + count)
            function(
                master.detach().view(-1)[part],
                gradient[part],
                state["step"],
                *moments,
                None,
                lr,
                beta1,
                beta2,
                decay,
                eps,
                True,
                False,
            )

        most = COMPILED_BLOCKS if fused else LOOP_BLOCKS
        for place in layout.places:
            shard = place.shard
            if not place.quantized:
                if shard.count:
                    moments = [state[kind][place.at : place.at + shard.count] for kind in ADAM_STATE]
                    update(compiled, shard, 0, shard.count, moments)
                continue
            end = (shard.start + shard.count) // BLOCK
            for block in range(_blocks(shard.start), end, most):
                count = min(most, end - block)
                update(
                    compiled,
                    shard,
                    block * BLOCK - shard.start,
                    count * BLOCK,
                    self._moments(state, place, block, count),
                )
        if layout.shared:
            self._update_shared(layout, state, functools.partial(update, self._torchao.update))

    def _moments(self, state: dict[str, Tensor], place: _Place, block: int, count: int) -> list[Tensor]:
        """Both moments of whole blocks, as torchao's tensors."""
        at = place.at + block * BLOCK - place.shard.start
        scale_at = place.block_at + block - place.first_block
        found = []
        for signed, codes, scales in zip((True, False), CODES, SCALES, strict=True):
            code = state[codes][at : at + count * BLOCK]
            scale = state[scales][scale_at : scale_at + count]
            qmap = self._torchao.qmap(signed, code.device)
            found.append(self._torchao.tensor(code, scale, qmap, signed, dtype=torch.float32))
        return found

    def _update_shared(
        self,
        layout: _Layout,
        state: dict[str, Tensor],
        update: Callable[[Shard, int, int, list[Tensor]], None],
    ) -> None:
        """The blocks that lie on several processes. Collective."""
        torchao, device = self._torchao, state[SCALES[0]].device
        largest = torch.zeros(len(layout.shared), 2, device=device)
        mine = []
        for i, (name, block) in enumerate(layout.shared):
            place = self._places[name]
            shard = place.shard
            low = max(shard.start, block * BLOCK)
            count = min(shard.start + shard.count, (block + 1) * BLOCK) - low
            if count <= 0:
                continue
            at = place.at + low - shard.start
            codes = [state[kind][at : at + count] for kind in CODES]
            block_at = place.block_at + block - place.first_block
            scales = [state[kind][block_at : block_at + 1] for kind in SCALES]
            qmaps = [torchao.qmap(signed, device) for signed in (True, False)]
            moments = [torchao.dequantize(*parts) for parts in zip(codes, qmaps, scales, strict=True)]
            update(shard, low - shard.start, count, moments)
            for j, moment in enumerate(moments):
                largest[i, j] = moment.abs().amax()
            mine.append((i, moments, codes, qmaps, scales))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        largest.clip_(1e-12)  # as torchao's `scale_tensor`
        for i, *parts in mine:
            for j, (moment, code, qmap, scale) in enumerate(zip(*parts, strict=True)):
                scale.copy_(largest[i, j : j + 1])
                code.copy_(torchao.quantize(moment / scale, qmap))


def _blocks(elements: int) -> int:
    """Blocks that begin before an element."""
    return -(-elements // BLOCK)


@functools.cache
def _torchao() -> SimpleNamespace:
    """What is used of torchao. Raises UserError where it is not installed."""
    try:
        with quiet_imports():
            from torchao.optim.adam import single_param_adam
            from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap
            from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned
    except ImportError:
        raise UserError(
            f"optimizer.kind adamw_8bit needs torchao: pip install {TORCHAO}, or take adamw"
        ) from None

    @functools.cache
    def qmap(signed: bool, device: torch.device) -> Tensor:
        return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=device)

    @functools.cache
    def fused() -> Callable:
        return torch.compile(single_param_adam, fullgraph=True, dynamic=False)

    def compiled(*arguments: object) -> None:
        # As torchao does: one graph for each length that occurs, of which there are few.
        with torch._dynamo.utils.disable_cache_limit():
            fused()(*arguments)

    return SimpleNamespace(
        update=single_param_adam,
        compiled=compiled,
        tensor=OptimState8bit,
        quantize=quantize_8bit_with_qmap,
        dequantize=dequant_with_qmap,
        qmap=qmap,
    )


def _build(named: Named, config: Optimizer, _device: torch.device, _model: Model | None) -> TrainingOptimizer:
    return AdamW8bit(elementwise_groups(named, config), betas=config.betas, eps=config.eps)


def _state_bytes(named: Named, _config: Optimizer, _model: Model, stored: int) -> dict[str, float]:
    sizes = [(p.numel(), has_8bit_moments(tuple(p.shape))) for _, p in named]
    return {"8-bit Adam moments": 2.0 * sum(n + 4 * n / BLOCK if small else stored * n for n, small in sizes)}


ENTRY = OptimizerEntry(
    build=_build,
    state=(*CODES, *SCALES, *ADAM_STATE),
    state_bytes=_state_bytes,
    passes=LOOP_PASSES,
    fused_passes=KERNEL_PASSES,
)
