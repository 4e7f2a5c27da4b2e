"""add_noise against the path's equation."""

import pytest
import torch

from millrace.kernels import add_noise
from millrace.kernels.random import normal

CASES = {
    "one token": ((1,), 64),
    "empty in the middle": ((3, 0, 5), 12),
    "pixels": ((2, 3), 768),
    "uniform": ((4, 4), 64),
}


def formula(rows):
    def evaluate(clean, noise, t):
        return torch.cat([(1 - t[b]) * clean[s] + t[b] * noise[s] for b, s in enumerate(rows)])

    return evaluate


@pytest.mark.parametrize(("lengths", "features"), CASES.values(), ids=CASES)
def test_matches_the_equation(lengths, features, offsets, spans, assert_accurate):
    cu_seqlens = offsets(*lengths)
    assert_accurate(
        lambda clean, noise, t: add_noise(clean, noise, t, cu_seqlens),
        formula(spans(*lengths)),
        clean=torch.randn(sum(lengths), features),
        noise=torch.randn(sum(lengths), features),
        t=torch.rand(len(lengths)),
    )


def test_ends_of_the_path(offsets, dtype, device):
    """t = 0 is the data and t = 1 the noise, to the bit."""
    clean, noise = (torch.randn(5, 16, device=device).to(dtype) for _ in range(2))
    out = add_noise(clean, noise, torch.tensor([0.0, 1.0], device=device), offsets(2, 3))
    assert torch.equal(out, torch.cat((clean[:2], noise[2:])))


@pytest.mark.parametrize("lengths", [(2, 0, 3), (3, 3)])
def test_keys_stand_for_the_noise_they_draw(lengths, offsets, device):
    cu_seqlens, total = offsets(*lengths), sum(lengths)
    clean = torch.randn(total, 10, device=device)
    t = torch.rand(len(lengths), device=device)
    keys = torch.arange(len(lengths), device=device) * 977
    drawn = add_noise(clean, keys, t, cu_seqlens)
    assert torch.equal(drawn, add_noise(clean, normal(keys, cu_seqlens, total, 10), t, cu_seqlens))


@pytest.mark.parametrize("given", [4, 9, None])
def test_max_seqlen_only_chooses_the_path(given, offsets, device):
    clean, noise = (torch.randn(8, 16, device=device) for _ in range(2))
    t = torch.rand(2, device=device)
    uniform = add_noise(clean, noise, t, offsets(4, 4), max_seqlen=4)
    assert torch.equal(uniform, add_noise(clean, noise, t, offsets(4, 4), max_seqlen=given))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clean": torch.zeros(5)}, r"clean has shape \(5,\), expected \(T, P\)"),
        ({"noise": torch.zeros(5, 7)}, r"noise has shape \(5, 7\), expected \(5, 8\)"),
        ({"noise": torch.zeros(3, dtype=torch.int64)}, r"noise has shape \(3,\), expected \(2,?\)"),
        ({"t": torch.zeros(3)}, r"t has shape \(3,\), expected \(2,?\)"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32",
        ),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "clean": torch.zeros(5, 8),
        "noise": torch.zeros(5, 8),
        "t": torch.zeros(2),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        add_noise(**right | wrong)
