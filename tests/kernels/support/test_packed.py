"""Packed rows and samples, against loops."""

import pytest
import torch

from millrace.kernels.support.packed import (
    is_uniform,
    rows_from_samples,
    sample_of_row,
    samples_from_rows,
    widen,
)

BATCHES = [(1,), (3, 0, 2), (0, 0, 4), (4, 0), (5, 5, 5), (0, 0)]


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_rows_and_samples(lengths, offsets, spans, device):
    cu_seqlens, total = offsets(*lengths), sum(lengths)
    owner = [b for b, length in enumerate(lengths) for _ in range(length)]
    assert sample_of_row(cu_seqlens, total).tolist() == owner
    of_sample = torch.randn(len(lengths), 2, 3, device=device)
    of_row = torch.randn(total, 2, 3, device=device)
    for max_seqlen in (None, max(lengths), max(lengths) + 3):
        repeated = rows_from_samples(of_sample, cu_seqlens, total, max_seqlen)
        assert torch.equal(repeated, of_sample[owner])
        summed = samples_from_rows(of_row, cu_seqlens, max_seqlen)
        torch.testing.assert_close(summed, torch.stack([of_row[s].sum(0) for s in spans(*lengths)]))


@pytest.mark.parametrize(
    ("lengths", "bound", "uniform"),
    [((4, 4), 4, True), ((4, 4), 5, False), ((4, 4), None, False), ((3, 5), 5, False), ((7,), 7, True)],
)
def test_is_uniform(lengths, bound, uniform):
    assert is_uniform(sum(lengths), len(lengths), bound) == uniform


def test_widen():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert widen(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert widen(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
