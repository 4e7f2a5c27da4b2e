"""The case of the FP8 linear layer: the first product of the MLP, beside BF16 and other libraries' FP8.

Rows come in the dtype of training and the weight is the FP32 master, so casts of the weight are part of every
implementation, as in a step. Right is what is at most twice as far from float64 as FP8 operands make it, by
the plain evaluation below. The ceiling is that of BF16 products: FP8 may pass it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.benchmarks.kernels.accuracy import Function
from millrace.benchmarks.kernels.cases import Case, NotApplicable, Setting, Shape, arithmetic_work
from millrace.kernels import fp8_linear
from millrace.kernels.ops.fp8_linear import GRADIENTS, VALUES, missing, rounded


def fp8_linear_case(shape: Shape, setting: Setting) -> Case:
    """x (T, C) times the weight (2F, C) of gate and up."""
    rows, inner, outer = shape.rows, shape.width, 2 * shape.hidden
    x = setting.randn(rows, inner)
    weight = torch.randn(outer, inner, device=setting.device) * inner**-0.5

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    def ours() -> Function:
        if reason := missing(setting.device):
            raise NotApplicable(reason)
        return lambda x, weight: fp8_linear(x, weight)

    products = 2.0 * rows * inner * outer
    return Case(
        "fp8_linear",
        shape,
        {"x": x, "weight": weight},
        reference,
        arithmetic_work(products, 2 * products),
        setting.baselines(reference)
        | {
            setting.ours(): ours,
            "torchao": lambda: _torchao(setting),
            "transformer-engine": lambda: _transformer_engine(weight, setting),
        },
        plain=lambda x, weight: _Rounded.apply(x, weight),  # before torch 2.13 it takes no keywords
    )


class _Rounded(torch.autograd.Function):
    """The products of rounded operands, in FP32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        return (rounded(x, VALUES) @ rounded(weight, VALUES).T).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        small = rounded(gradient, GRADIENTS)
        to_x, to_weight = small @ rounded(weight, VALUES), small.T @ rounded(x, VALUES)
        return to_x.to(x.dtype), to_weight.to(weight.dtype)


def _torchao(setting: Setting) -> Function:
    """Its tensorwise recipe, compiled, as it is meant to be used; emulated on a CPU, as it is there."""
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

    if reason := missing(setting.device):
        raise NotApplicable(reason)
    emulate = setting.device.type == "cpu"
    config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulate)
    products = Float8Linear(16, 16, bias=False, config=config, device="meta").linear_mm_config

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return matmul_with_hp_or_float8_args.apply(x, weight.t(), products, config)

    return setting.compiled(call)()


def _transformer_engine(weight: Tensor, setting: Setting) -> Function:
    """Its linear layer with current scaling, given the weight."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    if setting.device.type != "cuda":
        raise NotApplicable("transformer-engine needs a CUDA device")
    outer, inner = weight.shape
    layer: nn.Module = te.Linear(inner, outer, bias=False, params_dtype=weight.dtype, device="cuda")
    recipe = Float8CurrentScaling()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cuda", x.dtype), te.autocast(enabled=True, recipe=recipe):
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

    return call
