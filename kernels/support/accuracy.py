"""Accuracy: how far from the float64 result an implementation may be, the one rule of tests and benchmarks.

Two things are measured of every result, its largest error and its RMS error, and each may be

    2 * that of plain PyTorch in the same dtype  +  eps * largest  +  SUMS * sqrt(n) * eps32 * size

largest: of the float64 result. eps: of the dtype. size: the largest value of the float64 result, or its RMS.
n: how many terms the longest sum behind a number has. eps32: of FP32 (FP64 where the dtype is FP64).

The first part is for what the dtype does to the operation: in 16 bit it is nearly all, for plain PyTorch
rounds wherever an implementation may. The second is the rounding of the result, where plain PyTorch was
exact by luck. The third is the length of the sums. Kernels add in FP32, in an order of their own; n terms in
another order are a random walk of n roundings, each of half an eps of a partial sum, so that two right
results differ by some sqrt(n) * eps of what they add up to. Plain PyTorch's own error is one sample of that
walk, which twice can be less than another's: without the third part right FP32 results of attention fail in
one case of 16. They need up to 0.2 of sqrt(n) * eps32 beside the first two parts, 0.4 without them. Wrong
results are far above: rounding to BF16 in an FP32 path is 2^-9 or 16,000 eps32, to TF32 2^-11 or 4,000, and a
term lost from a sum of n about 1 / sqrt(n) of it, for 8,000 terms 90,000 eps32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

SUMS = 1.0
"""Factor of the third part: 1, five times what right results were seen to need. A GPU's approximate
exponentials and roots are a few roundings worse than a CPU's."""


def errors(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Of a result against the float64 one of the same shape, by "largest" and "RMS"; NaN where one is NaN."""
    return _sizes(got.double() - exact)


def allowed_errors(exact: Tensor, plain: Tensor, dtype: torch.dtype, terms: int) -> dict[str, float]:
    """Upper bounds of `errors`.

    Args:
        exact: float64, not empty.
        plain: of the same shape, what plain PyTorch computes in `dtype`.
        dtype: the coarsest that the operation computes in.
        terms: n, see `longest_sum`.
    """
    sums = torch.promote_types(dtype, torch.float32)
    walk = SUMS * terms**0.5 * torch.finfo(sums).eps
    sizes, of_plain = _sizes(exact), errors(plain, exact)
    rounding = torch.finfo(dtype).eps * sizes["largest"]
    return {which: 2 * of_plain[which] + rounding + walk * sizes[which] for which in sizes}


def longest_sum(result: Tensor, inputs: Iterable[Tensor]) -> int:
    """An estimate of n that knows nothing of the operation but its shapes.

    A sum goes along a dimension of an input, the longest at most; or, as that of a loss or of a weight's
    gradient, over all elements that no dimension of the result keeps apart.
    """
    inputs = list(inputs)
    dimension = max((size for x in inputs for size in x.shape), default=1)
    elements = max((x.numel() for x in inputs), default=1)
    return max(dimension, elements // max(result.numel(), 1), 1)


def _sizes(values: Tensor) -> dict[str, float]:
    return {"largest": values.abs().max().item(), "RMS": values.square().mean().sqrt().item()}
