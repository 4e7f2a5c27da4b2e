"""The denoiser's weights and configuration under the names that diffusers and Photoroom/PRX use.

The Denoiser holds some projections fused, row after row; renaming, splitting and joining rows is all there
is to a conversion, so it is exact in any dtype:

    ours                     diffusers, rows in this order
    modulation               blocks.0.modulation.lin, blocks.1.modulation.lin, ...
    text_kv                  blocks.0.attention.txt_kv_proj, blocks.1.attention.txt_kv_proj, ...
    blocks.N.gate_up         blocks.N.gate_proj, blocks.N.up_proj

Photoroom/PRX names differ from diffusers' inside the attention only.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from millrace.engine.config import Model, Routing
from millrace.engine.config.loading import parse_config
from millrace.engine.model.adapters import DOWN, MAGNITUDE, UP
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError

State = Mapping[str, Tensor]

CLASS_NAME = "PRXTransformer2DModel"

FUSION = "fusion."
"""What the names of SPRINT's fusion layer start with; other projects' files have no such layer."""
RESOLUTION = "resolution_tokens."
"""The same of the embedders of resolution tokens."""

_PRX_NAMES = {
    "attention.img_qkv_proj.weight": "img_qkv_proj.weight",
    "attention.txt_kv_proj.weight": "txt_kv_proj.weight",
    "attention.to_out.0.weight": "attn_out.weight",
    "attention.norm_q.weight": "qk_norm.query_norm.scale",
    "attention.norm_k.weight": "qk_norm.key_norm.scale",
    "attention.norm_added_k.weight": "k_norm.scale",
}
"""diffusers' names inside a block to Photoroom/PRX's; all others are equal."""
_DIFFUSERS_NAMES = {prx: theirs for theirs, prx in _PRX_NAMES.items()}
# Photoroom/PRX models whose norms are torch.nn.RMSNorm call the scale weight.
_DIFFUSERS_NAMES |= {
    prx.replace(".scale", ".weight"): theirs for theirs, prx in _PRX_NAMES.items() if prx.endswith(".scale")
}

_BLOCK = re.compile(r"blocks\.(\d+)\.")

_PUBLISHED_PATCHES = {64: (16, 2), 128: (32, 2), 32: (32, 1), 3072: (3, 32), 768: (3, 16)}
"""Patch features of the published PRX models -> (in_channels, patch_size)."""

# Constants of the Denoiser that diffusers' model takes as options, and the defaults of its options.
_FIXED = {"time_factor": 1000.0, "time_max_period": 10_000}
_DEFAULTS = {
    "in_channels": 16,
    "patch_size": 2,
    "context_in_dim": 2304,
    "hidden_size": 1792,
    "mlp_ratio": 3.5,
    "num_heads": 28,
    "depth": 16,
    "axes_dim": [32, 32],
    "theta": 10_000,
    "bottleneck_size": None,
    "resolution_embeds": False,
    **_FIXED,
}


def diffusers_config(config: Model) -> dict[str, Any]:
    """Arguments of PRXTransformer2DModel, as its config.json holds them."""
    theta = config.rope_theta
    return {
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "context_in_dim": config.context_dim,
        "hidden_size": config.width,
        "mlp_ratio": config.mlp_ratio,
        "num_heads": config.heads,
        "depth": config.depth,
        "axes_dim": list(config.axes),
        "theta": int(theta) if theta.is_integer() else theta,
        "bottleneck_size": config.bottleneck,
        "resolution_embeds": config.resolution_embedding,
        **_FIXED,
    }


def model_config(values: Mapping[str, Any], origin: str = "diffusers configuration") -> Model:
    """The Model of a diffusers config.json; absent keys have diffusers' defaults.

    Raises UserError for another class, for an option that the Denoiser does not know, and for an option
    that it has at another fixed value.
    """
    name = values.get("_class_name", CLASS_NAME)
    if name != CLASS_NAME:
        raise UserError(f"{origin} describes a {name}, expected a {CLASS_NAME}")
    given = {key: value for key, value in values.items() if not key.startswith("_") and value is not None}
    unknown = sorted(given.keys() - _DEFAULTS.keys())
    if unknown:
        raise UserError(f"{origin}: this version does not know {', '.join(unknown)}")
    values = _DEFAULTS | given
    for key, fixed in _FIXED.items():
        if values[key] != fixed:
            raise UserError(f"{origin}: {key} is {values[key]}, but the Denoiser is made for {fixed}")
    model = {
        "in_channels": values["in_channels"],
        "patch_size": values["patch_size"],
        "context_dim": values["context_in_dim"],
        "width": values["hidden_size"],
        "mlp_ratio": values["mlp_ratio"],
        "heads": values["num_heads"],
        "depth": values["depth"],
        "rope_axes": values["axes_dim"],
        "rope_theta": values["theta"],
        "bottleneck": values["bottleneck_size"],
        "resolution_embedding": values["resolution_embeds"],
    }
    return parse_config({"model": model}, origin).model


def _names(config: Model) -> dict[str, tuple[str, ...]]:
    """Our parameter names -> diffusers' names whose rows, one after the other, they hold."""
    table: dict[str, tuple[str, ...]] = {}

    def linear(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = tuple(f"{name}.{kind}" for name in theirs)

    blocks = [f"blocks.{i}" for i in range(config.depth)]
    for name in ("img_in.0", "img_in.1") if config.bottleneck else ("img_in",):
        linear(name, name)
    for name in ("txt_in", "time_in.in_layer", "time_in.out_layer"):
        linear(name, name)
    if config.resolution_embedding:
        linear("resolution_in.in_layer", "resolution_embedder.mlp.in_layer")
        linear("resolution_in.out_layer", "resolution_embedder.mlp.out_layer")
    linear("modulation", *(f"{block}.modulation.lin" for block in blocks))
    table["text_kv.weight"] = tuple(f"{block}.attention.txt_kv_proj.weight" for block in blocks)
    for block in blocks:
        table[f"{block}.qkv.weight"] = (f"{block}.attention.img_qkv_proj.weight",)
        table[f"{block}.query_norm"] = (f"{block}.attention.norm_q.weight",)
        table[f"{block}.key_norm"] = (f"{block}.attention.norm_k.weight",)
        table[f"{block}.text_key_norm"] = (f"{block}.attention.norm_added_k.weight",)
        table[f"{block}.attn_out.weight"] = (f"{block}.attention.to_out.0.weight",)
        table[f"{block}.gate_up.weight"] = (f"{block}.gate_proj.weight", f"{block}.up_proj.weight")
        table[f"{block}.down.weight"] = (f"{block}.down_proj.weight",)
    linear("final_layer.modulation", "final_layer.adaLN_modulation.1")
    linear("final_layer.linear", "final_layer.linear")
    return table


def empty_denoiser(config: Model, routing: Routing | None = None) -> Denoiser:
    """A Denoiser on the meta device, to be filled by `load_state_dict(state, assign=True)`."""
    with torch.device("meta"):
        return Denoiser(config, routing)


def expect_state(
    state: State, config: Model, routing: Routing | None = None, origin: str = "weights"
) -> None:
    """Raise one UserError that lists what is missing, unexpected or misshapen in weights under our names."""
    _expect(state, _shapes(config, routing), origin)


def _shapes(config: Model, routing: Routing | None = None) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in empty_denoiser(config, routing).state_dict().items()}


