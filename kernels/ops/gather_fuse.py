"""SPRINT's fusion of the dense and the routed stream (arXiv 2510.21986) without a concatenation. Defined as

    out[r] = weight @ concat(dense[r], padded[r]) + bias        dense (T, C), weight (C, 2C), out (T, C)
    padded[r] = deep[k] if r == index[k] else mask_token        deep (K, C), K <= T

the weight splits in two halves. The dense half multiplies all T rows. The deep half multiplies the K kept
rows only: in all others it meets the mask token, which makes one constant vector.

    out         = dense @ W_dense^T + (bias + W_deep @ mask_token)      product of T rows
    out[index] += deep @ W_deep^T - W_deep @ mask_token                 product of K rows; one pass in place

Backward is two products per half again, a gather of the gradient's kept rows, and its column sums over the
kept and over the masked rows in the same pass: partial sums per run of rows, no atomics. Products are
cuBLAS's; only the passes over rows are Triton kernels, and those add in FP32.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from millrace.kernels.support.autocast import autocast_dtype
from millrace.kernels.support.checks import expect_shape
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import widen
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl

Order = Literal["dense_deep", "deep_dense"]
"""Of the two halves in the concatenation: Photoroom/PRX's, and that of the paper's code."""


def reference(
    dense: Tensor,
    deep: Tensor,
    index: Tensor | None,
    mask_token: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Order = "dense_deep",
) -> Tensor:
    """The definition: fill, concatenate, multiply."""
    padded = deep if index is None else mask_token.expand_as(dense).index_copy(0, index, deep)
    pair = (dense, padded) if order == "dense_deep" else (padded, dense)
    return F.linear(torch.cat(pair, dim=1), weight, bias)


if HAS_TRITON:

    @triton.jit
    def gather_fuse_fwd_kernel(out, update, shift, index, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        # Program (k, block of columns): out[index[k]] += update[k] - shift, in place.
        k = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        # In place and without atomics: every row has at most one k.
        here = out + tl.load(index + k) * WIDTH + column
        value = tl.load(here, mask=inside).to(tl.float32)
        value += tl.load(update + k * WIDTH + column, mask=inside).to(tl.float32)
        value -= tl.load(shift + column, mask=inside)
        tl.store(here, value, mask=inside)

    @triton.jit(do_not_specialize=["total"])
    def gather_fuse_bwd_kernel(
        grad,
        place,
        kept,
        partial,
        total,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # Program (run of rows, block of columns): kept[place[r]] = grad[r] where place[r] is not -1, and
        # partial (runs, 2, C), the sums over the run's kept and over its masked rows.
        first = tl.program_id(0).to(tl.int64) * ROWS
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        # Sums stay two-dimensional in the loop, so that threads of a warp meet once, at its end.
        of_kept = tl.zeros((TILE, BLOCK), tl.float32)
        of_masked = tl.zeros((TILE, BLOCK), tl.float32)
        for start in range(0, ROWS, TILE):
            row = first + start + tl.arange(0, TILE)
            target = tl.load(place + row, mask=row < total, other=-1).to(tl.int64)
            is_kept = (target >= 0)[:, None]
            at = row[:, None] * WIDTH + column[None, :]
            value = tl.load(grad + at, mask=(row < total)[:, None] & inside[None, :], other=0.0)
            at = target[:, None] * WIDTH + column[None, :]
            tl.store(kept + at, value, mask=is_kept & inside[None, :])
            wide = value.to(tl.float32)
            of_kept += tl.where(is_kept, wide, 0.0)
            of_masked += tl.where(is_kept, 0.0, wide)
        sums = partial + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
        tl.store(sums, tl.sum(of_kept, axis=0), mask=inside)
        tl.store(sums + WIDTH, tl.sum(of_masked, axis=0), mask=inside)


COLUMNS = 1024
"""Of a forward program: eight 16-bit numbers, one 16-byte access, for each of 128 threads."""
ROWS, TILE, BLOCK = 128, 16, 128
"""Of a backward program: rows of its run, rows of one step, columns."""


def _add_rows_triton(out: Tensor, update: Tensor, shift: Tensor, index: Tensor) -> None:
    """out[index] += update - shift, rounded once; out (T, C), update (K, C), shift (C,) FP32."""
    kept, width = update.shape
    block = min(COLUMNS, triton.next_power_of_2(width))
    if kept:
        grid = (kept, triton.cdiv(width, block))
        gather_fuse_fwd_kernel[grid](out, update, shift, index, WIDTH=width, BLOCK=block, num_warps=4)


def _add_rows_eager(out: Tensor, update: Tensor, shift: Tensor, index: Tensor) -> None:
    rows = widen(out.index_select(0, index)).add_(update).sub_(shift)
    out.index_copy_(0, index, rows.to(out.dtype))


def _split_rows_triton(grad: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept rows of grad (T, C): (K, C); column sums (C,) FP32 over the kept and over the other rows."""
    (total, width), kept = grad.shape, len(index)
    place = torch.full((total,), -1, dtype=torch.int32, device=grad.device)
    place.index_copy_(0, index, torch.arange(kept, dtype=torch.int32, device=grad.device))
    rows = grad.new_empty(kept, width)
    runs = triton.cdiv(total, ROWS)
    partial = torch.empty(runs, 2, width, dtype=torch.float32, device=grad.device)
    if runs:
        grid = (runs, triton.cdiv(width, BLOCK))
        gather_fuse_bwd_kernel[grid](
            grad, place, rows, partial, total, WIDTH=width, ROWS=ROWS, TILE=TILE, BLOCK=BLOCK, num_warps=4
        )
    of_kept, of_masked = partial.sum(0)
    return rows, of_kept, of_masked


