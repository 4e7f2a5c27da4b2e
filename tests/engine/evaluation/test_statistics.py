"""FID and MMD from streamed features against formulas on all of them at once."""

import pytest
import scipy.linalg
import torch

from millrace.engine.evaluation.frechet import frechet_distance, moments
from millrace.engine.evaluation.mmd import mmd
from millrace.engine.evaluation.statistics import KINDS, FeatureRows, FeatureSums
from millrace.engine.util.errors import UserError


def drawn(count, seed, shift=0.0, dim=12):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mix + shift


def streamed(kind, features, part=7):
    found = kind()
    for first in range(0, len(features), part):
        found.add(first, features[first : first + part])
    found.together()
    return found


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_fid_of_streamed_features_is_scipy_s(shift):
    x, y = drawn(60, 0, shift), drawn(50, 1, shift + 0.3)
    found = streamed(FeatureSums, x).distance(streamed(FeatureSums, y))
    a, b = (value.double().numpy() for value in (x, y))
    c1, c2 = (torch.from_numpy(value).T.cov().numpy() for value in (a, b))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + (c1 + c2 - 2 * root).trace()
    assert found == pytest.approx(wanted, rel=1e-7)
    assert found == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-7)


def test_fid_is_that_of_torchmetrics():
    """Its formula: eigenvalues of the product of the covariances, from sums in float64."""
    x, y = drawn(60, 2), drawn(50, 3, 0.3)
    (m1, c1), (m2, c2) = (sums(x), sums(y))
    root = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    wanted = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root
    found = streamed(FeatureSums, x).distance(streamed(FeatureSums, y))
    assert found == pytest.approx(wanted.item(), rel=1e-9)


def sums(features):
    """Mean and covariance as torchmetrics computes them from what it accumulates."""
    features, n = features.double(), len(features)
    total, products = features.sum(0), features.T @ features
    mean = (total / n)[None]
    return mean[0], (products - n * mean.T @ mean) / (n - 1)


def test_fid_is_that_of_the_installed_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = drawn(60, 2), drawn(50, 3, 0.3)
    wanted = fid._compute_fid(*sums(x), *sums(y)).item()
    assert streamed(FeatureSums, x).distance(streamed(FeatureSums, y)) == pytest.approx(wanted, rel=1e-9)


def test_fid_with_fewer_pictures_than_features():
    x, y = drawn(6, 4, dim=40), drawn(5, 5, dim=40)
    found = streamed(FeatureSums, x, 2).distance(streamed(FeatureSums, y, 2))
    assert found == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-6)


def test_mmd_of_streamed_features():
    x, y = drawn(20, 6) / 10, drawn(15, 7) / 10
    found = streamed(FeatureRows, x).distance(streamed(FeatureRows, y))
    assert found == pytest.approx(mmd(x, y), rel=1e-12)


def test_rows_are_in_the_order_of_the_pictures():
    x = drawn(9, 8)
    found = FeatureRows()
    for first in (6, 0, 3):
        found.add(first, x[first : first + 3])
    found.together()
    assert torch.equal(found.rows, x)


@pytest.mark.parametrize("metric", KINDS)
def test_stored_and_back(metric):
    x, y = drawn(20, 9), drawn(20, 10)
    kind = KINDS[metric]
    here, there = streamed(kind, x), streamed(kind, y)
    restored = kind.restored(there.tensors())
    assert here.distance(restored) == here.distance(there)
    assert all(isinstance(value, torch.Tensor) for value in here.tensors().values())


@pytest.mark.parametrize("metric", KINDS)
def test_refuses_features_that_are_not_finite(metric):
    x = drawn(4, 11)
    x[2, 0] = float("nan")
    with pytest.raises(UserError, match="of 1 of 4 pictures are not finite, of number 34 for one"):
        KINDS[metric]().add(32, x)


def test_refuses_one_picture():
    with pytest.raises(UserError, match="FID of 1 pictures"):
        streamed(FeatureSums, drawn(1, 0)).distance(streamed(FeatureSums, drawn(5, 0)))
