"""y = (1 + scale_b) * LayerNorm(x) + shift_b, the adaLN of DiT (Peebles & Xie, arXiv 2212.09748, section 3).

LayerNorm has no affine part. Row r of the packed x belongs to sample b; shift and scale are per sample.
Mean, variance and the modulation are FP32 whatever the dtype of x. With n = (x - mean) * rstd:

    dx = rstd * (g - mean_C(g) - n * mean_C(g * n)),  g = (1 + scale_b) * dy
    dshift_b = sum over the rows of b of dy,  dscale_b = the same of dy * n
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.packed import rows_from_samples, sample_groups, unit_stride, widen
from millrace.kernels.support.registration import HAS_TRITON, register
from millrace.kernels.support.rows import add_partial_sums, launch_shapes, partial_sums, row_launch

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.support.rows import layer_norm_gradient, layer_norm_row, load_row, owned_rows


def reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
) -> Tensor:
    """The equation in plain PyTorch."""
    normed = F.layer_norm(widen(x), x.shape[1:], eps=eps)
    shift = rows_from_samples(widen(shift), cu_seqlens, len(x), max_seqlen)
    scale = rows_from_samples(widen(scale), cu_seqlens, len(x), max_seqlen)
    return ((1 + scale) * normed + shift).to(x.dtype)


if HAS_TRITON:

    @triton.jit
    def norm_modulate_fwd_kernel(
        x,
        shift,
        scale,
        cu_seqlens,
        y,
        mean,
        rstd,
        x_stride,
        shift_stride,
        scale_stride,
        eps,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end, column, inside = owned_rows(cu_seqlens, WIDTH, BLOCK, ROWS)
        bias = load_row(shift + sample * shift_stride, column, inside)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, inside)
        for row in range(first, end):
            value = load_row(x + row * x_stride, column, inside)
            normed, row_mean, row_rstd = layer_norm_row(value, inside, eps, WIDTH)
            tl.store(y + row * WIDTH + column, gain * normed + bias, mask=inside)
            tl.store(mean + row, row_mean)
            tl.store(rstd + row, row_rstd)

    @triton.jit
    def norm_modulate_bwd_kernel(
        grad_y,
        x,
        scale,
        cu_seqlens,
        mean,
        rstd,
        grad_x,
        partial,
        grad_stride,
        x_stride,
        scale_stride,
        partial_size,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end, column, inside = owned_rows(cu_seqlens, WIDTH, BLOCK, ROWS)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, inside)
        shift_sum = tl.zeros((BLOCK,), tl.float32)
        scale_sum = tl.zeros((BLOCK,), tl.float32)
        for row in range(first, end):
            gradient = load_row(grad_y + row * grad_stride, column, inside)
            value = load_row(x + row * x_stride, column, inside)
            row_rstd = tl.load(rstd + row)
            # Mean and rstd are kept (8 bytes a row): finding them again would put two reductions before the
            # two that the gradient needs anyway.
            normed = tl.where(inside, (value - tl.load(mean + row)) * row_rstd, 0.0)
            shift_sum += gradient
            scale_sum += gradient * normed
            value = layer_norm_gradient(gradient * gain, normed, row_rstd, WIDTH)
            tl.store(grad_x + row * WIDTH + column, value, mask=inside)
        at = partial + (sample * tl.num_programs(0) + tl.program_id(0)) * WIDTH + column
        tl.store(at, shift_sum, mask=inside)
        tl.store(at + partial_size, scale_sum, mask=inside)


def _forward_triton(
    x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float, max_seqlen: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    (total, width), samples = x.shape, len(shift)
    y, mean, rstd = _forward_fake(x, shift, scale, cu_seqlens, eps, max_seqlen)
    launch = row_launch(total, width, samples, max_seqlen)
    norm_modulate_fwd_kernel[launch.grid](
        x,
        shift,
        scale,
        cu_seqlens,
        y,
        mean,
        rstd,
        x.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        WIDTH=width,
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    return y, mean, rstd


def _backward_triton(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    grad_y, x, scale = unit_stride(grad_y), unit_stride(x), unit_stride(scale)
    (total, width), samples = x.shape, len(scale)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = row_launch(total, width, samples, max_seqlen)
    partial = partial_sums(2, launch, width, x.device)
    norm_modulate_bwd_kernel[launch.grid](
        grad_y,
        x,
        scale,
        cu_seqlens,
        mean,
        rstd,
        grad_x,
        partial,
        grad_y.stride(0),
        x.stride(0),
        scale.stride(0),
        partial.stride(0),
        WIDTH=width,
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    return grad_x, add_partial_sums(partial)


def _forward_eager(
    x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float, max_seqlen: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, shift, scale, cu_seqlens, eps, max_seqlen)
    gain, shift = 1 + widen(scale)[:, None], widen(shift)[:, None]
    for rows, members in sample_groups(cu_seqlens, len(x), max_seqlen):
        mean[rows], rstd[rows] = modulate_rows(x[rows], shift[members], gain[members], eps, y[rows])
    return y, mean, rstd


def modulate_rows(x: Tensor, shift: Tensor, gain: Tensor, eps: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """Write y (rows, C) of b samples with equally many rows; shift and gain are (b, 1, C). Mean and rstd."""
    normed, mean, rstd = torch.native_layer_norm(widen(x), x.shape[1:], None, None, eps)
    samples = (len(gain), -1, x.shape[1])
    torch.addcmul(shift, normed.view(samples), gain, out=y.view(samples))
    return mean[:, 0], rstd[:, 0]


def _backward_eager(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = mean.new_zeros(2, *scale.shape)
    gain = 1 + widen(scale)[:, None]
    for rows, members in sample_groups(cu_seqlens, len(x), max_seqlen):
        grad_x[rows] = modulate_rows_gradient(
            grad_y[rows], x[rows], gain[members], mean[rows], rstd[rows], sums[:, members]
        )
    return grad_x, sums


def modulate_rows_gradient(
    grad_y: Tensor, x: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor, sums: Tensor
) -> Tensor:
    """Gradient of x (rows, C) of b samples with equally many rows; those of shift and scale go to `sums`."""
    samples = (len(gain), -1, x.shape[1])
    x, grad_y, statistics = widen(x), widen(grad_y), (mean[:, None], rstd[:, None])
    through = grad_y.reshape(samples) * gain
    gradient, _, _ = torch.ops.aten.native_layer_norm_backward(
        through.view(x.shape), x, x.shape[1:], *statistics, None, None, (True, False, False)
    )
    normed = torch.sub(x, statistics[0], out=through.view(x.shape)).mul_(statistics[1])
    torch.sum(grad_y.reshape(samples), 1, out=sums[0])
    torch.sum(normed.mul_(grad_y).view(samples), 1, out=sums[1])
    return gradient


def _forward_fake(
    x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float, max_seqlen: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty(x.shape[0], dtype=statistics)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, mean.new_empty(2, *scale.shape)


_forward = register(
    "norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor cu_seqlens, float eps, SymInt? max_seqlen)"
    " -> (Tensor, Tensor, Tensor)",
    eager=_forward_eager,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "norm_modulate_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor cu_seqlens, Tensor mean,"
    " Tensor rstd, SymInt? max_seqlen) -> (Tensor grad_x, Tensor grad_shift_scale)",
    eager=_backward_eager,
    triton=_backward_triton,
    fake=_backward_fake,
)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor,
        eps: float,
        max_seqlen: int | None,
    ) -> Tensor:
        y, mean, rstd = _forward(x, shift, scale, cu_seqlens, eps, max_seqlen)
        ctx.save_for_backward(x, scale, cu_seqlens, mean, rstd)
        ctx.max_seqlen, ctx.shift_dtype = max_seqlen, shift.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, cu_seqlens, mean, rstd = ctx.saved_tensors
        grad_x, sums = _backward(grad_y, x, scale, cu_seqlens, mean, rstd, ctx.max_seqlen)
        grad_shift, grad_scale = sums.unbind()
        return grad_x, grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None, None, None


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
) -> Tensor:
    """Normalise each row of x and modulate it with its sample's shift and scale.

    Args:
        x: (T, C).
        shift, scale: (B, C), any float dtype and strides.
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths; without it the launch must cover T rows per sample.

    Returns:
        (T, C) in the dtype of x.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("x", x, "T", "C")
    expect_shape("shift", shift, samples, x.shape[1])
    expect_shape("scale", scale, samples, x.shape[1])
    return _NormModulate.apply(x, shift, scale, cu_seqlens, eps, max_seqlen)


def configurations() -> Iterator[Launch]:
    """Launches compiled ahead of time."""
    for name, x, vectors, offsets, statistics, tokens in launch_shapes():
        yield Launch(f"forward {name}", _forward_triton, (x, vectors, vectors, offsets, 1e-6, tokens))
        saved = (x, vectors, offsets, statistics, statistics)
        yield Launch(f"backward {name}", _backward_triton, (x, *saved, tokens))