def _expect(state: State, shapes: Mapping[str, torch.Size], origin: str) -> None:
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
    problems = [f"{len(found)} {kind} ({_first(found)})" for kind, found in kinds if found]
    if problems:
        raise UserError(f"{origin} do not fit the model configuration: {', '.join(problems)}")


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def diffusers_state(state: State, config: Model) -> dict[str, Tensor]:
    """Our weights under diffusers' names; no data is copied, fused tensors become views of their rows.

    Raises UserError for weights that do not fit `config`, and for a SPRINT model or one with resolution
    tokens, which diffusers lacks.
    """
    if any(name.startswith(FUSION) for name in state):
        raise UserError(
            "these are the weights of a SPRINT model, whose fusion layer has no place in diffusers' or "
            "Photoroom/PRX's format; sample from the run itself with millrace sample, or fine-tune it "
            "without the layer (run.init_from, routing.policy none) and export that"
        )
    if config.resolution_tokens:
        raise UserError(
            "these are the weights of a model with resolution tokens, which have no place in diffusers' or "
            "Photoroom/PRX's format; sample from the run itself with millrace sample"
        )
    expect_state(state, config)
    return {
        name: part
        for ours, theirs in _names(config).items()
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True)
    }


def adapter_state(factors: State, config: Model) -> dict[str, dict[str, Tensor]]:
    """An adapter's factors (`adapters.py`) by the name of diffusers' layer, then by ours.

    B and m are views of their layer's rows; layers that are one here share A.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for ours, theirs in _names(config).items():
        layer, _, kind = ours.rpartition(".")
        if kind != "weight" or f"{layer}.{DOWN}" not in factors:
            continue
        for i, name in enumerate(theirs):
            parts = found.setdefault(name.removesuffix(".weight"), {})
            parts[DOWN] = factors[f"{layer}.{DOWN}"]
            for rows in (UP, MAGNITUDE):
                if f"{layer}.{rows}" in factors:
                    parts[rows] = factors[f"{layer}.{rows}"].chunk(len(theirs))[i]
    return found


def prx_state(state: State, config: Model) -> dict[str, Tensor]:
    """Our weights under Photoroom/PRX's names; otherwise as `diffusers_state`."""
    return {_rename(name, _PRX_NAMES): part for name, part in diffusers_state(state, config).items()}


