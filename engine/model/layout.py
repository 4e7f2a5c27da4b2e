"""Packed layout: from images to packed tokens and back, and what a packed batch needs besides its tokens."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from millrace.kernels.support.packed import to_device

T = TypeVar("T")
Grid = tuple[int, int]
"""Rows and columns of patches of one image."""


def patchify(image: Tensor, patch: int) -> Tensor:
    """(..., C, H, W) -> (..., N, P): row-major tokens; P = C * patch^2 features, (channel, row, column)."""
    return rearrange(image, "... c (h p) (w q) -> ... (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """(..., N, P) -> (..., C, H, W), the inverse of `patchify`."""
    return rearrange(tokens, "... (h w) (c p q) -> ... c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


@dataclass(frozen=True)
class Layout:
    """Where each sample's tokens lie in the packed tensors, and where each token lies in its image."""

    grids: tuple[Grid, ...]
    """Patch grid of each sample (host)."""
    cu_seqlens: Tensor
    """(B+1,) int32, starts of the samples among the image tokens."""
    max_seqlen: int
    """Most image tokens of a sample."""
    cu_seqlens_text: Tensor
    """(B+1,) int32, starts of the samples among the text tokens."""
    max_seqlen_text: int
    """Most text tokens of a sample (or an upper bound)."""
    sizes: Tensor
    """(B, 2) FP32, rows and columns of each sample's grid (device)."""
    positions: Tensor
    """(T,) int64, row of the RoPE table of each image token."""
    cos: Tensor
    """(positions, D/2) FP32."""
    sin: Tensor
    """(positions, D/2) FP32."""

    @property
    def lengths(self) -> list[int]:
        """Image tokens of each sample, known without asking the device."""
        return [rows * columns for rows, columns in self.grids]


@dataclass(frozen=True)
class _GridEntry:
    cu_seqlens: Tensor
    sizes: Tensor
    positions: Tensor


class LayoutCache:
    """Builds layouts; RoPE tables, the positions of each grid and what uniform batches need are made once.

    One table covers all (row, column) pairs of the largest side seen, row-major, so every grid of a batch
    and every aspect ratio indexes the same table. A batch of several grids hardly ever comes again: it is put
    together on the device from the positions of its grids, and not kept.

    Args:
        axes: head features that encode the row and the column.
        theta: base of the frequencies theta^(-2i / axis).
    """

    ENTRIES = 64
    """Uniform batches remembered, by grid and samples; and grids."""

    def __init__(self, axes: tuple[int, int], theta: float) -> None:
        self._axes, self._theta = axes, theta
        self._side = 0
        self._cos = self._sin = torch.empty(0)
        self._uniform: OrderedDict[tuple[Grid, int], _GridEntry] = OrderedDict()
        self._positions: OrderedDict[Grid, Tensor] = OrderedDict()

    def layout(self, grids: Sequence[Grid], cu_seqlens_text: Tensor, max_seqlen_text: int) -> Layout:
        """Layout of a batch; `cu_seqlens_text` (B+1,) int32 decides the device."""
        grids = tuple(grids)
        device = cu_seqlens_text.device
        side = max(max(grid) for grid in grids)
        if side > self._side or self._cos.device != device:
            self._side = max(side, self._side)
            self._cos, self._sin = rope_table(self._side, self._axes, self._theta, device)
            self._uniform.clear()
            self._positions.clear()
        if len(set(grids)) == 1:
            entry = _kept(self._uniform, (grids[0], len(grids)), lambda: self._build(grids, device))
        else:
            entry = self._build(grids, device)
        return Layout(
            grids=grids,
            cu_seqlens=entry.cu_seqlens,
            max_seqlen=max(rows * columns for rows, columns in grids),
            cu_seqlens_text=cu_seqlens_text,
            max_seqlen_text=max_seqlen_text,
            sizes=entry.sizes,
            positions=entry.positions,
            cos=self._cos,
            sin=self._sin,
        )

    def _build(self, grids: tuple[Grid, ...], device: torch.device) -> _GridEntry:
        starts = list(accumulate((rows * columns for rows, columns in grids), initial=0))
        return _GridEntry(
            cu_seqlens=to_device(torch.tensor(starts, dtype=torch.int32), device),
            sizes=to_device(torch.tensor(grids, dtype=torch.float32), device),
            positions=torch.cat([self._positions_of(grid, device) for grid in grids]),
        )

    def _positions_of(self, grid: Grid, device: torch.device) -> Tensor:
        """(rows * columns,) int64 rows of the table."""

        def make() -> Tensor:
            rows, columns = (torch.arange(edge, device=device) for edge in grid)
            return (rows[:, None] * self._side + columns).flatten()

        return _kept(self._positions, grid, make)


def _kept(cache: OrderedDict, key: Hashable, make: Callable[[], T]) -> T:
    """What `cache` has under `key`; made where it is not there, in place of what was used the longest ago."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > LayoutCache.ENTRIES:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def rope_table(
    side: int, axes: tuple[int, int], theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (side^2, D/2) FP32 of all (row, column) pairs below `side`, row-major.

    The first axes[0] / 2 angles are row * theta^(-2i / axes[0]), the others the same of the column. Formed
    in FP64, because an FP32 angle of some hundred radians has lost the digits that matter.
    """
    place = torch.arange(side, dtype=torch.float64)
    row, column = (
        place[:, None] * theta ** (-torch.arange(0, axis, 2, dtype=torch.float64) / axis) for axis in axes
    )
    angle = torch.cat(
        (row[:, None].expand(side, side, -1), column[None].expand(side, side, -1)), dim=-1
    ).flatten(0, 1)
    cos, sin = (to_device(table.float(), torch.device(device)) for table in (angle.cos(), angle.sin()))
    return cos, sin
