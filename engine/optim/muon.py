"""Muon for matrices and AdamW for everything else, at any ZeRO stage.

For a matrix W (m x n) with gradient G (Jordan et al. 2024, kellerjordan.github.io/posts/muon):

    B <- mu B + (1 - mu) G                      or mu B + G (`form` sum)
    U  = (1 - mu) G + mu B                      or G + mu B; without Nesterov's momentum U = B
    O  = newton_schulz(U)                       about the orthogonal factor of U
    W <- W - lr weight_decay W - lr scale O     scale 0.2 sqrt(max(m, n)), or sqrt(max(1, m / n))

Momentum and weights are element-wise and stay in the shards that ZeRO made. For the third line every matrix
is brought together on one process (`exchange.py`), chosen so that all have the same work: no matrix is
orthogonalised twice in a job.
"""

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from millrace.engine.config import Model, Optimizer
from millrace.engine.config import Muon as MuonConfig
from millrace.engine.distributed import process_group
from millrace.engine.distributed.zero_shards import Shard
from millrace.engine.optim.adamw import (
    ADAM_STATE,
    FUSED_PASSES,
    PASSES,
    TEMPORARIES,
    SkippableAdamW,
    adamw_settings,
)
from millrace.engine.optim.exchange import Matrix, Part, Round, rounds
from millrace.engine.optim.matrices import Stack, block_matrices
from millrace.engine.optim.training_optimizer import (
    Exchange,
    Named,
    OptimizerEntry,
    TrainingOptimizer,
    elementwise_groups,
    parameter_group,
)
from millrace.engine.util.errors import UserError
from millrace.kernels.ops.newton_schulz import newton_schulz

RATE = "muon_lr"
"""What the log calls the learning rate of the matrices, and by which their group is known."""
ROUND_ELEMENTS = 2**27
"""Elements that a process orthogonalises before it exchanges the next: bounds the memory that this takes."""