def denoiser_state(theirs: State, config: Model) -> dict[str, Tensor]:
    """Weights under diffusers' or Photoroom/PRX's names as ours; only fused tensors are copied.

    Raises UserError that lists the missing, unexpected and misshapen tensors.
    """
    theirs = _under_diffusers_names(theirs)
    table, ours = _names(config), _shapes(config)
    shapes = {
        part: torch.Size((ours[name][0] // len(parts), *ours[name][1:]))
        for name, parts in table.items()
        for part in parts
    }
    _expect(theirs, shapes, "weights")
    return {
        name: theirs[parts[0]] if len(parts) == 1 else torch.cat([theirs[part] for part in parts])
        for name, parts in table.items()
    }


def _under_diffusers_names(theirs: State) -> dict[str, Tensor]:
    renamed = {_rename(name, _DIFFUSERS_NAMES): tensor for name, tensor in theirs.items()}
    if len(renamed) < len(theirs):
        raise UserError("weights hold the same tensor under a diffusers and a Photoroom/PRX name; keep one")
    return renamed


def _rename(name: str, table: Mapping[str, str]) -> str:
    """Map the part of `name` after "blocks.N." where the table knows it."""
    block = _BLOCK.match(name)
    return block[0] + table.get(name[block.end() :], name[block.end() :]) if block else name


def infer_model(theirs: State) -> Model:
    """The Model whose weights these are, under diffusers' or Photoroom/PRX's names.

    Shapes tell width, depth, heads, mlp_ratio, context_dim, bottleneck and resolution_embedding. They tell
    the patch features in_channels * patch_size^2, not the two factors: those are taken from the published PRX
    model with that many, and it is an error if there is none. The RoPE base and axes leave no trace; they
    are the published 10,000 and half of head_dim each. Pass a Model to `load_weights` where that is wrong.
    """
    theirs = _under_diffusers_names(theirs)

    def shape(name: str, dimensions: int = 2) -> torch.Size:
        if name not in theirs or theirs[name].dim() != dimensions:
            raise UserError(f"not the weights of a PRX denoiser: there is no {dimensions}-D tensor {name!r}")
        return theirs[name].shape

    width, context = shape("txt_in.weight")
    (head_dim,) = shape("blocks.0.attention.norm_q.weight", dimensions=1)
    hidden = shape("blocks.0.gate_proj.weight")[0]
    features = shape("final_layer.linear.weight")[0]
    if features not in _PUBLISHED_PATCHES:
        raise UserError(
            f"weights have {features} patch features, but no published PRX model tells in_channels and "
            "patch_size apart for that number; give the model configuration"
        )
    in_channels, patch_size = _PUBLISHED_PATCHES[features]
    ratio = hidden / width
    values = {
        "width": width,
        "depth": 1 + max(int(found[1]) for found in map(_BLOCK.match, theirs) if found),
        "heads": width // head_dim,
        # Rounding may leave the quotient just below the ratio whose product reaches `hidden`.
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "context_dim": context,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "bottleneck": shape("img_in.0.weight")[0] if "img_in.0.weight" in theirs else None,
        "resolution_embedding": "resolution_embedder.mlp.in_layer.weight" in theirs,
    }
    return parse_config({"model": values}, "weights").model
