"""MMD against its definition, one pair at a time."""

import math

import pytest
import torch

from millrace.engine.evaluation import mmd as module
from millrace.engine.evaluation.mmd import SCALE, SIGMA, discrepancy, kernel_sum, mmd
from millrace.engine.util.errors import UserError


def features(count, seed, shift=0.0):
    found = torch.randn(count, 7, generator=torch.Generator().manual_seed(seed)) + shift
    return found / found.norm(dim=1, keepdim=True)


def pair_by_pair(x, y):
    """The definition with Python's floats."""

    def mean(a, b):
        total = 0.0
        for u in a.double().tolist():
            for v in b.double().tolist():
                total += math.exp(-sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) / (2 * SIGMA**2))
        return total / (len(a) * len(b))

    return SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_constants_of_cmmd_pytorch_and_prx():
    assert (SIGMA, SCALE) == (
        10,
        1000,
    )  # _SIGMA, _SCALE of distance.py; mmd_sigma, mmd_scale of PRX's callback


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 9), (33, 20)])
def test_is_the_definition(n, m):
    x, y = features(n, 0), features(m, 1, shift=0.5)
    assert mmd(x, y) == pytest.approx(pair_by_pair(x, y), rel=1e-9, abs=1e-10)
    assert mmd(x, y) == pytest.approx(mmd(y, x), rel=1e-12)


def test_is_the_formula_of_cmmd_pytorch():
    """The same matrices, with float64 in place of its float32."""
    x, y = features(40, 2).double(), features(30, 3, shift=1.0).double()
    gamma = 1 / (2 * SIGMA**2)

    def mean(a, b):
        squared = -2 * a @ b.T + (a * a).sum(1)[:, None] + (b * b).sum(1)[None]
        return torch.exp(-gamma * squared).mean()

    wanted = SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert mmd(x.float().double(), y.float().double()) == pytest.approx(wanted.item(), rel=1e-5)
    assert mmd(x, y) == pytest.approx(wanted.item(), rel=1e-9)


def test_diagonal_counts():
    """The biased estimator: two different single features are apart, a set is no distance from itself."""
    x, y = torch.eye(2)[:1], torch.eye(2)[1:]
    assert mmd(x, y) == pytest.approx(2 * 1000 * (1 - math.exp(-2 / 200)), rel=1e-12)
    assert mmd(x, x) == 0
    assert mmd(features(20, 0), features(20, 0)) == pytest.approx(0, abs=1e-11)


def test_small_distances_survive_float32_features():
    """In float32 the means of almost one would leave noise of 1e-4 here."""
    x = features(50, 4)
    y = x.clone()
    y[0] = features(1, 5)[0]
    assert mmd(x, y) == pytest.approx(pair_by_pair(x, y), rel=1e-5)


def test_chunks_do_not_matter_and_bound_memory(monkeypatch):
    x, y = features(25, 6), features(31, 7)
    whole, sizes = kernel_sum(x, y, rows=100), []
    expm1 = torch.expm1
    monkeypatch.setattr(module.torch, "expm1", lambda z: sizes.append(z.numel()) or expm1(z))
    assert kernel_sum(x, y, rows=4) == pytest.approx(whole, rel=1e-12)
    assert max(sizes) == 16
    assert sum(sizes) == 25 * 31


def test_refuses_nothing():
    with pytest.raises(UserError, match="discrepancy of 0 and 3 features"):
        discrepancy(0, 3, 0.0, 0.0, 0.0)
