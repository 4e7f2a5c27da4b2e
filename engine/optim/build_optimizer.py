"""Parameter groups: which parameter gets which optimizer, and at which learning rate."""

import fnmatch
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from millrace.engine.config import Model, Optimizer, Schedule
from millrace.engine.optim.adamw import SkippableAdamW
from millrace.engine.optim.matrices import (
    Stack,
    block_matrices,
)
from millrace.engine.optim.muon import Muon
from millrace.engine.optim.schedule import learning_rate
from millrace.engine.util.errors import UserError

HEADS = "alignment."
"""What the names of parameters start with that only training has."""

Named = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(
    parameters: Named, config: Optimizer, device: torch.device, model: Model | None = None
) -> SkippableAdamW:
    """The optimizer of a run: AdamW in one fused kernel on CUDA, one loop over tensors elsewhere; or Muon.

    Heads that only training has are a group of their own: where they come or go between the stages of a run,
    nothing changes for the others.

    Args:
        parameters: (name, parameter) of all that are trained.
        model: the denoiser's; `kind` muon needs it to know the matrices.

    Raises UserError if `optimizer.muon.parameters` names what cannot have Muon.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    stacks = {} if config.kind == "adamw" else muon_stacks(named, config, model)
    groups = [
        _group([(n, p) for n, p in named if n in stacks], config, muon=True),
        _group([(n, p) for n, p in named if n not in stacks and not n.startswith(HEADS)], config),
        _group([(n, p) for n, p in named if n.startswith(HEADS)], config),
    ]
    groups = [group for group in groups if group["params"]]
    settings = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": True if device.type == "cuda" else None,
    }
    if config.kind == "muon":
        return Muon(groups, stacks, config.muon, **settings)
    return SkippableAdamW(groups, **settings)


def _group(named: list[tuple[str, nn.Parameter]], config: Optimizer, muon: bool = False) -> dict[str, Any]:
    peak = config.muon.lr or config.lr if muon else config.lr
    decay = config.muon.weight_decay if muon else config.weight_decay
    return {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "muon": muon,
        "lr": peak,
        "peak_lr": peak,
        "weight_decay": decay,
    }


def muon_stacks(named: Named, config: Optimizer, model: Model | None) -> dict[str, Stack]:
    """The matrices of each parameter that gets Muon, by name. Raises UserError as `build_optimizer`."""
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


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, config: Schedule, steps: int
) -> dict[str, float]:
    """Give every group its rate of step `step` (0-based) of a schedule of `steps`: {"lr": AdamW's, ...}.

    With Muon's under "muon_lr" where it has its own.
    """
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["peak_lr"], config, steps)
        rates["muon_lr" if group["muon"] else "lr"] = group["lr"]
    if "lr" not in rates or rates.get("muon_lr") == rates["lr"]:
        rates = {"lr": next(iter(rates.values()))}
    return rates


def describe_optimizer(
    named_shapes: Iterable[tuple[str, tuple[int, ...]]], optimizer: SkippableAdamW
) -> list[str]:
    """One line for each kind of update: how many matrices of which shape, who gets what."""
    shapes = dict(named_shapes)
    stacks = optimizer.stacks if isinstance(optimizer, Muon) else {}
    lines = []
    for group in optimizer.param_groups:
        names, lr = group["names"], f"lr {group['peak_lr']:g}"
        elements = sum(torch.Size(shapes[name]).numel() for name in names)
        if not group["muon"]:
            what = "heads" if names[0].startswith(HEADS) else "the rest" if stacks else "everything"
            lines.append(f"AdamW, {lr}: {what}, {len(names)} parameters, {elements:,} elements")
            continue
        kinds: Counter[tuple[int, int]] = Counter()
        for name in names:
            kinds[stacks[name].rows, stacks[name].columns] += stacks[name].count
        table = ", ".join(f"{count} of {m} x {n}" for (m, n), count in kinds.items())
        config = optimizer.config
        lines.append(
            f"Muon, {lr}, momentum {config.momentum:g}, {config.scale} scale, {config.dtype}: "
            f"{sum(kinds.values())} matrices ({table}), {elements:,} elements"
        )
    return lines
