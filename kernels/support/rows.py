"""Kernels over packed rows: how a launch is cut into programs, and the LayerNorm arithmetic of one row.

Forward, a program takes a few rows of one sample, so that it reads the sample's vectors (shift, scale, gate)
once. Backward, the programs are as many as run at the same time, and each takes a contiguous run of one
sample's rows: it adds up the vectors' gradients in registers and writes them once. A second kernel adds the
programs' sums in a fixed order and writes the gradients in their own dtype: no atomics, so a backward pass
gives the same bits every time on one kind of GPU. A sample that has one program needs no second kernel.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.support.compilation import Launch, meta, multiprocessors
from millrace.kernels.support.registration import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

PROGRAMS = 1024
"""Programs that keep every multiprocessor of an H200 (132) busy with several each."""
MOST_ROWS = 16
WIDEST = 16_384
"""Features of a row that one program holds in registers."""
TILE = 8192
"""Bytes of a backward tile: 16 a thread of 16 warps, one load."""
SHORTEST_RUN = 16
"""Rows of a sample below which a further program would cost more in partial sums than it brings."""


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


class SumLaunch(NamedTuple):
    """Grid and constants of a backward kernel whose programs add up gradients of the samples' vectors."""

    grid: tuple[int, int]
    """(chunks, B): so many programs share the rows of each sample."""
    rows: int
    """Of a tile, which a program holds in registers."""
    block: int
    warps: int


def sum_launch(x: Tensor, samples: int, max_seqlen: int | None) -> SumLaunch:
    """The launch for the rows of `x` (T, C): a program of 16 warps for each multiprocessor of its device.

    Many warps a program rather than many programs: each writes (C,) FP32 a vector, however few its rows are.
    """
    total, width = x.shape
    if width > WIDEST:
        raise ValueError(f"rows have {width} features, the kernels take at most {WIDEST}")
    block = 1 << max(width - 1, 0).bit_length()
    rows = max(min(TILE // (block * x.element_size()), MOST_ROWS), 1)
    longest = total if max_seqlen is None else max_seqlen
    chunks = max(min(multiprocessors(x) // samples, -(-longest // SHORTEST_RUN)), 1)
    return SumLaunch((chunks, samples), rows, block, min(max(rows * block // 256, 1), 16))


def sums_of_programs(count: int, launch: SumLaunch, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the programs write, (count, B, chunks, C) FP32, and the gradients (count, B, C) like `like`.

    Where a sample has one program, it writes the gradients themselves.
    """
    chunks, samples = launch.grid
    sums = torch.empty(count, samples, width, dtype=like.dtype, device=like.device)
    if chunks == 1:
        return sums.unsqueeze(2), sums
    shape = (count, samples, chunks, width)
    return torch.empty(shape, dtype=torch.float32, device=like.device), sums


def fold(partial: Tensor, sums: Tensor, used: tuple[int, int] | None = None) -> None:
    """Add up `partial` (..., chunks, C) FP32 into `sums` (..., C) in one kernel, in the order of the chunks.

    Nothing is left to do where there is one chunk, unless `used` is given: how many chunks have been written,
    of all vectors but the last and of the last.
    """
    chunks, width = partial.shape[-2:]
    if used is None and chunks == 1:
        return
    # Few chunks of wide rows, or many of narrow ones: 1024 or 8192 numbers a program.
    rows, block = (8, 128) if chunks <= 8 else (512, 16)
    fold_sums_kernel[(triton.cdiv(width, block), sums.numel() // width)](
        partial, sums, chunks, *(used or (chunks, chunks)), WIDTH=width, BLOCK=block, ROWS=rows, num_warps=4
    )


def launch_shapes() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, int]]:
    """What row kernels are compiled for ahead of time: 32 images, whole and with some of their tokens routed.

    Between them every number of rows of a program (`row_launch`) at the width of PRX-1.2B; 256 images, which
    leave no sample a second program; and the FP32 model that is made for a CPU. Name, rows (T, C), a sample's
    vectors (B, C) as a slice of the modulation's GEMM, offsets, statistics (T,), longest sample.
    """
    shapes = {
        (1792, torch.bfloat16, 32): (32, 64, 128, 256, 1024),
        (1792, torch.bfloat16, 256): (256,),
        (3584, torch.bfloat16, 32): (256, 1024),
        (160, torch.float32, 32): (64,),
    }
    for (width, dtype, samples), lengths in shapes.items():
        for tokens in lengths:
            vectors = meta(samples, 16 * 6 * width, dtype=dtype)[:, width : 2 * width]
            statistics = meta(samples * tokens, dtype=torch.float32)
            x = meta(samples * tokens, width, dtype=dtype)
            offsets = meta(samples + 1, dtype=torch.int32)
            yield f"B={samples} C={width} N={tokens} {dtype}", x, vectors, offsets, statistics, tokens


def configurations() -> Iterator[Launch]:
    """The fold by itself, ahead of time: of few and of many chunks (a micro-batch of one or two samples has
    many); each operation's launches have it too."""
    for chunks, width in ((4, 1792), (64, 1792), (64, 3584), (2048, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            partial, sums = meta(3, chunks, width, dtype=torch.float32), meta(3, width, dtype=dtype)
            yield Launch(f"fold {chunks} of C={width} into {dtype}", fold, (partial, sums))


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
    def owned_run(cu_seqlens):
        """The program's sample and its run of that sample's rows, first .. end; empty where rows are few."""
        sample = tl.program_id(1).to(tl.int64)
        start = tl.load(cu_seqlens + sample).to(tl.int64)
        end = tl.load(cu_seqlens + sample + 1).to(tl.int64)
        run = tl.cdiv(end - start, tl.num_programs(0))
        first = tl.minimum(start + tl.program_id(0) * run, end)
        return sample, first, tl.minimum(first + run, end)

    @triton.jit
    def load_tile(start, stride, row, column, inside):
        """Rows `row` (R,) of a tensor, zero outside."""
        return tl.load(start + row[:, None] * stride + column[None, :], mask=inside, other=0.0)

    @triton.jit
    def layer_norm_tile_gradient(gradient, normed, rstd, WIDTH: tl.constexpr):
        """Gradient of rows (R, C) from that of their normalised form; both are zero outside. rstd is (R,)."""
        mean = tl.sum(gradient, 1) / WIDTH
        projection = tl.sum(gradient * normed, 1) / WIDTH
        return rstd[:, None] * (gradient - mean[:, None] - normed * projection[:, None])

    @triton.jit
    def store_sum(partial, which, total, sample, samples, column, WIDTH: tl.constexpr):
        """The program's sum of vector `which`, over the rows of `total` (R, C)."""
        place = (which * samples + sample) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + place * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)

    @triton.jit(do_not_specialize=["chunks", "used", "used_of_last"])
    def fold_sums_kernel(
        partial,
        sums,
        chunks,
        used,
        used_of_last,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        written = tl.where(tl.program_id(1) == tl.num_programs(1) - 1, used_of_last, used)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        start = partial + tl.program_id(1).to(tl.int64) * chunks * WIDTH
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, written, ROWS):
            row = first + tl.arange(0, ROWS)
            owned = (row < written)[:, None] & (column < WIDTH)[None, :]
            total += load_tile(start, WIDTH, row, column, owned)
        at = sums + tl.program_id(1).to(tl.int64) * WIDTH + column
        tl.store(at, tl.sum(total, 0), mask=column < WIDTH)

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
