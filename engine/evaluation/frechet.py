"""Frechet distance between two sets of features, each described by its mean and covariance.

    d^2 = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

(Heusel et al., arXiv 1706.08500, equation 6). With features of Inception-v3 this is FID. The usual code takes
the root of the product C1 C2, which is not symmetric: its root turns complex where a covariance is nearly
singular, as with fewer samples than features. Here the root is that of C1^(1/2) C2 C1^(1/2), which has the
same eigenvalues, is symmetric and has none below zero: two symmetric eigenvalue problems in float64 do.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from millrace.engine.util.errors import UserError


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance (over N - 1) of features (N, D).

    Raises UserError for fewer than two samples and for features that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UserError(
            f"moments need features (N, D) of at least 2 samples, got {tuple(features.shape)}; "
            "take more pictures"
        )
    features = features.double()
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise UserError(
            f"features of {bad} of {len(features)} samples are not finite; look at those pictures"
        )
    mean = features.mean(0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """d^2 of the formula above, as FID is reported (not its root); 0 for equal moments.

    Raises UserError for moments of different features.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"Frechet distance between {len(first.mean)} and {len(second.mean)} features; "
            "compute both moments with one network"
        )
    root = _square_root(first.covariance)
    product = root @ second.covariance @ root
    # Rounding leaves eigenvalues of singular matrices slightly below zero.
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    squared = apart + first.covariance.trace() + second.covariance.trace() - 2 * trace
    return max(squared.item(), 0.0)


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric root of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
