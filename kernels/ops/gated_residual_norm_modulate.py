"""x' = x + gate_b * branch and y = (1 + scale_b) * LayerNorm(x') + shift_b in one pass over memory.

The end of one half of a transformer block fused with the norm that opens the next (see `gated_residual` and
`norm_modulate`). The norm sees x' as it is stored, rounded to the dtype of x. With d the gradient of x'
through both outputs:

    d = dx' + LayerNorm's gradient of (1 + scale_b) * dy,   dx = d,   dbranch = gate_b * d
    dgate_b, dshift_b, dscale_b = sums over the rows of b of d * branch, dy, dy * normed
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.ops.gated_residual import add_branch_rows
from millrace.kernels.ops.gated_residual import reference as add_branch
from millrace.kernels.ops.norm_modulate import modulate_rows, modulate_rows_gradient
from millrace.kernels.ops.norm_modulate import reference as modulate
from millrace.kernels.support import cuda_library
from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.choice import choose
from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.packed import one_dtype, sample_groups, unit_stride, widen
from millrace.kernels.support.registration import HAS_TRITON, register
from millrace.kernels.support.rows import fold, launch_shapes, row_launch, sum_launch, sums_of_programs

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.support.rows import (
        layer_norm_row,
        layer_norm_tile_gradient,
        load_row,
        load_tile,
        owned_rows,
        owned_run,
        store_sum,
    )


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
    grad_x, grad_branch, _ = backward_fake(
        grad_out, grad_y, out, branch, gate, scale, cu_seqlens, mean, rstd, max_seqlen
    )
    sums, dtype = mean.new_zeros(3, *gate.shape), gate.dtype
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
    return grad_x, grad_branch, sums.to(dtype)


if HAS_TRITON:

    @triton.jit
    def gated_residual_norm_modulate_fwd_kernel(
        x,
        branch,
        gate,
        shift,
        scale,
        cu_seqlens,
        out,
        y,
        mean,
        rstd,
        x_stride,
        branch_stride,
        gate_stride,
        shift_stride,
        scale_stride,
        eps,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end, column, inside = owned_rows(cu_seqlens, WIDTH, BLOCK, ROWS)
        factor = load_row(gate + sample * gate_stride, column, inside)
        bias = load_row(shift + sample * shift_stride, column, inside)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, inside)
        for row in range(first, end):
            value = load_row(x + row * x_stride, column, inside)
            added = load_row(branch + row * branch_stride, column, inside)
            # The norm sees the rounded x', which is what the next block and backward read.
            stored = (value + factor * added).to(out.dtype.element_ty)
            tl.store(out + row * WIDTH + column, stored, mask=inside)
            normed, row_mean, row_rstd = layer_norm_row(stored.to(tl.float32), inside, eps, WIDTH)
            tl.store(y + row * WIDTH + column, gain * normed + bias, mask=inside)
            tl.store(mean + row, row_mean)
            tl.store(rstd + row, row_rstd)

    @triton.jit
    def gated_residual_norm_modulate_bwd_kernel(
        grad_out,
        grad_y,
        out,
        branch,
        gate,
        scale,
        cu_seqlens,
        mean,
        rstd,
        grad_x,
        grad_branch,
        partial,
        grad_out_stride,
        grad_y_stride,
        branch_stride,
        gate_stride,
        scale_stride,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end = owned_run(cu_seqlens)
        column = tl.arange(0, BLOCK)
        factor = load_row(gate + sample * gate_stride, column, column < WIDTH)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, column < WIDTH)
        gate_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        shift_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        scale_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        # Two stages: the next rows are on their way into shared memory while these are reduced.
        for start in tl.range(first, end, ROWS, num_stages=2):
            row = start + tl.arange(0, ROWS)
            inside = (row < end)[:, None] & (column < WIDTH)[None, :]
            # All loads before the first reduction, so that the row waits for memory once.
            gradient = load_tile(grad_y, grad_y_stride, row, column, inside).to(tl.float32)
            value = load_tile(out, WIDTH, row, column, inside).to(tl.float32)
            passed = load_tile(grad_out, grad_out_stride, row, column, inside)
            added = load_tile(branch, branch_stride, row, column, inside)
            row_mean = tl.load(mean + row, mask=row < end, other=0.0)
            row_rstd = tl.load(rstd + row, mask=row < end, other=0.0)
            normed = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
            shift_sum += gradient
            scale_sum += gradient * normed
            through = layer_norm_tile_gradient(gradient * gain[None, :], normed, row_rstd, WIDTH)
            through += passed.to(tl.float32)
            at = row[:, None] * WIDTH + column[None, :]
            tl.store(grad_x + at, through, mask=inside)
            gate_sum += through * added.to(tl.float32)
            tl.store(grad_branch + at, factor[None, :] * through, mask=inside)
        samples = tl.num_programs(1)
        store_sum(partial, 0, gate_sum, sample, samples, column, WIDTH)
        store_sum(partial, 1, shift_sum, sample, samples, column, WIDTH)
        store_sum(partial, 2, scale_sum, sample, samples, column, WIDTH)


def forward_triton(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, branch = unit_stride(x), unit_stride(branch)
    gate, shift, scale = unit_stride(gate), unit_stride(shift), unit_stride(scale)
    out, y, mean, rstd = forward_fake(x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen)
    launch = row_launch(*x.shape, len(gate), max_seqlen)
    gated_residual_norm_modulate_fwd_kernel[launch.grid](
        x,
        branch,
        gate,
        shift,
        scale,
        cu_seqlens,
        out,
        y,
        mean,
        rstd,
        x.stride(0),
        branch.stride(0),
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        WIDTH=x.shape[1],
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    return out, y, mean, rstd


def backward_triton(
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
    grad_out, grad_y, branch = unit_stride(grad_out), unit_stride(grad_y), unit_stride(branch)
    gate, scale = unit_stride(gate), unit_stride(scale)
    grad_x = torch.empty_like(out)
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    launch = sum_launch(out, len(gate), max_seqlen)
    partial, sums = sums_of_programs(3, launch, out.shape[1], gate)
    gated_residual_norm_modulate_bwd_kernel[launch.grid](
        grad_out,
        grad_y,
        out,
        branch,
        gate,
        scale,
        cu_seqlens,
        mean,
        rstd,
        grad_x,
        grad_branch,
        partial,
        grad_out.stride(0),
        grad_y.stride(0),
        branch.stride(0),
        gate.stride(0),
        scale.stride(0),
        WIDTH=out.shape[1],
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    fold(partial, sums)
    return grad_x, grad_branch, sums


def forward_fake(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


def backward_fake(
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
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return torch.empty_like(out), grad_branch, gate.new_empty(3, *gate.shape)


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

    def backward(*args: Any) -> tuple[Any, ...]:
        grad_x, grad_branch, *vectors = cuda_library.gated_residual_norm_modulate_backward(*args)
        return grad_x, grad_branch, [vector.to(args[4].dtype) for vector in vectors]

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
        ctx.max_seqlen, ctx.implementation = max_seqlen, implementation
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        out, branch, gate, scale, cu_seqlens, mean, rstd = ctx.saved_tensors
        _, backward = _operators(ctx.implementation)
        grad_x, grad_branch, vectors = backward(
            grad_out, grad_y, out, branch, gate, scale, cu_seqlens, mean, rstd, ctx.max_seqlen
        )
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
        gate, shift, scale: (B, C), any float dtype and strides; of several dtypes they are brought to the
            widest one.
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
    usable = {"cuda": lambda: cuda_library.rows_obstacle(x, branch, widest=cuda_library.WIDEST)}
    implementation = choose("gated_residual_norm_modulate", backend, x, usable)
    gate, shift, scale = one_dtype(gate, shift, scale)
    if implementation == "reference":
        return reference(x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen)
    return _GatedResidualNormModulate.apply(
        x, branch, gate, shift, scale, cu_seqlens, eps, max_seqlen, implementation
    )


def configurations() -> Iterator[Launch]:
    """Launches compiled ahead of time."""
    for name, x, vectors, offsets, statistics, tokens in launch_shapes():
        three = (vectors, vectors, vectors)
        yield Launch(f"forward {name}", forward_triton, (x, x, *three, offsets, 1e-6, tokens))
        saved = (x, x, vectors, vectors, offsets, statistics, statistics)
        yield Launch(f"backward {name}", backward_triton, (x, x, *saved, tokens))
