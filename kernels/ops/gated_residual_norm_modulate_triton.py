"""The Triton kernels of `gated_residual_norm_modulate`: what they compute stands there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.packed import unit_stride
from millrace.kernels.support.registration import HAS_TRITON
from millrace.kernels.support.rows import (
    add_partial_sums,
    launch_shapes,
    partial_sums,
    row_launch,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.support.rows import (
        layer_norm_gradient,
        layer_norm_row,
        load_row,
    )

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
        sample = tl.program_id(1).to(tl.int64)
        first = tl.load(cu_seqlens + sample).to(tl.int64) + tl.program_id(0) * ROWS
        end = tl.minimum(first + ROWS, tl.load(cu_seqlens + sample + 1).to(tl.int64))
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        factor = load_row(gate + sample * gate_stride, column, inside)
        bias = load_row(shift + sample * shift_stride, column, inside)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, inside)
        for row in range(first, end):
            value = load_row(x + row * x_stride, column, inside)
            added = load_row(branch + row * branch_stride, column, inside)
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
        partial_size,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample = tl.program_id(1).to(tl.int64)
        first = tl.load(cu_seqlens + sample).to(tl.int64) + tl.program_id(0) * ROWS
        end = tl.minimum(first + ROWS, tl.load(cu_seqlens + sample + 1).to(tl.int64))
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        factor = load_row(gate + sample * gate_stride, column, inside)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, inside)
        gate_sum = tl.zeros((BLOCK,), tl.float32)
        shift_sum = tl.zeros((BLOCK,), tl.float32)
        scale_sum = tl.zeros((BLOCK,), tl.float32)
        for row in range(first, end):
            gradient = load_row(grad_y + row * grad_y_stride, column, inside)
            value = load_row(out + row * WIDTH, column, inside)
            row_rstd = tl.load(rstd + row)
            normed = tl.where(inside, (value - tl.load(mean + row)) * row_rstd, 0.0)
            shift_sum += gradient
            scale_sum += gradient * normed
            through = layer_norm_gradient(gradient * gain, normed, row_rstd, WIDTH)
            through += load_row(grad_out + row * grad_out_stride, column, inside)
            tl.store(grad_x + row * WIDTH + column, through, mask=inside)
            added = load_row(branch + row * branch_stride, column, inside)
            gate_sum += through * added
            tl.store(grad_branch + row * WIDTH + column, factor * through, mask=inside)
        at = partial + (sample * tl.num_programs(0) + tl.program_id(0)) * WIDTH + column
        tl.store(at, gate_sum, mask=inside)
        tl.store(at + partial_size, shift_sum, mask=inside)
        tl.store(at + 2 * partial_size, scale_sum, mask=inside)


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
    launch = row_launch(*out.shape, len(gate), max_seqlen)
    partial = partial_sums(3, launch, out.shape[1], out.device)
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
        partial.stride(0),
        WIDTH=out.shape[1],
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    return grad_x, grad_branch, add_partial_sums(partial)


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
    return torch.empty_like(out), grad_branch, mean.new_empty(3, *gate.shape)


def configurations() -> Iterator[Launch]:
    """Launches compiled ahead of time."""
    for name, x, vectors, offsets, statistics, tokens in launch_shapes():
        three = (vectors, vectors, vectors)
        yield Launch(f"forward {name}", forward_triton, (x, x, *three, offsets, 1e-6, tokens))
        saved = (x, x, vectors, vectors, offsets, statistics, statistics)
        yield Launch(f"backward {name}", backward_triton, (x, x, *saved, tokens))
