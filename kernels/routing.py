"""Token routing: choose, per sample, which rows run through the routed blocks; take them out, put them back.

A route is an index into the packed rows, nothing else. Kept rows are ascending, so that gathers read
memory forward. TREAD: Krause et al., arXiv 2501.04765; SPRINT's structured subset: arXiv 2510.21986.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.checks import expect_offsets, expect_shape
from millrace.kernels.packed import to_device
from millrace.kernels.random import sample_keys, uniform


class Route(NamedTuple):
    """Rows that run through the routed blocks."""

    index: Tensor
    """(K,) int64, rows of the packed (T, C) tensor, ascending."""
    cu_seqlens: Tensor
    """(B+1,) int32, where each sample's kept rows start in `index`."""
    max_seqlen: int
    """Upper bound of the kept rows of a sample."""


def kept_tokens(length: int, keep_ratio: float) -> int:
    """Of `length` tokens all but round(length * (1 - keep_ratio)) stay; at least 1 stays and 1 goes."""
    dropped = min(max(round(length * (1 - keep_ratio)), 1), max(length - 1, 0))
    return length - dropped


def sample_route(
    cu_seqlens: Tensor,
    keep_ratio: float,
    seed: int,
    sample_index: Tensor,
    grid: tuple[int, int] | None = None,
    structured: bool = False,
    lengths: Sequence[int] | None = None,
) -> Route:
    """Draw each sample's uniform random subset of its tokens.

    Args:
        cu_seqlens: (B+1,) int32.
        keep_ratio: share of tokens that stay, in (0, 1).
        seed: seed of the run; together with the sample's index it fixes the subset.
        sample_index: (B,) int64, index of each sample in the training stream.
        grid: (rows, columns) of every sample's tokens; needed by `structured`.
        structured: keep the same number of tokens in each g x g group of the grid (g = 2 for
            ratios of a quarter, 4 otherwise) instead of anywhere in the sample.
        lengths: of the samples, if the host knows them; reading `cu_seqlens` waits for the device.

    Returns:
        Route with K = sum of the kept counts.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("sample_index", sample_index, samples)
    if not 0 < keep_ratio < 1:
        raise ValueError(f"keep_ratio is {keep_ratio}, expected a number between 0 and 1")
    lengths = cu_seqlens.diff().tolist() if lengths is None else list(lengths)
    if len(lengths) != samples:
        raise ValueError(f"lengths has {len(lengths)} entries, expected {samples}, one per sample")
    longest = max(lengths)
    uniform_batch = min(lengths) == longest
    if structured and not uniform_batch:
        raise ValueError(f"lengths are {lengths}, expected equal ones: structured routes share one grid")
    scores = uniform(sample_keys(seed, sample_index, "route"), longest)
    starts = cu_seqlens[:-1].long()
    if uniform_batch:
        kept = (
            _lowest_per_group(scores, keep_ratio, grid)
            if structured
            else _lowest(scores, kept_tokens(longest, keep_ratio))
        )
        counts = [kept.shape[1]] * samples
        index = (kept + starts[:, None]).flatten()
    else:
        counts = [kept_tokens(length, keep_ratio) for length in lengths]
        parts = [
            _lowest(scores[b, :n], k) + starts[b]
            for b, (n, k) in enumerate(zip(lengths, counts, strict=True))
        ]
        index = torch.cat(parts)
    offsets = to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), cu_seqlens.device)
    return Route(index, offsets, max(counts))


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` lowest scores in the last dimension; the earlier of equal ones.

    The sort is stable because scores have 24 bits, so ties happen, and how `topk` breaks them may differ
    with the device and the number of samples.
    """
    order = scores.argsort(dim=-1, stable=True)
    return order[..., :count].sort(dim=-1).values


def _lowest_per_group(scores: Tensor, keep_ratio: float, grid: tuple[int, int] | None) -> Tensor:
    """Ascending positions (B, K) with the same count kept in each g x g group of the grid."""
    edge = 2 if (keep_ratio * 4).is_integer() else 4
    count = round(keep_ratio * edge * edge)
    if grid is None or grid[0] % edge or grid[1] % edge or grid[0] * grid[1] != scores.shape[1]:
        raise ValueError(
            f"grid is {grid}, expected rows and columns of {scores.shape[1]} tokens divisible by {edge}"
        )
    if not 0 < count < edge * edge:
        raise ValueError(
            f"keep_ratio is {keep_ratio}, which keeps no or all tokens of a {edge} x {edge} group"
        )
    rows, columns = grid
    position = torch.arange(rows * columns, device=scores.device).expand_as(scores)
    by_group = (
        tensor.unflatten(1, (rows // edge, edge, columns // edge, edge))
        .transpose(2, 3)
        .flatten(3)
        .flatten(1, 2)
        for tensor in (scores, position)
    )
    scores, position = by_group
    return position.gather(2, _lowest(scores, count)).flatten(1).sort(dim=1).values


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (K,) int64 of x (T, C): (K, C). Indices are unique, so backward is a row scatter."""
    expect_shape("x", x, "T", "C")
    expect_shape("index", index, "K")
    return x.index_select(0, index)


def scatter_tokens(base: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """`base` (T, C) with rows `index` (K,), unique, replaced by `update` (K, C); returns a new (T, C)."""
    expect_shape("base", base, "T", "C")
    expect_shape("index", index, "K")
    expect_shape("update", update, len(index), base.shape[1])
    return base.index_copy(0, index, update.to(base.dtype))
