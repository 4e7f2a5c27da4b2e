"""Optimizer construction: parameter groups, and the learning rate of each."""

from collections.abc import Iterable

import torch

from millrace.engine.config import Model, Optimizer, Schedule
from millrace.engine.optim.schedule import learning_rate
from millrace.engine.optim.training_optimizer import Named, TrainingOptimizer, optimizer_entry


def build_optimizer(
    parameters: Named, config: Optimizer, device: torch.device, model: Model | None = None
) -> TrainingOptimizer:
    """The optimizer of a run.

    Args:
        parameters: (name, parameter) of all that are trained.
        model: the denoiser's; `kind` muon needs it to know the matrices.

    Raises UserError if `optimizer.muon.parameters` names what cannot have Muon.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    return optimizer_entry(config.kind).build(named, config, device, model)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, config: Schedule, steps: int
) -> dict[str, float]:
    """Give every group its rate of step `step` (0-based) of a schedule of `steps`.

    Returns the rates by the names that the groups have for them, one as "lr" where all are equal.
    """
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["peak_lr"], config, steps)
        rates[group["rate"]] = group["lr"]
    if "lr" not in rates or len(set(rates.values())) == 1:
        rates = {"lr": next(iter(rates.values()))}
    return rates


def describe_optimizer(
    named_shapes: Iterable[tuple[str, tuple[int, ...]]], optimizer: TrainingOptimizer
) -> list[str]:
    """One line for each kind of update: how many matrices of which shape, who gets what."""
    shapes = dict(named_shapes)
    return [optimizer.describe(group, shapes) for group in optimizer.param_groups]
