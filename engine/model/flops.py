"""Floating-point operations of the denoiser, from its shapes.

A multiply-add counts as two. Linear layers and attention are counted, element-wise work is not; backward is
twice forward. Modulation runs once per sample, text keys and values once per text token, a routed token only
in the blocks that it visits. "6 x parameters x tokens" would be a third too high.

These are model FLOPs: what the definition of the model needs. Recomputed activations, and the second
computation of the logits in FlashAttention's backward, are work of the implementation and do not count.
SPRINT's fusion layer counts as it is defined, Linear(2C -> C) on every token. `gather_fuse` makes fewer:
2 (T - K) C^2 less forward, 0.3 % of a PRX-1.2B step.
"""

import functools
import re
from collections import Counter
from typing import NamedTuple

import torch

from millrace.engine.config import Adapter, Config, Model, Optimizer, Routing, route_end
from millrace.engine.model import resolution_tokens
from millrace.engine.model.adapters import DOWN, UP, is_factor
from millrace.engine.model.blocks import TIME_FEATURES
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.freezing import lay_out
from millrace.engine.model.guidance_branches import Branch, evaluations
from millrace.engine.model.routing import POLICIES


def forward_flops(
    config: Model, image_tokens: int, text_tokens: float, routed: range, kept: int, fused: bool = False
) -> float:
    """FLOPs of one sample's forward pass.

    Args:
        image_tokens: N of the sample.
        text_tokens: of the sample; for samples of one N, their mean gives the exact mean.
        routed: blocks in which only `kept` image tokens run; an empty range for none.
        fused: whether the model has SPRINT's fusion layer.
    """
    width, depth, features = config.width, config.depth, config.in_channels * config.patch_size**2
    embed = (
        features * config.bottleneck + config.bottleneck * width if config.bottleneck else features * width
    )
    once = TIME_FEATURES * width + width * width  # time vector
    once *= 2 if config.resolution_embedding else 1
    if config.resolution_tokens:
        # Two text tokens that do not come from the text encoder.
        once += resolution_tokens.COUNT * (
            resolution_tokens.FEATURES * width + width * width - config.context_dim * width
        )
        text_tokens += resolution_tokens.COUNT
    once += depth * 6 * width * width + 2 * width * width  # modulation
    total = once + image_tokens * (embed + width * features)
    total += text_tokens * width * (config.context_dim + depth * 2 * width)
    for block in range(depth):
        tokens = kept if block in routed else image_tokens
        total += tokens * (4 * width * width + 3 * width * config.mlp_width)
        total += _attention(config, tokens, text_tokens)
    if fused:
        total += image_tokens * 2 * width * width
    return 2.0 * total


def _attention(config: Model, queries: float, text_tokens: float) -> float:
    """Multiply-adds of one sample's attention in a block: logits, and the mean of values."""
    return 2 * queries * (queries + text_tokens) * config.width


def attention_share(config: Config, image_tokens: int, text_tokens: float) -> float:
    """Share of `training_flops` in the products of attention."""
    model, routing = config.model, config.routing
    joint = text_tokens + (resolution_tokens.COUNT if model.resolution_tokens else 0)
    routed = range(routing.start, route_end(config) + 1)
    kept = POLICIES[routing.policy].kept(routing, image_tokens, routing.drop)
    spans = [kept if block in routed else image_tokens for block in range(model.depth)]
    found = 3 * 2.0 * sum(_attention(model, span, joint) for span in spans)
    return found / training_flops(config, image_tokens, text_tokens)


def training_flops(config: Config, image_tokens: int, text_tokens: float) -> float:
    """FLOPs of one sample's forward and backward pass under the run's routing.

    With frozen weights (docs/fine_tuning.md) backward is less than twice forward: a weight that is not
    trained needs no gradient, and what lies before everything that is trained no backward at all. The two
    products of an adapter come on top.
    """
    forward = routed_flops(config, image_tokens, text_tokens, config.routing.drop)
    if not config.adapter.active and not config.optimizer.frozen:
        return 3 * forward
    model, routing = config.model, config.routing
    kept = POLICIES[routing.policy].kept(routing, image_tokens, routing.drop)
    routed = range(routing.start, route_end(config) + 1)
    joint = text_tokens + (resolution_tokens.COUNT if model.resolution_tokens else 0)
    outside = dict.fromkeys(("img_in", "final_layer.linear", "fusion"), image_tokens)
    outside |= {"txt_in": text_tokens, "text_kv": joint}
    total = forward
    for product in products(model, routing, config.adapter, config.optimizer.frozen):
        if product.block is None:
            rows = outside.get(product.part, 1)
        else:
            rows = kept if product.block in routed else image_tokens
        total += 2.0 * rows * (product.size * (product.reached + product.trained) + 3 * product.factors)
        if product.block is not None and product.part == "qkv" and product.reached:
            total += 2 * 2.0 * _attention(model, rows, joint)
    return total


