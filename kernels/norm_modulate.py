"""y = (1 + scale_b) * LayerNorm(x) + shift_b, the adaLN of DiT (Peebles & Xie, arXiv 2212.09748, section 3).

LayerNorm has no affine part. Row r of the packed x belongs to sample b; shift and scale are per sample.
Mean, variance and the modulation are FP32 whatever the dtype of x.
"""

import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.checks import expect_offsets, expect_shape
from millrace.kernels.packed import rows_from_samples, widen


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
) -> Tensor:
    """Normalise each row of x and modulate it with its sample's shift and scale.

    Args:
        x: (T, C).
        shift, scale: (B, C), any float dtype and strides.
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths, for the uniform fast path.

    Returns:
        (T, C) in the dtype of x.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("x", x, "T", "C")
    total, width = x.shape
    expect_shape("shift", shift, samples, width)
    expect_shape("scale", scale, samples, width)
    normed = F.layer_norm(widen(x), (width,), eps=eps)
    shift = rows_from_samples(widen(shift), cu_seqlens, total, max_seqlen)
    scale = rows_from_samples(widen(scale), cu_seqlens, total, max_seqlen)
    return ((1 + scale) * normed + shift).to(x.dtype)
