"""Routes: for each sample, an ascending random subset of its tokens.

Every token of a sample has a score, the sample's uniform random number at the token's place; those with the
lowest scores stay. TREAD (Krause et al., arXiv 2501.04765) keeps the lowest of the whole sample; structured
routes (SPRINT, arXiv 2510.21986) keep the lowest of each g x g group of the grid. Scores have 24 bits, so
two can be equal: then the earlier token stays.

The kernels have one program per sample and sort nothing. Scores are not negative, so they are ordered as
their bits are, and the k-th lowest is found bit by bit from the top: are k scores below this limit, or more?
A token of a group counts those before it. A running sum over the tokens that stay gives each its place.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import to_device
from millrace.kernels.support.philox import sample_keys, uniform
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.support.philox import uniform_at

LONGEST = 16_384
"""Tokens of a sample that one program holds in registers; longer samples without groups are sorted."""


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


if HAS_TRITON:

    @triton.jit
    def _score_bits(key, token, length):
        """Scores as integers of the same order; beyond the end above all others."""
        return tl.where(token < length, uniform_at(key, token).to(tl.int32, bitcast=True), 1 << 30)

    @triton.jit
    def _highest_kept(key, length, count, BLOCK: tl.constexpr):
        """The `count`-th lowest score as an integer, and how many of those equal to it stay."""
        # A search for the limit bit by bit, from the highest of 30, in place of a sort: 30 sums over the
        # sample. Floats in [0, 1) have the order of their bits.
        bits = _score_bits(key, tl.arange(0, BLOCK), length)
        limit = 0
        for step in range(30):
            tried = limit | (1 << (29 - step))
            limit = tl.where(tl.sum((bits < tried).to(tl.int32), 0) < count, tried, limit)
        return limit, count - tl.sum((bits < limit).to(tl.int32), 0)

    @triton.jit
    def _lowest_of_group(key, token, columns, count, EDGE: tl.constexpr):
        """Which tokens have one of the `count` lowest scores in their EDGE x EDGE group."""
        row, column = token // columns, token % columns
        corner = (row - row % EDGE) * columns + column - column % EDGE
        score = uniform_at(key, token)
        rank = tl.zeros_like(token)
        for member in range(EDGE * EDGE):
            other = corner + member // EDGE * columns + member % EDGE
            other_score = uniform_at(key, other)
            before = (other_score < score) | ((other_score == score) & (other < token))
            rank += before.to(tl.int32)
        return rank < count

    @triton.jit
    def sample_route_fwd_kernel(
        keys,
        cu_seqlens,
        kept_offsets,
        index,
        BLOCK: tl.constexpr,
        TILE: tl.constexpr,
    ):
        sample = tl.program_id(0)
        start = tl.load(cu_seqlens + sample)
        length = tl.load(cu_seqlens + sample + 1) - start
        place = tl.load(kept_offsets + sample)
        count = tl.load(kept_offsets + sample + 1) - place
        key = tl.load(keys + sample)
        # Of tokens with equal scores the first ones stay, so that exactly `count` are kept.
        limit, equal_wanted = _highest_kept(key, length, count, BLOCK)
        # Scores are drawn again, tile by tile: cheaper than registers to keep them in.
        equal_seen = 0
        for begin in range(0, length, TILE):
            token = begin + tl.arange(0, TILE)
            bits = _score_bits(key, token, length)
            equal = (bits == limit).to(tl.int32)
            keep = (bits < limit) | ((equal != 0) & (equal_seen + tl.cumsum(equal, 0) <= equal_wanted))
            at = place + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(index + at, (start + token).to(tl.int64), mask=keep)
            equal_seen += tl.sum(equal, 0)
            place += tl.sum(keep.to(tl.int32), 0)

    @triton.jit
    def sample_route_structured_fwd_kernel(
        keys,
        cu_seqlens,
        kept_offsets,
        index,
        columns,
        per_group,
        EDGE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(0)
        start = tl.load(cu_seqlens + sample)
        length = tl.load(cu_seqlens + sample + 1) - start
        key = tl.load(keys + sample)
        place = tl.load(kept_offsets + sample)
        for begin in range(0, length, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            keep = (_lowest_of_group(key, token, columns, per_group, EDGE) & (token < length)).to(tl.int32)
            at = place + tl.cumsum(keep, 0) - 1
            tl.store(index + at, (start + token).to(tl.int64), mask=keep != 0)
            place += tl.sum(keep, 0)


def _route_triton(
    keys: Tensor,
    cu_seqlens: Tensor,
    kept_offsets: Tensor,
    lengths: list[int],
    counts: list[int],
    edge: int,
    columns: int,
) -> Tensor:
    longest = max(lengths)
    if not edge and longest > LONGEST:
        return _route_eager(keys, cu_seqlens, kept_offsets, lengths, counts, edge, columns)
    index = _route_fake(keys, cu_seqlens, kept_offsets, lengths, counts, edge, columns)
    block = max(triton.next_power_of_2(longest), 32)
    if edge:
        per_group, block = counts[0] * edge * edge // longest, min(block, 2048)
        arguments, constants = (columns, per_group), {"EDGE": edge, "BLOCK": block}
        kernel = sample_route_structured_fwd_kernel
    else:
        kernel, arguments, constants = sample_route_fwd_kernel, (), {"BLOCK": block, "TILE": min(block, 2048)}
    warps = min(max(block // 512, 1), 16)
    kernel[(len(lengths),)](keys, cu_seqlens, kept_offsets, index, *arguments, **constants, num_warps=warps)
    return index


def _route_eager(
    keys: Tensor,
    cu_seqlens: Tensor,
    kept_offsets: Tensor,
    lengths: list[int],
    counts: list[int],
    edge: int,
    columns: int,
) -> Tensor:
    longest = max(lengths)
    scores, starts = uniform(keys, longest), cu_seqlens[:-1].long()
    if min(lengths) == longest:
        kept = _lowest_per_group(scores, counts[0], edge, columns) if edge else _lowest(scores, counts[0])
        return (kept + starts[:, None]).flatten()
    parts = zip(scores, starts, lengths, counts, strict=True)
    return torch.cat([_lowest(score[:length], count) + start for score, start, length, count in parts])


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` lowest scores in the last dimension; the earlier of equal ones.

    The sort is stable, because how `topk` breaks ties may differ with the device and the number of samples.
    """
    order = scores.argsort(dim=-1, stable=True)
    return order[..., :count].sort(dim=-1).values


