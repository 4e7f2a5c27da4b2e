"""The blocks' linear layers with FP8 products.

Only the arithmetic of a layer changes. Its weight is the same parameter under the same name, FP32 where
masters are FP32, so optimizer, average, checkpoint, export and ZeRO see no difference; every use of it casts
it anew. Embeddings, modulation, norms, attention and the final layer are never done so.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.engine.config.precision import MULTIPLE, Fp8
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError
from millrace.engine.util.quiet_imports import quiet_imports
from millrace.kernels import fp8_linear
from millrace.kernels.ops.fp8_linear import missing
from millrace.kernels.support.autocast import autocast_dtype

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Rows (T, K) and a weight (N, K) -> (T, N)."""

TORCHAO = "torchao==0.18.0"


class Fp8Linear(nn.Linear):
    """A linear layer without bias that multiplies in its own way; it takes the parameter of the one given."""

    def __init__(self, linear: nn.Linear, multiply: Multiply) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N) in autocast's dtype, where that is on."""
        return self.multiply(x, self.weight)


def use_fp8(denoiser: Denoiser, fp8: Fp8, device: torch.device) -> None:
    """Give the layers that `fp8` names, of all blocks, FP8 products on `device`.

    Raises UserError where the backend is not installed or the device cannot.
    """
    if not fp8.active:
        return
    build = {"torch": _torch, "torchao": _torchao, "transformer_engine": _transformer_engine}[fp8.chosen]
    make = build(fp8.recipe, device)
    for parent in (denoiser, *denoiser.blocks):
        for name in fp8.layers:
            linear = getattr(parent, name, None)
            if linear is not None:
                setattr(parent, name, Fp8Linear(linear, make(linear)))


def _require_device(device: torch.device) -> None:
    if reason := missing(device):
        raise UserError(f"precision.fp8: {reason}; set precision.fp8.backend to none")


def _torch(_recipe: str, device: torch.device) -> Callable[[nn.Linear], Multiply]:
    _require_device(device)
    return lambda _linear: fp8_linear


def _torchao(recipe: str, device: torch.device) -> Callable[[nn.Linear], Multiply]:
    """torchao's autograd function, which takes the weight as an argument; emulated where there is no GPU."""
    try:
        with quiet_imports():
            from torchao.float8 import Float8LinearConfig
            from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
    except ImportError:
        raise UserError(
            f"precision.fp8.backend torchao is not installed: pip install {TORCHAO}, or take torch"
        ) from None
    _require_device(device)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type == "cpu")
    products = Float8Linear(MULTIPLE, MULTIPLE, bias=False, config=config, device="meta").linear_mm_config

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # it would cast the operands once more
            return matmul_with_hp_or_float8_args.apply(x, weight.t(), products, config)

    return lambda _linear: _on_padded_rows(multiply)


def _transformer_engine(recipe: str, device: torch.device) -> Callable[[nn.Linear], Multiply]:
    """A `te.Linear` for each layer, hidden from the module tree, around the layer's own parameter."""
    if device.type != "cuda":
        raise UserError(
            f"precision.fp8.backend transformer_engine runs on CUDA alone, this is {device.type}; take torch"
        )
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes
    except ImportError:
        raise UserError(
            "precision.fp8.backend transformer_engine is not installed: pip install --no-build-isolation "
            "'transformer-engine[pytorch]>=2.20', or take torch"
        ) from None
    _require_device(device)
    kinds = {"tensorwise": recipes.Float8CurrentScaling, "blockwise": recipes.Float8BlockScaling}
    chosen = kinds[recipe]()

    def make(linear: nn.Linear) -> Multiply:
        theirs = te.Linear(
            linear.in_features,
            linear.out_features,
            bias=False,
            params_dtype=linear.weight.dtype,
            device="meta",
        )
        theirs.weight = linear.weight

        def multiply(x: Tensor, _weight: Tensor) -> Tensor:
            # For each layer by itself, so that blocks which are recomputed in backward are computed alike.
            # That is possible because these recipes keep no history from step to step.
            with te.autocast(enabled=True, recipe=chosen):
                return theirs(x)

        return _on_padded_rows(multiply)

    return make


def _on_padded_rows(multiply: Multiply) -> Multiply:
    """For products that want a multiple of 16 rows: some of zeros are added, and taken off the result. x is
    cast to autocast's dtype, where that is on. Without rows there is nothing to multiply."""

    def call(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.shape[0]
        x = x.to(autocast_dtype(x.device.type) or x.dtype)
        if not rows:
            return x @ weight.t().to(x.dtype)
        lacking = -rows % MULTIPLE
        return multiply(F.pad(x, (0, 0, 0, lacking)), weight)[:rows] if lacking else multiply(x, weight)

    return call
