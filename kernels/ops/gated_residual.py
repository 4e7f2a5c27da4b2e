"""x' = x + gate_b * branch: the gated residual of adaLN-zero (Peebles & Xie, arXiv 2212.09748).

The sum is formed in FP32 and rounded once to the dtype of x. Backward: dx = dx', dbranch = gate_b * dx', and
dgate_b = sum over the rows of b of dx' * branch. x itself is not needed for it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.packed import rows_from_samples, sample_groups, unit_stride, widen
from millrace.kernels.support.registration import HAS_TRITON, register
from millrace.kernels.support.rows import fold, launch_shapes, row_launch, sum_launch, sums_of_programs

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.support.rows import load_row, load_tile, owned_rows, owned_run, store_sum


def reference(
    x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """The equation in plain PyTorch."""
    gate = rows_from_samples(widen(gate), cu_seqlens, len(x), max_seqlen)
    return (widen(x) + gate * widen(branch)).to(x.dtype)


if HAS_TRITON:

    @triton.jit
    def gated_residual_fwd_kernel(
        x,
        branch,
        gate,
        cu_seqlens,
        out,
        x_stride,
        branch_stride,
        gate_stride,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end, column, inside = owned_rows(cu_seqlens, WIDTH, BLOCK, ROWS)
        factor = load_row(gate + sample * gate_stride, column, inside)
        for row in range(first, end):
            value = load_row(x + row * x_stride, column, inside)
            added = load_row(branch + row * branch_stride, column, inside)
            tl.store(out + row * WIDTH + column, value + factor * added, mask=inside)

    @triton.jit
    def gated_residual_bwd_kernel(
        grad,
        branch,
        gate,
        cu_seqlens,
        grad_branch,
        partial,
        grad_stride,
        branch_stride,
        gate_stride,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end = owned_run(cu_seqlens)
        column = tl.arange(0, BLOCK)
        factor = load_row(gate + sample * gate_stride, column, column < WIDTH)
        gate_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(first, end, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < end)[:, None] & (column < WIDTH)[None, :]
            gradient = load_tile(grad, grad_stride, row, column, inside).to(tl.float32)
            added = load_tile(branch, branch_stride, row, column, inside).to(tl.float32)
            gate_sum += gradient * added
            at = grad_branch + row[:, None] * WIDTH + column[None, :]
            tl.store(at, factor[None, :] * gradient, mask=inside)
        store_sum(partial, 0, gate_sum, sample, tl.num_programs(1), column, WIDTH)


def _forward_triton(
    x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> Tensor:
    x, branch, gate = unit_stride(x), unit_stride(branch), unit_stride(gate)
    out = _forward_fake(x, branch, gate, cu_seqlens, max_seqlen)
    launch = row_launch(*x.shape, len(gate), max_seqlen)
    gated_residual_fwd_kernel[launch.grid](
        x,
        branch,
        gate,
        cu_seqlens,
        out,
        x.stride(0),
        branch.stride(0),
        gate.stride(0),
        WIDTH=x.shape[1],
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    return out


def _backward_triton(
    grad: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    grad, branch, gate = unit_stride(grad), unit_stride(branch), unit_stride(gate)
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    launch = sum_launch(branch, len(gate), max_seqlen)
    partial, sums = sums_of_programs(1, launch, branch.shape[1], gate)
    gated_residual_bwd_kernel[launch.grid](
        grad,
        branch,
        gate,
        cu_seqlens,
        grad_branch,
        partial,
        grad.stride(0),
        branch.stride(0),
        gate.stride(0),
        WIDTH=branch.shape[1],
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    fold(partial, sums)
    return grad_branch, sums.squeeze(0)


def _forward_eager(
    x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> Tensor:
    out, gate = _forward_fake(x, branch, gate, cu_seqlens, max_seqlen), widen(gate)[:, None]
    for rows, members in sample_groups(cu_seqlens, len(x), max_seqlen):
        add_branch_rows(x[rows], branch[rows], gate[members], out[rows])
    return out


def add_branch_rows(x: Tensor, branch: Tensor, gate: Tensor, out: Tensor) -> None:
    """Write x + gate * branch (rows, C) of b samples with equally many rows; gate is (b, 1, C)."""
    samples = (len(gate), -1, x.shape[1])
    x, branch = widen(x).reshape(samples), widen(branch).reshape(samples)
    torch.addcmul(x, branch, gate, out=out.view(samples))


def _backward_eager(
    grad: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    sums = torch.promote_types(grad.dtype, torch.float32)
    grad_gate, dtype = torch.zeros(gate.shape, dtype=sums, device=gate.device), gate.dtype
    gate = widen(gate)[:, None]
    for rows, members in sample_groups(cu_seqlens, len(branch), max_seqlen):
        gradient = widen(grad[rows]).reshape(len(gate[members]), -1, branch.shape[1])
        grad_branch[rows] = (gradient * gate[members]).view(-1, branch.shape[1])
        product = gradient * branch[rows].reshape(gradient.shape)
        torch.sum(product, 1, out=grad_gate[members])
    return grad_branch, grad_gate.to(dtype)


def _forward_fake(
    x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return grad_branch, gate.new_empty(gate.shape)


_forward = register(
    "gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor cu_seqlens, SymInt? max_seqlen) -> Tensor",
    eager=_forward_eager,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "gated_residual_backward(Tensor grad, Tensor branch, Tensor gate, Tensor cu_seqlens, SymInt? max_seqlen)"
    " -> (Tensor, Tensor)",
    eager=_backward_eager,
    triton=_backward_triton,
    fake=_backward_fake,
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
    ) -> Tensor:
        ctx.save_for_backward(branch, gate, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return _forward(x, branch, gate, cu_seqlens, max_seqlen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, cu_seqlens = ctx.saved_tensors
        grad_branch, grad_gate = _backward(grad, branch, gate, cu_seqlens, ctx.max_seqlen)
        return grad, grad_branch, grad_gate, None, None


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """Add a branch to the residual stream, scaled by its sample's gate.

    Args:
        x, branch: (T, C).
        gate: (B, C), any float dtype and strides.
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths; without it the launch must cover T rows per sample.

    Returns:
        (T, C) in the dtype of x.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("x", x, "T", "C")
    expect_shape("branch", branch, *x.shape)
    expect_shape("gate", gate, samples, x.shape[1])
    return _GatedResidual.apply(x, branch, gate, cu_seqlens, max_seqlen)


def configurations() -> Iterator[Launch]:
    """Launches compiled ahead of time."""
    for name, x, vectors, offsets, _, tokens in launch_shapes():
        yield Launch(f"forward {name}", _forward_triton, (x, x, vectors, offsets, tokens))
        yield Launch(f"backward {name}", _backward_triton, (x, x, vectors, offsets, tokens))
