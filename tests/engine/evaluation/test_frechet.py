"""The Frechet distance against closed forms and SciPy's general matrix root."""

import pytest
import torch

from millrace.engine.evaluation.frechet import Moments, frechet_distance, moments
from millrace.engine.util.errors import UserError


def covariance(dim, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, rank or dim, generator=generator, dtype=torch.float64)
    return root @ root.T


def test_moments_are_numpys():
    numpy = pytest.importorskip("numpy")
    features = torch.randn(50, 7)
    found = moments(features)
    wide = features.double().numpy()
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    numpy.testing.assert_allclose(found.mean.numpy(), wide.mean(0), rtol=1e-12)
    numpy.testing.assert_allclose(found.covariance.numpy(), numpy.cov(wide, rowvar=False), rtol=1e-10)


def test_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    first = Moments(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    second = Moments(torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double())
    assert frechet_distance(first, second) == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_covariances_that_commute():
    """Of one eigenbasis: |m1 - m2|^2 + sum_i (sqrt a_i - sqrt b_i)^2."""
    basis = torch.linalg.qr(covariance(6, 0)).Q
    a, b = torch.rand(2, 6, dtype=torch.float64)
    mean = torch.randn(2, 6, dtype=torch.float64)
    first, second = (Moments(m, basis * v @ basis.T) for m, v in zip(mean, (a, b), strict=True))
    expected = (mean[0] - mean[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-10)


def test_scipys_root_of_the_product():
    linalg = pytest.importorskip("scipy.linalg")
    first = Moments(torch.randn(9).double(), covariance(9, 1))
    second = Moments(torch.randn(9).double(), covariance(9, 2))
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    expected = (first.mean - second.mean).square().sum().item()
    expected += (first.covariance.trace() + second.covariance.trace()).item() - 2 * root.trace()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Fewer samples than features: N(0, u u^T) and N(0, v v^T) are |u|^2 + |v|^2 - 2 |u . v| apart."""
    u, v = torch.randn(2, 40, dtype=torch.float64)
    zero = torch.zeros(40, dtype=torch.float64)
    found = frechet_distance(Moments(zero, torch.outer(u, u)), Moments(zero, torch.outer(v, v)))
    assert found == pytest.approx((u @ u + v @ v - 2 * (u @ v).abs()).item(), rel=1e-6)


def test_a_set_and_itself():
    same = moments(torch.randn(20, 64))
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(same, same) >= 0


def test_a_set_and_itself_moved():
    features = torch.randn(200, 5, dtype=torch.float64)
    found = frechet_distance(moments(features), moments(features + 2))
    assert found == pytest.approx(5 * 4, rel=1e-9)


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (torch.zeros(1, 3), "at least 2 samples"),
        (torch.zeros(3), "at least 2 samples"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), "1 of 2 samples are not finite"),
    ],
)
def test_features_without_moments_are_refused(features, reason):
    with pytest.raises(UserError, match=reason) as caught:
        moments(features)
    assert "\n" not in str(caught.value)


def test_features_of_two_networks_are_refused():
    with pytest.raises(UserError, match="between 3 and 4 features"):
        frechet_distance(moments(torch.randn(9, 3)), moments(torch.randn(9, 4)))