def update_scale(kind: str, rows: int, columns: int) -> float:
    """Factor of a matrix's orthogonalised update.

    `rms` (Liu et al., arXiv 2502.16982) gives it the root mean square of 0.2 that AdamW's updates have.
    """
    if kind == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(SkippableAdamW):
    """One optimizer of two kinds of parameter groups, told apart by their key "rate".

    `attach` must be called before the first step: it says where the shards are. The gradients of Muon's
    groups serve as memory for the update and do not survive the step. A parameter without a gradient
    counts as one whose gradient is zero, because all processes must agree on what is exchanged.

    Args:
        groups: parameter groups; one of Muon has RATE as "rate" and "names", the names of its parameters.
        stacks: the matrices of each of Muon's parameters by name.
        config: `optimizer.muon`.
        settings: of AdamW.
    """

    def __init__(
        self, groups: list[dict[str, Any]], stacks: dict[str, Stack], config: MuonConfig, **settings: object
    ) -> None:
        super().__init__(groups, **settings)
        self.config, self.stacks = config, stacks
        if stacks:
            self.rest = "the rest"
        self._plans: dict[int, _Plan] = {}

    def state_names(self, name: str) -> tuple[str, ...]:
        return ("momentum",) if name in self.stacks else super().state_names(name)

    def counts_updates(self, name: str) -> bool:
        return name not in self.stacks

    def describe(self, group: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
        if group["rate"] != RATE:
            return super().describe(group, shapes)
        kinds: Counter[tuple[int, int]] = Counter()
        for name in group["names"]:
            kinds[self.stacks[name].rows, self.stacks[name].columns] += self.stacks[name].count
        table = ", ".join(f"{count} of {m} x {n}" for (m, n), count in kinds.items())
        elements = sum(torch.Size(shapes[name]).numel() for name in group["names"])
        config = self.config
        return (
            f"Muon, lr {group['peak_lr']:g}, momentum {config.momentum:g}, {config.scale} scale, "
            f"{config.dtype}: {sum(kinds.values())} matrices ({table}), {elements:,} elements"
        )

    def attach(self, shards: list[Shard], stage: int) -> None:
        """Plan the exchange of matrices between all processes. Collective.

        Args:
            shards: of this rank, one for each parameter, in the same order on every rank.
            stage: ZeRO stage. At 0 all masters are updated in one step; at 1 and 2 those of a group, and at 3
                those of a sub-group, lie in one tensor and are updated by a step of their own.
        """
        mine = [shard for shard in shards if shard.name in self.stacks]
        by_master: dict[int, list[int]] = {}
        for i, shard in enumerate(mine):
            by_master.setdefault(0 if stage == 0 else id(shard.master), []).append(i)
        held = process_group.gather_objects([(shard.start, shard.count) for shard in mine])
        for members in by_master.values():
            parts = [mine[i] for i in members]
            ranges = [[of_rank[i] for i in members] for of_rank in held]
            plan = _Plan(parts, self.stacks, ranges, replicated=stage == 0)
            for shard in parts:
                self._plans[id(shard.master)] = plan

    @property
    def orthogonalised(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that are this process's work in a step."""
        plans = {id(plan): plan for plan in self._plans.values()}
        return [(m.rows, m.columns) for plan in plans.values() for r in plan.rounds for m in r.mine]

    def step(self, closure: None = None) -> None:
        """Update the weights and the state, unless the step is skipped. Collective."""
        if self.skip:
            return
        # DeepSpeed, too, chooses what a step updates by changing the groups.
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["rate"] != RATE]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["rate"] == RATE and group["params"]:
                self._step_matrices(group)

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        masters: list[Tensor] = group["params"]
        if id(masters[0]) not in self._plans:
            raise RuntimeError("Muon.attach(shards, stage) has to be called before the first step")
        plan = self._plans[id(masters[0])]
        updates = self._momentum(masters)
        local = [shard.of(updates[id(shard.master)]) for shard in plan.shards]
        for exchange in plan.rounds:
            flat = exchange.bring(local, getattr(torch, self.config.dtype))
            self._orthogonalise(flat, exchange.mine)
            self._apply(plan, exchange, flat, group)

    def _momentum(self, masters: list[Tensor]) -> dict[int, Tensor]:
        """Update the momentum of whole masters; what is to be orthogonalised, by the id of the master."""
        mu, config = self.config.momentum, self.config
        gradients = [torch.zeros_like(m) if m.grad is None else m.grad for m in masters]
        if self.gradient_scale != 1.0:
            torch._foreach_mul_(gradients, self.gradient_scale)
        for master in masters:
            if "momentum" not in self.state[master]:
                self.state[master]["momentum"] = torch.zeros_like(master)
        momenta = [self.state[master]["momentum"] for master in masters]
        if config.form == "lerp":
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
        else:
            torch._foreach_mul_(momenta, mu)
            torch._foreach_add_(momenta, gradients)
        if not config.nesterov:
            gradients = momenta
        elif config.form == "lerp":
            torch._foreach_lerp_(gradients, momenta, mu)
        else:
            torch._foreach_add_(gradients, momenta, alpha=mu)
        return {id(master): update for master, update in zip(masters, gradients, strict=True)}

    def _orthogonalise(self, flat: Tensor, matrices: list[Matrix]) -> None:
        """In place; equal shapes next to each other are one batch."""
        at = first = 0
        for i, matrix in enumerate(matrices):
            following = matrices[i + 1] if i + 1 < len(matrices) else None
            if following is None or (following.rows, following.columns) != (matrix.rows, matrix.columns):
                count = i + 1 - first
                stack = flat[at : at + count * matrix.size].view(count, matrix.rows, matrix.columns)
                stack.copy_(
                    newton_schulz(stack, self.config.steps, self.config.coefficients, dtype=flat.dtype)
                )
                at, first = at + count * matrix.size, i + 1

    def _apply(self, plan: "_Plan", exchange: Round, flat: Tensor, group: dict[str, Any]) -> None:
        """Take the results back and change the weights."""
        lr, decay = group["lr"], group["weight_decay"]
        by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for part, result in exchange.take_back(flat):
            scale = update_scale(self.config.scale, part.matrix.rows, part.matrix.columns)
            weights, results = by_scale.setdefault(scale, ([], []))
            weights.append(plan.weights(part))
            results.append(result)
        for scale, (weights, results) in by_scale.items():
            if decay:
                torch._foreach_mul_(weights, 1 - lr * decay)
            torch._foreach_add_(weights, results, alpha=-lr * scale)


class _Plan:
    """What is exchanged in a step that updates the given shards."""

    def __init__(
        self,
        shards: list[Shard],
        stacks: dict[str, Stack],
        ranges: list[list[tuple[int, int]]],
        replicated: bool,
    ) -> None:
        self.shards = shards
        matrices = [
            Matrix(i, part * stack.rows * stack.columns, stack.rows, stack.columns)
            for i, shard in enumerate(shards)
            for stack in (stacks[shard.name],)
            for part in range(stack.count)
        ]
        self.rounds = rounds(matrices, ranges, process_group.rank(), replicated, ROUND_ELEMENTS)

    def weights(self, part: Part) -> Tensor:
        """The master's elements (count,) of a part."""
        shard = self.shards[part.matrix.parameter]
        return shard.of(shard.master)[part.start : part.start + part.count]


def muon_stacks(named: Named, config: Optimizer, model: Model | None) -> dict[str, Stack]:
    """The matrices of each parameter that gets Muon, by name. Raises UserError."""
    if model is None:
        raise ValueError("Muon needs the model's configuration, which knows the matrices")
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
    stacks = {name: block_matrices(name, shape, model, config.muon.chunked) for name, shape in shapes.items()}
    if config.muon.parameters is None:
        return {name: stack for name, stack in stacks.items() if stack is not None}
    chosen: dict[str, Stack] = {}
    for pattern in config.muon.parameters:
        found = fnmatch.filter(shapes, pattern)
        if not found:
            raise UserError(
                f"optimizer.muon.parameters: {pattern!r} is no parameter; names are such as {_some(shapes)}"
            )
        for name in found:
            stack = stacks[name]
            if stack is None:
                kind = (
                    "no matrix of a block" if len(shapes[name]) == 2 else f"{len(shapes[name])}-dimensional"
                )
                raise UserError(
                    f"optimizer.muon.parameters: {pattern!r} names {name}, which is {kind}; Muon is for the "
                    "matrices of the blocks, leave the others to AdamW"
                )
            chosen[name] = stack
    return chosen


def _some(names: Iterable[str]) -> str:
    return ", ".join([name for name in names if name.endswith(".weight")][:3])


def _build(named: Named, config: Optimizer, device: torch.device, model: Model | None) -> TrainingOptimizer:
    named = list(named)
    stacks = muon_stacks(named, config, model)
    matrices = [(name, p) for name, p in named if name in stacks]
    rest = [(name, p) for name, p in named if name not in stacks]
    muon = config.muon
    groups = parameter_group(matrices, muon.lr or config.lr, muon.weight_decay, RATE)
    groups += elementwise_groups(rest, config)
    return Muon(groups, stacks, muon, **adamw_settings(config, device))


def _state_bytes(named: Named, config: Optimizer, model: Model, stored: int) -> dict[str, float]:
    sizes = {name: p.numel() for name, p in named}
    matrices = sum(sizes[name] for name in muon_stacks(named, config, model))
    rest = sum(sizes.values()) - matrices
    return {"Adam moments": 2.0 * stored * rest, "Muon momentum": 1.0 * stored * matrices}


def _exchange(named: Named, config: Optimizer, model: Model) -> Exchange:
    stacks = muon_stacks(named, config, model).values()
    matrices = [Matrix(0, 0, stack.rows, stack.columns) for stack in stacks for _ in range(stack.count)]
    sent = getattr(torch, config.muon.dtype).itemsize * sum(m.size for m in matrices)
    return Exchange(sent, config.muon.steps * sum(m.flops for m in matrices))


ENTRY = OptimizerEntry(
    build=_build,
    state=(*ADAM_STATE, "momentum"),
    state_bytes=_state_bytes,
    passes=PASSES,  # as AdamW's, the products apart
    fused_passes=FUSED_PASSES,
    temporaries=TEMPORARIES,
    exchange=_exchange,
)
