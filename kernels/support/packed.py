"""Packed sequences: the tokens of all samples lie in one (T, C) tensor, and `cu_seqlens` (B+1,) int32 says
where each sample starts.

Operations take `max_seqlen`, an upper bound of the sample lengths known on the host. It also tells, without
looking at device memory, whether the batch is uniform: the lengths add up to T and none is above
`max_seqlen`, so T == B * max_seqlen holds exactly when every sample has that length.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def is_uniform(total: int, samples: int, max_seqlen: int | None) -> bool:
    """Whether every one of `samples` sequences has length `max_seqlen`, given that they add up to `total`."""
    return max_seqlen is not None and total == samples * max_seqlen


def sample_of_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index of the sample that each packed row belongs to, (T,) int64; samples may be empty."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)


def rows_from_samples(
    values: Tensor, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None
) -> Tensor:
    """Repeat `values` (B, ...) over the rows of each sample: (T, ...)."""
    samples = cu_seqlens.numel() - 1
    if is_uniform(total, samples, max_seqlen):
        return values.unsqueeze(1).expand(samples, max_seqlen, *values.shape[1:]).flatten(0, 1)
    return _RepeatRows.apply(values, cu_seqlens, total)


class _RepeatRows(torch.autograd.Function):
    """`index_select` whose backward sums segment by segment: with atomics, as its own does on CUDA, thousands
    of rows would add to one address, in another order in every run."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return values.index_select(0, sample_of_row(cu_seqlens, total))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return samples_from_rows(grad, cu_seqlens), None, None


def samples_from_rows(values: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
    """Sum `values` (T, ...) over the rows of each sample: (B, ...), zero for an empty sample."""
    samples = cu_seqlens.numel() - 1
    if is_uniform(len(values), samples, max_seqlen):
        return values.unflatten(0, (samples, max_seqlen)).sum(1)
    return torch.segment_reduce(values.contiguous(), "sum", offsets=cu_seqlens.long(), initial=0, unsafe=True)


def sample_slices(cu_seqlens: Tensor) -> list[slice]:
    """Rows of each sample. Reads the offsets on the host: for CPU tensors."""
    offsets = cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(offsets)]


def sample_groups(cu_seqlens: Tensor, total: int, max_seqlen: int | None) -> list[tuple[slice, slice]]:
    """Rows and samples that one call on (samples, rows of each, C) covers: all if uniform, else one sample.

    Samples without rows are left out. For CPU tensors, like `sample_slices`.
    """
    samples = cu_seqlens.shape[0] - 1
    if is_uniform(total, samples, max_seqlen):
        return [(slice(0, total), slice(0, samples))] if total else []
    rows = sample_slices(cu_seqlens)
    return [(span, slice(b, b + 1)) for b, span in enumerate(rows) if span.start < span.stop]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for the device's queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """CPU tensors of one dtype end to end on `device`, without waiting for its queue. For CUDA their bytes
    are copied once on the host, into pinned memory."""
    if device.type != "cuda":
        return torch.cat(list(tensors))
    shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
    pinned = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True)
    return torch.cat(list(tensors), out=pinned).to(device, non_blocking=True)


def widen(x: Tensor) -> Tensor:
    """`x` in the precision that statistics and sums are formed in: FP32, or FP64 where x is FP64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the widest of their dtypes: themselves where they share one."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(widest) for x in tensors)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if neighbours in its last dimension are not neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()
