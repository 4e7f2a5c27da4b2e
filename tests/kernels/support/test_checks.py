"""The wording of refused arguments."""

import pytest
import torch

from millrace.kernels.support.checks import expect_offsets, expect_shape


def test_accepts_what_fits():
    expect_shape("x", torch.zeros(3, 4), 3, "C")
    expect_shape("x", torch.zeros(0, 4), "T", 4)
    expect_shape("x", torch.zeros(()))
    assert expect_offsets("cu_seqlens", torch.zeros(4, dtype=torch.int32)) == 3


@pytest.mark.parametrize(
    ("got", "wanted", "message"),
    [
        ((3, 4), (3, 5), "x has shape (3, 4), expected (3, 5)"),
        ((3, 4), ("T",), "x has shape (3, 4), expected (T,)"),
        ((), ("T", "C"), "x has shape (), expected (T, C)"),
        ((2,), (3,), "x has shape (2,), expected (3,)"),
    ],
)
def test_shows_what_came_and_what_was_wanted(got, wanted, message):
    with pytest.raises(ValueError, match="expected") as refused:
        expect_shape("x", torch.zeros(got), *wanted)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("offsets", "shown"),
    [
        (torch.zeros(3), "(3,) torch.float32"),
        (torch.zeros(3, dtype=torch.int64), "(3,) torch.int64"),
        (torch.zeros(1, dtype=torch.int32), "(1,) torch.int32"),
        (torch.zeros(2, 2, dtype=torch.int32), "(2, 2) torch.int32"),
    ],
)
def test_offsets_are_int32_with_one_sample_or_more(offsets, shown):
    with pytest.raises(ValueError, match="expected") as refused:
        expect_offsets("cu", offsets)
    assert str(refused.value) == f"cu is {shown}, expected (B+1,) torch.int32"
