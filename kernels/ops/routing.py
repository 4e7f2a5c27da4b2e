"""Token routing: choose, per sample, which rows run through the routed blocks; take them out, put them back.

A route (`sample_route.py`) is an index into the packed rows, nothing else. Kept rows are ascending, so that
gathers read memory forward, and no row is kept twice: the backward of a gather is a scatter and the other way
round, without atomics.

    gather_tokens:   out[k] = x[index[k]],            grad_x = 0, but grad_x[index[k]] = grad_out[k]
    scatter_tokens:  out = base, but                  grad_base = grad_out, but grad_base[index[k]] = 0
                     out[index[k]] = update[k],       grad_update[k] = grad_out[index[k]]
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.ops.sample_route import Route, kept_tokens, sample_route
from millrace.kernels.support import cuda_library
from millrace.kernels.support.checks import expect_shape
from millrace.kernels.support.choice import choose
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import unit_stride
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl

__all__ = ["Route", "gather_tokens", "kept_tokens", "sample_route", "scatter_tokens"]


if HAS_TRITON:

    @triton.jit(do_not_specialize=["rows"])
    def copy_rows_kernel(
        source,
        target,
        index,
        rows,
        source_stride,
        target_stride,
        WIDTH: tl.constexpr,
        GATHER: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        near = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        far = tl.load(index + near, mask=near < rows, other=0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (near < rows)[:, None] & (column < WIDTH)[None, :]
        source_row, target_row = (far, near) if GATHER else (near, far)
        value = tl.load(source + source_row[:, None] * source_stride + column[None, :], mask=inside)
        tl.store(target + target_row[:, None] * target_stride + column[None, :], value, mask=inside)


def _copy_rows(source: Tensor, target: Tensor, index: Tensor, gather: bool) -> None:
    """Copy len(index) rows; a program takes 16 of 256 columns, 512 bytes of each row in 16 bit."""
    rows, width = len(index), source.shape[1]
    block = min(triton.next_power_of_2(width), 256)
    grid = (triton.cdiv(rows, 16), triton.cdiv(width, block))
    if rows and width:
        copy_rows_kernel[grid](
            source,
            target,
            index,
            rows,
            source.stride(0),
            target.stride(0),
            WIDTH=width,
            GATHER=gather,
            ROWS=16,
            BLOCK=block,
            num_warps=4,
        )


def _gather_triton(x: Tensor, index: Tensor) -> Tensor:
    x, out = unit_stride(x), _gather_fake(x, index)
    _copy_rows(x, out, index.contiguous(), gather=True)
    return out


def _scatter_triton(base: Tensor, update: Tensor, index: Tensor) -> None:
    if base.stride(1) != 1:
        return _scatter_eager(base, update, index)
    return _copy_rows(unit_stride(update), base, index.contiguous(), gather=False)


def _gather_eager(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def _scatter_eager(base: Tensor, update: Tensor, index: Tensor) -> None:
    base.index_copy_(0, index, update)


def _gather_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _scatter_fake(base: Tensor, update: Tensor, index: Tensor) -> None:
    return None


_gather = register(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    eager=_gather_eager,
    triton=_gather_triton,
    fake=_gather_fake,
)
_scatter = register(
    "scatter_rows_(Tensor(a!) base, Tensor update, Tensor index) -> ()",
    eager=_scatter_eager,
    triton=_scatter_triton,
    fake=_scatter_fake,
)


def _operators(implementation: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    if implementation == "triton":
        return _gather, _scatter
    return cuda_library.gather_rows, cuda_library.scatter_rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, implementation: str) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.implementation = x.shape[0], implementation
        gather, _ = _operators(implementation)
        return gather(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        _, scatter = _operators(ctx.implementation)
        grad_x = grad_out.new_zeros(ctx.rows, grad_out.shape[1])
        scatter(grad_x, grad_out, index)
        return grad_x, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, update: Tensor, index: Tensor, inplace: bool, implementation: str
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.implementation = implementation
        _, scatter = _operators(implementation)
        if inplace:
            ctx.mark_dirty(base)
        else:
            base = base.clone(memory_format=torch.contiguous_format)
        scatter(base, update, index)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        gather, _ = _operators(ctx.implementation)
        grad_base = grad_out.index_fill(0, index, 0) if ctx.needs_input_grad[0] else None
        grad_update = gather(grad_out, index) if ctx.needs_input_grad[1] else None
        return grad_base, grad_update, None, None, None


def gather_tokens(x: Tensor, index: Tensor, backend: str = "auto") -> Tensor:
    """Take rows out.

    Args:
        x: (T, C).
        index: (K,) int64, rows of x, each at most once.
        backend: `reference`, `triton` (plain PyTorch on the CPU), `cuda` (csrc), or `auto`, the fastest
            measured.

    Returns:
        (K, C), contiguous.
    """
    expect_shape("x", x, "T", "C")
    expect_shape("index", index, "K")
    implementation = choose("gather_tokens", backend, x, {"cuda": cuda_library.obstacle})
    if implementation == "reference":
        return x.index_select(0, index)
    return _Gather.apply(x, index, implementation)


def scatter_tokens(
    base: Tensor, update: Tensor, index: Tensor, inplace: bool = False, backend: str = "auto"
) -> Tensor:
    """Put rows back.

    Args:
        base: (T, C).
        update: (K, C), brought to the dtype of base.
        index: (K,) int64, rows of base, each at most once.
        inplace: write into `base` and return it, which moves K rows instead of T + K. Nobody else may need
            the old rows: what autograd has saved of them it notices in backward and raises RuntimeError,
            other tensors that share the memory just see the new rows.
        backend: as of `gather_tokens`.

    Returns:
        (T, C): base with rows `index` replaced.
    """
    expect_shape("base", base, "T", "C")
    expect_shape("index", index, "K")
    expect_shape("update", update, index.shape[0], base.shape[1])
    update = update.to(base.dtype)

    def obstacle() -> str | None:
        apart = "base is not contiguous" if inplace and not base.is_contiguous() else None
        return cuda_library.obstacle() or apart

    implementation = choose("scatter_tokens", backend, base, {"cuda": obstacle})
    if implementation == "reference":
        return (base.index_copy_ if inplace else base.index_copy)(0, index, update)
    return _Scatter.apply(base, update, index, inplace, implementation)


def configurations() -> Iterator[Launch]:
    """Half the rows of PRX's 1.2 B and 7 B models, and rows that are no multiple of 16 bytes."""
    for width in (1792, 3584, 27):
        for dtype in (torch.bfloat16, torch.float32):
            rows, kept = meta(8192, width, dtype=dtype), meta(4096, width, dtype=dtype)
            index = meta(4096, dtype=torch.int64)
            yield Launch(f"gather C={width} {dtype}", _gather_triton, (rows, index))
            yield Launch(f"scatter C={width} {dtype}", _scatter_triton, (rows, kept, index))