def _lowest_per_group(scores: Tensor, count: int, edge: int, columns: int) -> Tensor:
    """Ascending positions (B, K) of scores (B, N) with the same count kept in each group."""
    tokens = scores.shape[1]
    position = torch.arange(tokens, device=scores.device).expand_as(scores)
    scores, position = (
        tensor.unflatten(1, (tokens // columns // edge, edge, columns // edge, edge))
        .transpose(2, 3)
        .flatten(3)
        .flatten(1, 2)
        for tensor in (scores, position)
    )
    lowest = _lowest(scores, count * edge * edge // tokens)
    return position.gather(2, lowest).flatten(1).sort(dim=1).values


def _route_fake(
    keys: Tensor,
    cu_seqlens: Tensor,
    kept_offsets: Tensor,
    lengths: list[int],
    counts: list[int],
    edge: int,
    columns: int,
) -> Tensor:
    return keys.new_empty(sum(counts))


_route = register(
    "sample_route(Tensor keys, Tensor cu_seqlens, Tensor kept_offsets, SymInt[] lengths, SymInt[] counts,"
    " SymInt edge, SymInt columns) -> Tensor",
    eager=_route_eager,
    triton=_route_triton,
    fake=_route_fake,
    dtypes=(torch.int64,),
)


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
    uniform_batch = min(lengths) == max(lengths)
    edge, columns = 0, 0
    if structured:
        if not uniform_batch:
            raise ValueError(f"lengths are {lengths}, expected equal ones: structured routes share one grid")
        edge, kept, columns = _groups(lengths[0], keep_ratio, grid)
        counts = [kept] * samples
    else:
        counts = [kept_tokens(length, keep_ratio) for length in lengths]
    if uniform_batch:
        # Counted on the device, where a table would have to be copied to it in every step.
        offsets = torch.arange(samples + 1, dtype=torch.int32, device=cu_seqlens.device) * counts[0]
    else:
        offsets = to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), cu_seqlens.device)
    keys = sample_keys(seed, sample_index, "route")
    return Route(_route(keys, cu_seqlens, offsets, lengths, counts, edge, columns), offsets, max(counts))


def _groups(length: int, keep_ratio: float, grid: tuple[int, int] | None) -> tuple[int, int, int]:
    """Edge of the groups of a structured route, tokens that it keeps of a sample, columns of the grid."""
    edge = 2 if (keep_ratio * 4).is_integer() else 4
    count = round(keep_ratio * edge * edge)
    if grid is None or grid[0] % edge or grid[1] % edge or grid[0] * grid[1] != length:
        raise ValueError(f"grid is {grid}, expected rows and columns of {length} tokens divisible by {edge}")
    if not 0 < count < edge * edge:
        raise ValueError(
            f"keep_ratio is {keep_ratio}, which keeps no or all tokens of a {edge} x {edge} group"
        )
    return edge, count * (length // (edge * edge)), grid[1]


def configurations() -> Iterator[Launch]:
    """Pictures of 256 to 2048 pixels as FLUX latents; TREAD's routes and both groups of structured ones. Of
    TREAD's every size in between, which mixed aspects and pixels in patches of 32 have."""
    keys, offsets = meta(4, dtype=torch.int64), meta(5, dtype=torch.int32)
    for side in (16, 64, 128):
        for edge, share in ((0, 2), (2, 4), (4, 8)):
            lengths, counts = [side * side] * 4, [side * side // share] * 4
            arguments = (keys, offsets, offsets, lengths, counts, edge, side)
            yield Launch(f"N={side * side} edge={edge}", _route_triton, arguments)
    for tokens in (512, 1024, 2048):
        arguments = (keys, offsets, offsets, [tokens] * 4, [tokens // 2] * 4, 0, tokens)
        yield Launch(f"N={tokens} edge=0", _route_triton, arguments)
