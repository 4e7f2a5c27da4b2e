"""Kernels over packed rows: how a launch is cut into programs, and the LayerNorm arithmetic of one row.

A program takes a few rows of one sample, so that it reads the sample's vectors (shift, scale, gate) once and
adds up their gradients in registers. Partial sums of the programs go to memory and are added in a fixed
order afterwards: no atomics, so a backward pass gives the same bits every time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.support.compilation import meta
from millrace.kernels.support.registration import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

PROGRAMS = 1024
"""Programs that keep every multiprocessor of an H200 (132) busy with several each."""
MOST_ROWS = 16
WIDEST = 16_384
"""Features of a row that one program holds in registers."""


class RowLaunch(NamedTuple):
    """Grid and constants of a kernel whose programs take `rows` rows of one sample each."""

    grid: tuple[int, int]
    """(chunks, B)."""
    rows: int
    block: int
    """Smallest power of two that holds a row."""
    warps: int


def row_launch(total: int, width: int, samples: int, max_seqlen: int | None) -> RowLaunch:
    """The launch for `total` rows of `width` features; depends on nothing else, so sums keep their order."""
    if width > WIDEST:
        raise ValueError(f"rows have {width} features, the kernels take at most {WIDEST}")
    rows = max(1, min(MOST_ROWS, _power_of_two_below(total // PROGRAMS)))
    longest = total if max_seqlen is None else max_seqlen
    block = 1 << max(width - 1, 0).bit_length()
    warps = min(max(block // 512, 1), 16)
    return RowLaunch((max(-(-longest // rows), 1), samples), rows, block, warps)


def _power_of_two_below(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


def partial_sums(count: int, launch: RowLaunch, width: int, device: torch.device) -> Tensor:
    """Memory (count, B, chunks, C) FP32 for the programs' sums; every program writes its part."""
    chunks, samples = launch.grid
    return torch.empty(count, samples, chunks, width, dtype=torch.float32, device=device)


def add_partial_sums(partial: Tensor) -> Tensor:
    """(count, B, chunks, C) to (count, B, C)."""
    return partial.squeeze(2) if partial.shape[2] == 1 else partial.sum(2)


def launch_shapes() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, int]]:
    """What row kernels are compiled for ahead of time: 32 images, whole and with some of their tokens routed.

    Between them every number of rows of a program (`row_launch`) at the width of PRX-1.2B, and the FP32 model
    that is made for a CPU. Name, rows (T, C), a sample's vectors (B, C) as a slice of the modulation's GEMM,
    offsets, statistics (T,), longest sample.
    """
    shapes = {(1792, torch.bfloat16): (32, 64, 128, 256, 1024), (3584, torch.bfloat16): (256, 1024)}
    for (width, dtype), lengths in (shapes | {(160, torch.float32): (64,)}).items():
        for tokens in lengths:
            vectors = meta(32, 16 * 6 * width, dtype=dtype)[:, width : 2 * width]
            statistics = meta(32 * tokens, dtype=torch.float32)
            x, offsets = meta(32 * tokens, width, dtype=dtype), meta(33, dtype=torch.int32)
            yield f"C={width} N={tokens} {dtype}", x, vectors, offsets, statistics, tokens


if HAS_TRITON:

    @triton.jit
    def owned_rows(cu_seqlens, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
        """The program's sample, its rows first .. end of it, and the columns of a row with their mask."""
        # 64 bit from here on: rows times width passes 2^31 elements at 600,000 tokens of 3,584 features.
        sample = tl.program_id(1).to(tl.int64)
        first = tl.load(cu_seqlens + sample).to(tl.int64) + tl.program_id(0) * ROWS
        # The grid is made for the longest sample: a program beyond the end of a shorter one has no rows.
        end = tl.minimum(first + ROWS, tl.load(cu_seqlens + sample + 1).to(tl.int64))
        column = tl.arange(0, BLOCK)
        return sample, first, end, column, column < WIDTH

    @triton.jit
    def load_row(start, column, inside):
        """A row in FP32, zero outside."""
        return tl.load(start + column, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def layer_norm_row(value, inside, eps, WIDTH: tl.constexpr):
        """Normalised row, its mean and its 1 / standard deviation; `value` is FP32, zero outside."""
        mean = tl.sum(value, 0) / WIDTH
        # The row is in registers, so a second pass is free, and nothing cancels as in E[x^2] - mean^2.
        # Columns outside would count as (0 - mean)^2.
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        return centred * rstd, mean, rstd

    @triton.jit
    def layer_norm_gradient(gradient, normed, rstd, WIDTH: tl.constexpr):
        """Gradient of a row from that of its normalised form; both are zero outside."""
        mean = tl.sum(gradient, 0) / WIDTH
        projection = tl.sum(gradient * normed, 0) / WIDTH
        return rstd * (gradient - mean - normed * projection)
