"""y = (1 + scale_b) * LayerNorm(x) + shift_b, the adaLN of DiT (Peebles & Xie, arXiv 2212.09748, section 3).

LayerNorm has no affine part. Row r of the packed x belongs to sample b; shift and scale are per sample.
Mean, variance and the modulation are FP32 whatever the dtype of x. With n = (x - mean) * rstd:

    dx = rstd * (g - mean_C(g) - n * mean_C(g * n)),  g = (1 + scale_b) * dy
    dshift_b = sum over the rows of b of dy,  dscale_b = the same of dy * n

`prenorm_modulate` is the same at the start of a residual branch: it also hands on the stream that it
normalises, so that the stream's gradient enters the backward kernel and is added to dx there, as the
`prenorm` of flash-linear-attention's and quack's norms does. Autograd would add the two gradients of x with a
kernel of its own.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.compilation import Launch
from millrace.kernels.support.packed import one_dtype, rows_from_samples, sample_groups, unit_stride, widen
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
        grad_stream,
        x,
        scale,
        cu_seqlens,
        mean,
        rstd,
        grad_x,
        partial,
        grad_stride,
        stream_stride,
        x_stride,
        scale_stride,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        sample, first, end = owned_run(cu_seqlens)
        column = tl.arange(0, BLOCK)
        gain = 1.0 + load_row(scale + sample * scale_stride, column, column < WIDTH)
        shift_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        scale_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        # Two stages: the next rows are on their way into shared memory while these are reduced.
        for start in tl.range(first, end, ROWS, num_stages=2):
            row = start + tl.arange(0, ROWS)
            inside = (row < end)[:, None] & (column < WIDTH)[None, :]
            gradient = load_tile(grad_y, grad_stride, row, column, inside).to(tl.float32)
            value = load_tile(x, x_stride, row, column, inside).to(tl.float32)
            if grad_stream is not None:
                passed = load_tile(grad_stream, stream_stride, row, column, inside)
            # Mean and rstd are kept (8 bytes a row): finding them again would put two reductions before the
            # two that the gradient needs anyway.
            row_mean = tl.load(mean + row, mask=row < end, other=0.0)
            row_rstd = tl.load(rstd + row, mask=row < end, other=0.0)
            normed = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
            shift_sum += gradient
            scale_sum += gradient * normed
            value = layer_norm_tile_gradient(gradient * gain[None, :], normed, row_rstd, WIDTH)
            if grad_stream is not None:
                value += passed.to(tl.float32)
            tl.store(grad_x + row[:, None] * WIDTH + column[None, :], value, mask=inside)
        samples = tl.num_programs(1)
        store_sum(partial, 0, shift_sum, sample, samples, column, WIDTH)
        store_sum(partial, 1, scale_sum, sample, samples, column, WIDTH)


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
    grad_stream: Tensor | None,
    x: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    grad_y, x, scale = unit_stride(grad_y), unit_stride(x), unit_stride(scale)
    if grad_stream is not None:
        grad_stream = unit_stride(grad_stream)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = sum_launch(x, len(scale), max_seqlen)
    partial, sums = sums_of_programs(2, launch, x.shape[1], scale)
    norm_modulate_bwd_kernel[launch.grid](
        grad_y,
        grad_stream,
        x,
        scale,
        cu_seqlens,
        mean,
        rstd,
        grad_x,
        partial,
        grad_y.stride(0),
        0 if grad_stream is None else grad_stream.stride(0),
        x.stride(0),
        scale.stride(0),
        WIDTH=x.shape[1],
        BLOCK=launch.block,
        ROWS=launch.rows,
        num_warps=launch.warps,
    )
    fold(partial, sums)
    return grad_x, sums


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
    grad_stream: Tensor | None,
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
        gradient = modulate_rows_gradient(
            grad_y[rows], x[rows], gain[members], mean[rows], rstd[rows], sums[:, members]
        )
        grad_x[rows] = gradient if grad_stream is None else gradient.add_(grad_stream[rows])
    return grad_x, sums.to(scale.dtype)


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
    grad_stream: Tensor | None,
    x: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, scale.new_empty(2, *scale.shape)


_forward = register(
    "norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor cu_seqlens, float eps, SymInt? max_seqlen)"
    " -> (Tensor, Tensor, Tensor)",
    eager=_forward_eager,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "norm_modulate_backward(Tensor grad_y, Tensor? grad_stream, Tensor x, Tensor scale, Tensor cu_seqlens,"
    " Tensor mean, Tensor rstd, SymInt? max_seqlen) -> (Tensor grad_x, Tensor grad_shift_scale)",
    eager=_backward_eager,
    triton=_backward_triton,
    fake=_backward_fake,
)


class _NormModulate(torch.autograd.Function):
    """y, or the stream x itself and y where `keep_stream`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor,
        eps: float,
        max_seqlen: int | None,
        keep_stream: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, mean, rstd = _forward(x, shift, scale, cu_seqlens, eps, max_seqlen)
        ctx.save_for_backward(x, scale, cu_seqlens, mean, rstd)
        ctx.max_seqlen = max_seqlen
        return (x, y) if keep_stream else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, cu_seqlens, mean, rstd = ctx.saved_tensors
        *stream, grad_y = gradients
        grad_stream = stream[0] if stream else None
        grad_x, (grad_shift, grad_scale) = _backward(
            grad_y, grad_stream, x, scale, cu_seqlens, mean, rstd, ctx.max_seqlen
        )
        return grad_x, grad_shift, grad_scale, None, None, None, None


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
        shift, scale: (B, C), any float dtype and strides; of two dtypes they are brought to the wider one.
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths; without it the launch must cover T rows per sample.

    Returns:
        (T, C) in the dtype of x.
    """
    return _apply(x, shift, scale, cu_seqlens, eps, max_seqlen, keep_stream=False)


def prenorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream and `norm_modulate` of it, for a branch that will be added to that stream.

    Arguments are those of `norm_modulate`. Go on with the stream that is returned, not with `x`: only then is
    its gradient added in the backward kernel.

    Returns:
        x itself, no copy, and y (T, C).
    """
    return _apply(x, shift, scale, cu_seqlens, eps, max_seqlen, keep_stream=True)


def _apply(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    max_seqlen: int | None,
    keep_stream: bool,
) -> Any:
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("x", x, "T", "C")
    expect_shape("shift", shift, samples, x.shape[1])
    expect_shape("scale", scale, samples, x.shape[1])
    shift, scale = one_dtype(shift, scale)
    return _NormModulate.apply(x, shift, scale, cu_seqlens, eps, max_seqlen, keep_stream)


def configurations() -> Iterator[Launch]:
    """Launches compiled ahead of time."""
    for name, x, vectors, offsets, statistics, tokens in launch_shapes():
        yield Launch(f"forward {name}", _forward_triton, (x, vectors, vectors, offsets, 1e-6, tokens))
        saved = (x, vectors, offsets, statistics, statistics)
        yield Launch(f"backward {name}", _backward_triton, (x, None, *saved, tokens))
        yield Launch(f"backward with the stream's {name}", _backward_triton, (x, x, *saved, tokens))