class Product(NamedTuple):
    """A matrix product of the model."""

    block: int | None
    part: str
    """Its layer, in the block or in the model."""
    size: int
    """Elements of the weight."""
    trained: bool
    """Whether the weight is."""
    factors: int
    """Elements of the two factors of its adapter, 0 without one."""
    reached: bool
    """Whether the backward pass comes here: something is trained in this block or layer, or before."""


@functools.cache
def products(
    model: Model, routing: Routing, adapter: Adapter, frozen: tuple[str, ...]
) -> tuple[Product, ...]:
    """All products of a model of which a part is frozen."""
    with torch.device("meta"):
        denoiser = Denoiser(model, routing)
    lay_out(
        denoiser, Config(model=model, routing=routing, adapter=adapter, optimizer=Optimizer(frozen=frozen))
    )
    named = dict(denoiser.named_parameters())
    trained = [_place(name) for name, p in named.items() if p.requires_grad]
    before = {"text": {"text"}, "vector": {"vector"}, "image": {"text", "vector", "image"}}
    found = []
    for name, parameter in named.items():
        if parameter.dim() != 2 or is_factor(name):
            continue
        layer, (chain, order) = name.rpartition(".")[0], _place(name)
        reached = any(one in before[chain] and (one != chain or at <= order) for one, at in trained)
        factors = sum(named[f"{layer}.{kind}"].numel() for kind in (DOWN, UP) if f"{layer}.{kind}" in named)
        inside = re.match(r"blocks\.(\d+)\.(\w+)", layer)
        block, part = (
            (int(inside[1]), inside[2]) if inside else (None, re.sub(r"^img_in\.\d$", "img_in", layer))
        )
        found.append(Product(block, part, parameter.numel(), parameter.requires_grad, factors, reached))
    return tuple(found)


def _place(name: str) -> tuple[str, int]:
    """Where a parameter lies on the way of the text, of the vector that modulates, or of the image's tokens,
    which the two others join: (way, place on it)."""
    if name.startswith(("txt_in.", "resolution_tokens.", "text_kv.")):
        return "text", int(name.startswith("text_kv."))
    if name.startswith(("time_in.", "resolution_in.", "modulation.", "final_layer.modulation.")):
        return "vector", 0 if "in_layer" in name else 1 if "out_layer" in name else 2
    if inside := re.match(r"blocks\.(\d+)\.", name):
        return "image", int(inside[1])
    return "image", -1 if name.startswith("img_in") else 10**6


def dense_training_flops(config: Config, image_tokens: int, text_tokens: float) -> float:
    """FLOPs of one sample's forward and backward pass if the run routed nothing."""
    return 3 * forward_flops(config.model, image_tokens, text_tokens, range(0), image_tokens)


def branch_flops(config: Config, branch: Branch, image_tokens: int, text_tokens: float) -> float:
    """FLOPs of one sample's forward pass in a branch of the guidance; `text_tokens` of its own caption.

    A branch that skips the routed blocks still has their text keys and modulation, which are made for all
    blocks at once.
    """
    drop = 1.0 if branch.skip else branch.drop
    return routed_flops(config, image_tokens, text_tokens, drop)


def sampling_flops(config: Config, image_tokens: int, text_tokens: float, empty_tokens: float = 1.0) -> float:
    """FLOPs of the denoiser for one picture under `config.sampling`: every step, every branch.

    Args:
        text_tokens: of the picture's caption.
        empty_tokens: of the empty caption, as the text encoder makes it.
    """
    return sum(
        times * branch_flops(config, branch, image_tokens, text_tokens if branch.captioned else empty_tokens)
        for branch, times in Counter(evaluations(config)).items()
    )


def routed_flops(config: Config, image_tokens: int, text_tokens: float, drop: float) -> float:
    """FLOPs of one forward pass in which the share `drop` of the tokens bypasses the run's routed span."""
    routing = config.routing
    policy = POLICIES[routing.policy]
    routed = range(routing.start, route_end(config) + 1)
    kept = 0 if drop == 1 else policy.kept(routing, image_tokens, drop)
    return forward_flops(config.model, image_tokens, text_tokens, routed, kept, policy.fuses)