def _split_rows_eager(grad: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad.index_select(0, index)
    wide = torch.promote_types(grad.dtype, torch.float32)
    of_masked = grad.index_fill(0, index, 0).sum(0, dtype=wide)
    return rows, rows.sum(0, dtype=wide), of_masked


def _halves(weight: Tensor, deep_first: bool) -> tuple[Tensor, Tensor]:
    """Views (C, C) of the columns of `weight` (C, 2C) that meet the dense and the deep rows."""
    first, second = weight.chunk(2, dim=1)
    return (second, first) if deep_first else (first, second)


def _forward(
    add_rows: Callable[..., None],
    dense: Tensor,
    deep: Tensor,
    index: Tensor | None,
    mask_token: Tensor,
    weight: Tensor,
    bias: Tensor,
    deep_first: bool,
) -> Tensor:
    of_dense, of_deep = _halves(weight, deep_first)
    if index is None:
        return F.linear(dense, of_dense, bias).addmm_(deep, of_deep.t())
    masked_bias = F.linear(mask_token[None], of_deep, bias)[0]
    out = F.linear(dense, of_dense, masked_bias)
    # What is taken off again is what was added, its rounding included.
    add_rows(out, F.linear(deep, of_deep), widen(masked_bias) - widen(bias), index)
    return out


def _forward_triton(*arguments: Any) -> Tensor:
    return _forward(_add_rows_triton, *arguments)


def _forward_eager(*arguments: Any) -> Tensor:
    return _forward(_add_rows_eager, *arguments)


def _backward(
    split_rows: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad: Tensor,
    dense: Tensor,
    deep: Tensor,
    index: Tensor | None,
    mask_token: Tensor,
    weight: Tensor,
    deep_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dense, deep, mask_token, weight and bias."""
    grad = grad.contiguous()
    of_dense, of_deep = _halves(weight, deep_first)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    to_dense, to_deep = _halves(grad_weight, deep_first)
    torch.mm(grad.t(), dense, out=to_dense)
    if index is None:
        torch.mm(grad.t(), deep, out=to_deep)
        grad_bias = grad.sum(0)
        return grad @ of_dense, grad @ of_deep, torch.zeros_like(mask_token), grad_weight, grad_bias
    kept, of_kept, of_masked = split_rows(grad, index)
    masked = of_masked.to(grad.dtype)
    torch.addmm(torch.outer(masked, mask_token), kept.t(), deep, out=to_deep)
    grad_bias = (of_kept + of_masked).to(grad.dtype)
    return grad @ of_dense, kept @ of_deep, (masked[None] @ of_deep)[0], grad_weight, grad_bias


def _backward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward(_split_rows_triton, *arguments)


def _backward_eager(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward(_split_rows_eager, *arguments)


def _forward_fake(
    dense: Tensor,
    deep: Tensor,
    index: Tensor | None,
    mask_token: Tensor,
    weight: Tensor,
    bias: Tensor,
    deep_first: bool,
) -> Tensor:
    return dense.new_empty(dense.shape)


def _backward_fake(
    grad: Tensor,
    dense: Tensor,
    deep: Tensor,
    index: Tensor | None,
    mask_token: Tensor,
    weight: Tensor,
    deep_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vector = mask_token.new_empty(mask_token.shape)
    results = (tensor.new_empty(tensor.shape) for tensor in (dense, deep))
    return *results, vector, weight.new_empty(weight.shape), torch.empty_like(vector)


_ARGUMENTS = "Tensor dense, Tensor deep, Tensor? index, Tensor mask_token, Tensor weight"
_forward_operator = register(
    f"gather_fuse({_ARGUMENTS}, Tensor bias, bool deep_first) -> Tensor",
    eager=_forward_eager,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward_operator = register(
    f"gather_fuse_backward(Tensor grad, {_ARGUMENTS}, bool deep_first)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    eager=_backward_eager,
    triton=_backward_triton,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.millrace.gather_fuse)
def _forward_flops(dense: torch.Size, deep: torch.Size, *_rest: Any, **_keywords: Any) -> int:
    """Of the products that are made: (T + K) rows, each with half of the weight."""
    return 2 * (dense[0] + deep[0]) * dense[1] ** 2


@register_flop_formula(torch.ops.millrace.gather_fuse_backward)
def _backward_flops(
    _grad: torch.Size, dense: torch.Size, deep: torch.Size, *_rest: Any, **_keywords: Any
) -> int:
    return 2 * _forward_flops(dense, deep)


class _GatherFuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dense: Tensor,
        deep: Tensor,
        index: Tensor | None,
        mask_token: Tensor,
        weight: Tensor,
        bias: Tensor,
        deep_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(dense, deep, index, mask_token, weight)
        ctx.deep_first = deep_first
        return _forward_operator(dense, deep, index, mask_token, weight, bias, deep_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dense, deep, index, mask_token, weight = ctx.saved_tensors
        to_dense, to_deep, to_mask, to_weight, to_bias = _backward_operator(
            grad, dense, deep, index, mask_token, weight, ctx.deep_first
        )
        return to_dense, to_deep, None, to_mask, to_weight, to_bias, None


def gather_fuse(
    dense: Tensor,
    deep: Tensor,
    index: Tensor | None,
    mask_token: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Order = "dense_deep",
) -> Tensor:
    """Linear(concat(dense, deep where kept, else mask token)): (T, C).

    Args:
        dense: (T, C), the stream that bypassed.
        deep: (K, C), rows of the stream that did not; (T, C) if `index` is None.
        index: (K,) int64, unique rows of `dense` that `deep` belongs to; None for all of them, in order.
        mask_token: (C,), stands for `deep` in all other rows.
        weight, bias: (C, 2C) and (C,) of the linear layer.
        order: which half of the concatenation comes first.

    Under autocast the tensors are cast as for `torch.nn.functional.linear`; else they share one dtype.
    """
    expect_shape("dense", dense, "T", "C")
    total, width = dense.shape
    if index is None:
        expect_shape("deep", deep, total, width)
    else:
        expect_shape("index", index, "K")
        if index.dtype != torch.int64:
            raise ValueError(f"index is {index.dtype}, expected torch.int64")
        expect_shape("deep", deep, index.shape[0], width)
    expect_shape("mask_token", mask_token, width)
    expect_shape("weight", weight, width, 2 * width)
    expect_shape("bias", bias, width)
    if order not in ("dense_deep", "deep_dense"):
        raise ValueError(f"order is {order!r}, expected 'dense_deep' or 'deep_dense'")
    tensors = {"dense": dense, "deep": deep, "mask_token": mask_token, "weight": weight, "bias": bias}
    dtype = autocast_dtype(dense.device.type)
    if dtype is not None and dense.dtype != torch.float64:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    else:
        for name, tensor in tensors.items():
            if tensor.dtype != dense.dtype:
                raise ValueError(f"{name} is {tensor.dtype}, expected {dense.dtype} as dense is")
    dense, deep, mask_token, weight, bias = tensors.values()
    return _GatherFuse.apply(dense, deep, index, mask_token, weight, bias, order == "deep_dense")


def configurations() -> Iterator[Launch]:
    """PRX-1.2B and 7B, 32 pictures of 1024 tokens of which a quarter is kept."""
    total, kept = 32 * 1024, 32 * 256
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (1792, 3584):
            dense, deep = meta(total, width, dtype=dtype), meta(kept, width, dtype=dtype)
            token, weight = meta(width, dtype=dtype), meta(width, 2 * width, dtype=dtype)
            common = (dense, deep, meta(kept, dtype=torch.int64), token, weight)
            yield Launch(f"forward C={width} {dtype}", _forward_triton, (*common, token, False))
            yield Launch(f"backward C={width} {dtype}", _backward_triton, (dense, *common, False))
