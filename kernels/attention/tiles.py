"""Per-head RMSNorm and rotary embedding of one tile, forward and derivative: Triton functions shared by the
prologue and by the fused attention.

A tile is (R, D) FP32 in registers, one head of R tokens. The rotation needs the even and the odd features of
a row apart; `tl.split` parts them in registers, where strided loads would halve the width of every access.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.support.compilation import meta


@triton.jit
def _reciprocal_rms(x, eps, DIM: tl.constexpr):
    """(R, 1) of x (R, D); zero for a row of zeros where eps is zero too, as rows that do not exist are."""
    square = tl.sum(x * x, axis=1) / DIM + eps
    return tl.where(square > 0, tl.math.rsqrt(square), 0.0)[:, None]


@triton.jit
def norm(x, weight, eps, DIM: tl.constexpr):
    """RMSNorm(x) * weight; features from DIM on are zero in x."""
    return x * _reciprocal_rms(x, eps, DIM) * weight[None, :]


@triton.jit
def norm_backward(x, grad, weight, eps, DIM: tl.constexpr):
    """Gradient of x (R, D), and each row's part of that of the weight (R, D).

    With n = x / RMS(x) and g = grad * weight: dx = (g - n mean(g n)) / RMS(x), dweight = sum(grad n).
    """
    factor = _reciprocal_rms(x, eps, DIM)
    normed = x * factor
    grad_weight = grad * normed
    grad = grad * weight[None, :]
    return factor * (grad - normed * (tl.sum(grad * normed, axis=1) / DIM)[:, None]), grad_weight


@triton.jit
def rotate(x, cos, sin):
    """Turn the pairs (x[2i], x[2i+1]) of (R, D) by the angles of cos and sin (R, D/2); -sin turns back."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (x.shape[0], x.shape[1]))


@triton.jit
def tile_angles(cos, sin, positions, slot, owned, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine (R, D/2) of the rows `slot` of a sample whose positions start at the pointer; no turn
    for the others."""
    pair = tl.arange(0, BLOCK // 2)
    mask = owned[:, None] & (pair < DIM // 2)[None, :]
    at = tl.load(positions + slot, mask=owned, other=0)[:, None] * (DIM // 2) + pair[None, :]
    return tl.load(cos + at, mask=mask, other=1.0), tl.load(sin + at, mask=mask, other=0.0)


def training_inputs(
    dim: int, dtype: torch.dtype, heads: int = 28, weights: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """The tensors of `rope_attention` without data: two images of 1024 tokens with 256 text tokens each, and
    the text projection of 16 blocks. `weights` is the dtype of the norms', which autocast leaves as it is."""
    return (
        meta(2048, 3, heads, dim, dtype=dtype),
        meta(512, 16, 2, heads, dim, dtype=dtype)[:, 1],
        *(meta(dim, dtype=weights) for _ in range(3)),
        *(meta(1024, dim // 2, dtype=torch.float32) for _ in range(2)),
        meta(2048, dtype=torch.int64),
        *(meta(3, dtype=torch.int32) for _ in range(2)),
    )
