"""Precision section: dtypes of arithmetic and storage, and FP8 products of the blocks' linear layers."""

from typing import Literal

from pydantic import model_validator

from millrace.engine.config.model import Model
from millrace.engine.config.section import Section

Fp8Layer = Literal["qkv", "attn_out", "gate_up", "down", "text_kv"]

RECIPES = {
    "torch": ("tensorwise",),
    "torchao": ("tensorwise", "rowwise", "rowwise_with_gw_hp"),
    "transformer_engine": ("tensorwise", "blockwise"),
}
"""What each backend can do. Those that keep a history of magnitudes are in none: it would be state that no
checkpoint holds."""
MULTIPLE = 16
"""What both sides of an FP8 weight are multiples of."""


class Fp8(Section):
    """Which matrix products of training are done in FP8, and by what (docs/precision.md)."""

    backend: Literal["none", "auto", "torch", "torchao", "transformer_engine"] = "none"
    """`torch`: own kernels and torch's product; `torchao` and `transformer_engine`: theirs, if installed;
    `auto` is `torch`. All need a GPU of compute capability 8.9; on a CPU the first two are emulated."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"] = "tensorwise"
    """What shares a scale, always found from the values at hand: a tensor; a row of each product's operands
    (`rowwise`; with `_with_gw_hp` gradients of weights stay BF16), by torchao; 128 values or 128 x 128 of a
    weight (`blockwise`), by transformer_engine."""
    layers: tuple[Fp8Layer, ...] = ("qkv", "attn_out", "gate_up", "down", "text_kv")
    """Linear layers of the blocks that are done so, of those that are worth it."""

    @property
    def active(self) -> bool:
        """Whether anything is done in FP8."""
        return self.backend != "none"

    @property
    def chosen(self) -> str:
        """The backend, with `auto` resolved."""
        return "torch" if self.backend == "auto" else self.backend

    @model_validator(mode="after")
    def _possible(self) -> "Fp8":
        if not self.layers:
            raise ValueError("layers is empty; set backend to none")
        known = RECIPES.get(self.chosen)
        if known and self.recipe not in known:
            raise ValueError(
                f"recipe {self.recipe} is none of the backend {self.chosen}, which has {', '.join(known)}"
            )
        return self


class Precision(Section):
    """What is computed and what is stored in which dtype."""

    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of matrix products and attention; norms, softmax, RoPE and loss are FP32 in any case."""
    master: Literal["float32", "bfloat16"] = "float32"
    """Storage of weights, optimizer state and EMA. `bfloat16` is the post's bug, kept as an experiment."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the gradient reduction between processes."""
    fp8: Fp8 = Fp8()


def fp8_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of the weight of each layer that can be done in FP8."""
    width, hidden = model.width, model.mlp_width
    return {
        "qkv": (3 * width, width),
        "attn_out": (width, width),
        "gate_up": (2 * hidden, width),
        "down": (width, hidden),
        "text_kv": (model.depth * 2 * width, width),
    }


def check_fp8(fp8: Fp8, compute: str, model: Model) -> None:
    """Raise ValueError if a weight has no FP8 product, or the rest is not computed in BF16."""
    if not fp8.active:
        return
    if compute != "bfloat16":
        raise ValueError(f"precision.fp8 needs precision.compute bfloat16, which is {compute}")
    shapes = fp8_shapes(model)
    for layer in fp8.layers:
        rows, columns = shapes[layer]
        if rows % MULTIPLE or columns % MULTIPLE:
            raise ValueError(
                f"precision.fp8 needs multiples of {MULTIPLE}, the weight of {layer} is {rows} x {columns}; "
                "change model.width or model.mlp_ratio, or leave it out of precision.fp8.layers"
            )
