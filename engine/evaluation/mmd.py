"""Squared maximum mean discrepancy between two sets of features, under a Gaussian kernel.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2))
    d = scale (mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j))

Means are over all pairs, i = j included: the biased estimator of minimum variance (Gretton et al. 2012,
equation 5). With CLIP features it is CMMD (Jayasumana et al., arXiv 2401.09603). Kernel, sigma and scale are
those of that paper's code, of cmmd-pytorch and of Photoroom/PRX, which uses them for DINOv2 features too.

Features have length one, so with sigma 10 every k lies between 0.98 and 1 and d is what three means of almost
one leave of each other. Here sums are of k - 1 (`expm1`) in float64: the ones drop out before, not after,
rounding.
"""

import torch
from torch import Tensor

from millrace.engine.util.errors import UserError

SIGMA = 10.0
SCALE = 1000.0
ROWS = 1024
"""Kernel values are formed for at most this many rows and columns at a time."""


def kernel_sum(x: Tensor, y: Tensor, rows: int = ROWS) -> float:
    """Sum over all i, j of k(x_i, y_j) - 1, of features x (N, D) and y (M, D), in float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for left in x.split(rows):
        left = left.double()
        for right in y.split(rows):
            right = right.to(left)
            squared = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
            total += torch.expm1(squared.clamp_min(0) / (-2 * SIGMA**2)).sum()
    return total.item()


def discrepancy(n: int, m: int, within_x: float, within_y: float, between: float) -> float:
    """d of N and M features, from the `kernel_sum` of x and x, y and y, x and y."""
    if not n or not m:
        raise UserError(f"discrepancy of {n} and {m} features; take more pictures")
    return SCALE * (within_x / n**2 + within_y / m**2 - 2 * between / (n * m))


def mmd(x: Tensor, y: Tensor) -> float:
    """d of features x (N, D) and y (M, D)."""
    return discrepancy(len(x), len(y), kernel_sum(x, x), kernel_sum(y, y), kernel_sum(x, y))
