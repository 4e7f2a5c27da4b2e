"""Freezing of parameters: which are trained, and in which dtype the others are stored."""

import torch
from torch import nn

from millrace.engine.config import Config
from millrace.engine.distributed.zero_shards import Shard
from millrace.engine.model.adapters import AdaptedLinear, adapted_layers, is_factor, matching
from millrace.engine.optim.training_optimizer import HEADS
from millrace.engine.util.errors import UserError


def freeze(model: nn.Module, config: Config) -> None:
    """Let only those parameters need a gradient that the run trains.

    With an adapter: its factors, heads that only training has, and `adapter.unfrozen`; else all. Those of
    `optimizer.frozen` never. Raises UserError where a pattern names nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    trained = set(named)
    if config.adapter.active:
        own = [name for name in named if not is_factor(name) and not name.startswith(HEADS)]
        extra = matching(config.adapter.unfrozen, own, "adapter.unfrozen", "parameter of the model")
        both = [layer for layer in adapted_layers(named) if f"{layer}.weight" in extra]
        if both:
            raise UserError(
                f"adapter.unfrozen names {both[0]}.weight, whose layer has an adapter; take it out there, or "
                "out of adapter.targets"
            )
        trained -= set(own) - extra
    trained -= matching(config.optimizer.frozen, named, "optimizer.frozen", "parameter")
    if not trained:
        raise UserError("optimizer.frozen names all that would be trained; leave something out")
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


@torch.no_grad()
def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen parameters of linear layers in the dtype of products.

    They are multiplied by the values that autocast would make of them, so nothing is lost. Norms and other
    parameters that enter FP32 arithmetic stay as they are.
    """
    for module in model.modules():
        if type(module) in (nn.Linear, AdaptedLinear):
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        if isinstance(module, AdaptedLinear):
            module.measure()


def describe_frozen(frozen: list[Shard], config: Config) -> list[str]:
    """Lines for people: the adapter, and what is not trained; none where everything is."""
    lines = []
    if (adapter := config.adapter).active:
        layers = ", ".join(adapter.targets)
        lines.append(f"adapter: {adapter.kind}, rank {adapter.rank}, scale {adapter.scale:g}, on {layers}")
    if frozen:
        elements = sum(shard.count for shard in frozen)
        lines.append(f"frozen: {len(frozen)} parameters, {elements:,} elements, as checkpoints hold them too")
    return lines
