"""Patches against torch's unfold, RoPE tables against their formula, layouts against counting by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from millrace.engine.model.layout import LayoutCache, patchify, rope_table, unpatchify


@pytest.mark.parametrize(
    ("channels", "rows", "columns", "patch"), [(4, 3, 5, 2), (3, 2, 2, 4), (32, 4, 1, 1)]
)
def test_patches_are_those_of_unfold(channels, rows, columns, patch):
    images = torch.randn(2, channels, rows * patch, columns * patch)
    tokens = patchify(images, patch)
    assert torch.equal(tokens, F.unfold(images, patch, stride=patch).transpose(1, 2))
    assert torch.equal(unpatchify(tokens, (rows, columns), patch), images)


def test_patchify_takes_one_image():
    image = torch.randn(3, 4, 6)
    assert torch.equal(patchify(image, 2), patchify(image[None], 2)[0])


@pytest.mark.parametrize(("axes", "theta"), [((8, 8), 10_000.0), ((4, 12), 500.0)])
def test_rope_table_is_the_float64_formula(axes, theta):
    side = 70
    cos, sin = rope_table(side, axes, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (side * side, sum(axes) // 2)
    for row, column in [(0, 0), (1, 0), (0, 1), (69, 3), (13, 68)]:
        angles = [
            place * theta ** (-2 * i / axis)
            for place, axis in ((row, axes[0]), (column, axes[1]))
            for i in range(axis // 2)
        ]
        wanted = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]])
        found = torch.stack((cos[row * side + column], sin[row * side + column]))
        torch.testing.assert_close(found, wanted, rtol=0, atol=6e-8)


def _layout(cache, grids):
    return cache.layout(grids, torch.arange(len(grids) + 1, dtype=torch.int32), 1)


def test_layout_places_each_token_in_its_image():
    grids = [(2, 3), (4, 1), (1, 1)]
    layout = _layout(LayoutCache((4, 4), 100.0), grids)
    assert layout.grids == tuple(grids)
    assert layout.lengths == [6, 4, 1]
    assert layout.cu_seqlens.tolist() == [0, 6, 10, 11]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 6
    places = [(r, c) for rows, columns in grids for r in range(rows) for c in range(columns)]
    angles = torch.tensor([[r, r / 10, c, c / 10] for r, c in places], dtype=torch.float64)
    torch.testing.assert_close(layout.cos[layout.positions], angles.cos().float(), rtol=0, atol=6e-8)
    torch.testing.assert_close(layout.sin[layout.positions], angles.sin().float(), rtol=0, atol=6e-8)


def test_recurring_batches_share_their_tensors():
    cache = LayoutCache((4, 4), 100.0)
    first = _layout(cache, [(3, 2), (3, 2)])
    other = _layout(cache, [(3, 3)])
    again = _layout(cache, [(3, 2), (3, 2)])
    assert again.cu_seqlens is first.cu_seqlens
    assert again.positions is first.positions
    assert again.cos is first.cos is other.cos
    assert other.positions is not first.positions


def test_a_larger_grid_grows_the_table_and_moves_positions():
    cache = LayoutCache((4, 4), 100.0)
    small = _layout(cache, [(2, 3)])
    large = _layout(cache, [(2, 5)])
    assert len(small.cos) == 9
    assert len(large.cos) == 25
    moved = _layout(cache, [(2, 3)])
    assert moved.cos is large.cos
    assert small.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert moved.positions.tolist() == [0, 1, 2, 5, 6, 7]
    assert torch.equal(moved.cos[moved.positions], small.cos[small.positions])
    assert torch.equal(moved.sin[moved.positions], small.sin[small.positions])


def test_only_the_latest_batches_are_remembered():
    cache = LayoutCache((4, 4), 100.0)
    cache.layout([(8, 8)], torch.tensor([0, 1], dtype=torch.int32), 1)
    kept = _layout(cache, [(1, 1)])
    dropped = _layout(cache, [(1, 2)])
    for count in range(2, LayoutCache.ENTRIES + 1):
        assert _layout(cache, [(1, 1)]).positions is kept.positions
        _layout(cache, [(1, 1)] * count)
    assert _layout(cache, [(1, 1)]).positions is kept.positions
    assert _layout(cache, [(1, 2)]).positions is not dropped.positions


def test_of_mixed_batches_only_the_grids_are_kept():
    random, cache = np.random.default_rng(0), LayoutCache((4, 4), 100.0)
    sizes = [(rows, columns) for rows in range(1, 6) for columns in range(1, 5)]
    _layout(cache, [(5, 5)])
    for _ in range(50):
        grids = [sizes[i] for i in random.integers(0, len(sizes), 12)]
        layout = _layout(cache, grids)
        places = [5 * r + c for rows, columns in grids for r in range(rows) for c in range(columns)]
        assert layout.positions.tolist() == places
        assert layout.positions.dtype == torch.int64
        assert layout.cu_seqlens.tolist() == [0, *np.cumsum(layout.lengths)]
    kept = [tensor for tensor in vars(cache).values() if isinstance(tensor, dict)]
    assert sum(map(len, kept)) == len(sizes) + 2  # and the grid of the first batch, and the batch itself


def test_text_offsets_are_passed_through():
    offsets = torch.tensor([0, 4, 5], dtype=torch.int32)
    layout = LayoutCache((4, 4), 100.0).layout([(1, 2), (2, 1)], offsets, 4)
    assert layout.cu_seqlens_text is offsets
    assert layout.max_seqlen_text == 4
