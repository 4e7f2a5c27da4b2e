"""Freezing of parameters: which are trained, and in which dtype the others are stored."""

import torch
from torch import nn

from millrace.engine.config import Config
from millrace.engine.distributed.zero_shards import Shard
from millrace.engine.model.adapters import AdaptedLinear, adapted_layers, add_adapter, is_factor, matching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError

HEADS = "alignment."
"""What the names of parameters start with that only training has."""


def freeze(model: nn.Module, config: Config, heads: bool = True) -> None:
    """Let only those parameters need a gradient that the run trains.

    With an adapter: its factors, heads that only training has, and `adapter.unfrozen`; else all. Those of
    `optimizer.frozen` never. Raises UserError where a pattern names nothing, or nothing is left to train.

    Args:
        heads: whether the model has its heads; if not, what is said of them is passed over.
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
    still = [pattern for pattern in config.optimizer.frozen if heads or not pattern.startswith(HEADS)]
    trained -= matching(still, named, "optimizer.frozen", "parameter")
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
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        if isinstance(module, AdaptedLinear):
            module.measure()


def lay_out(denoiser: Denoiser, config: Config) -> None:
    """What becomes of a denoiser without data in a run of `config`: adapter, frozen parameters and dtypes."""
    add_adapter(denoiser, config.adapter, None)
    freeze(denoiser, config, heads=False)
    store_frozen(denoiser, getattr(torch, config.precision.compute))


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
