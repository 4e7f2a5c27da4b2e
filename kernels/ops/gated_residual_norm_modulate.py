"""x' = x + gate_b * branch and y = (1 + scale_b) * LayerNorm(x') + shift_b in one pass over memory.

The end of one half of a transformer block fused with the norm that opens the next (see `gated_residual` and
`norm_modulate`). The norm sees x' as it is stored, rounded to the dtype of x. With d the gradient of x'
through both outputs:

    d = dx' + LayerNorm's gradient of (1 + scale_b) * dy,   dx = d,   dbranch = gate_b * d
    dgate_b, dshift_b, dscale_b = sums over the rows of b of d * branch, dy, dy * normed
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.ops.gated_residual import add_branch_rows
from millrace.kernels.ops.gated_residual import reference as add_branch
from millrace.kernels.ops.gated_residual_norm_modulate_triton import (
    backward_fake,
    backward_triton,
    forward_fake,
    forward_triton,
)
from millrace.kernels.ops.norm_modulate import (
    modulate_rows,
    modulate_rows_gradient,
)
from millrace.kernels.ops.norm_modulate import reference as modulate
from millrace.kernels.support.checks import (
    expect_offsets,
    expect_shape,
)
from millrace.kernels.support.choice import choose
from millrace.kernels.support.packed import (
    sample_groups,
    widen,
)
from millrace.kernels.support.registration import register


def reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The two equations in plain PyTorch."""
    x = add_branch(x, branch, gate, cu_seqlens, max_seqlen)
    return x, modulate(x, shift, scale, cu_seqlens, eps, max_seqlen)


def _forward_eager(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, y, mean, rstd = forward_fake(x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen)
    gate, gain, shift = widen(gate)[:, None], 1 + widen(scale)[:, None], widen(shift)[:, None]
    for rows, members in sample_groups(cu_seqlens, len(x), max_seqlen):
        add_branch_rows(x[rows], branch[rows], gate[members], out[rows])
        mean[rows], rstd[rows] = modulate_rows(out[rows], shift[members], gain[members], eps, y[rows])
    return out, y, mean, rstd


def _backward_eager(
    grad_out: Tensor,
    grad_y: Tensor,
    out: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_branch, sums = backward_fake(
        grad_out, grad_y, out, branch, gate, scale, cu_seqlens, mean, rstd, max_seqlen
    )
    sums.zero_()
    gate, gain = widen(gate)[:, None], 1 + widen(scale)[:, None]
    for rows, members in sample_groups(cu_seqlens, len(out), max_seqlen):
        through = modulate_rows_gradient(
            grad_y[rows], out[rows], gain[members], mean[rows], rstd[rows], sums[1:, members]
        )
        through += grad_out[rows]
        grad_x[rows] = through
        through = through.view(len(gate[members]), -1, out.shape[1])
        product = through * branch[rows].reshape(through.shape)
        torch.sum(product, 1, out=sums[0, members])
        torch.mul(through, gate[members], out=grad_branch[rows].view(through.shape))
    return grad_x, grad_branch, sums


_forward = register(
    "gated_residual_norm_modulate(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale,"
    " Tensor cu_seqlens, float eps, SymInt? max_seqlen) -> (Tensor, Tensor, Tensor, Tensor)",
    eager=_forward_eager,
    triton=forward_triton,
    fake=forward_fake,
)
_backward = register(
    "gated_residual_norm_modulate_backward(Tensor grad_out, Tensor grad_y, Tensor out, Tensor branch,"
    " Tensor gate, Tensor scale, Tensor cu_seqlens, Tensor mean, Tensor rstd, SymInt? max_seqlen)"
    " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate_shift_scale)",
    eager=_backward_eager,
    triton=backward_triton,
    fake=backward_fake,
)


def _operators(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward, and backward whose last result holds the gradients of gate, shift and scale."""
    if implementation == "triton":
        return _forward, _backward
    from millrace.kernels.support import cuda_library

    def backward(*args: Any) -> tuple[Any, ...]:
        grad_x, grad_branch, *vectors = cuda_library.gated_residual_norm_modulate_backward(*args)
        return grad_x, grad_branch, vectors

    return cuda_library.gated_residual_norm_modulate, backward


class _GatedResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor,
        eps: float,
        max_seqlen: int | None,
        implementation: str,
    ) -> tuple[Tensor, Tensor]:
        forward, _ = _operators(implementation)
        out, y, mean, rstd = forward(x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen)
        ctx.save_for_backward(out, branch, gate, scale, cu_seqlens, mean, rstd)
        ctx.max_seqlen, ctx.shift_dtype, ctx.implementation = max_seqlen, shift.dtype, implementation
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        out, branch, gate, scale, cu_seqlens, mean, rstd = ctx.saved_tensors
        _, backward = _operators(ctx.implementation)
        grad_x, grad_branch, (grad_gate, grad_shift, grad_scale) = backward(
            grad_out, grad_y, out, branch, gate, scale, cu_seqlens, mean, rstd, ctx.max_seqlen
        )
        vectors = (grad_gate.to(gate.dtype), grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype))
        return grad_x, grad_branch, *vectors, None, None, None, None


def gated_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalise and modulate the sum.

    Args:
        x, branch: (T, C).
        gate, shift, scale: (B, C), any float dtype and strides.
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths; without it the launch must cover T rows per sample.
        backend: "auto", "reference", "triton" or "cuda" (see `kernels/support/choice.py`).

    Returns:
        x' and y, each (T, C) in the dtype of x.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("x", x, "T", "C")
    expect_shape("branch", branch, *x.shape)
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        expect_shape(name, vector, samples, x.shape[1])
    implementation = choose("gated_residual_norm_modulate", backend, x)
    if implementation == "reference":
        return reference(x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen)
    return _GatedResidualNormModulate.apply(
        x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen, implementation
    )
