"""The flow-matching path x_t = (1 - t) x0 + t n (Lipman et al., arXiv 2210.02747), t = 1 is noise."""

from torch import Tensor

from millrace.kernels.checks import expect_offsets, expect_shape
from millrace.kernels.packed import rows_from_samples, widen
from millrace.kernels.random import normal


def add_noise(
    clean: Tensor, noise: Tensor, t: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """Move each sample along its path to its time.

    Args:
        clean: (T, P).
        noise: (T, P), or the samples' keys (B,) int64 from which standard normal noise is drawn.
        t: (B,) in [0, 1].
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths, for the uniform fast path.

    Returns:
        (T, P) in the dtype of clean; formed in FP32.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("clean", clean, "T", "P")
    expect_shape("t", t, samples)
    if not noise.is_floating_point():
        expect_shape("noise", noise, samples)
        noise = normal(noise, cu_seqlens, *clean.shape, max_seqlen)
    expect_shape("noise", noise, *clean.shape)
    time = rows_from_samples(widen(t), cu_seqlens, len(clean), max_seqlen)[:, None]
    return ((1 - time) * widen(clean) + time * widen(noise)).to(clean.dtype)
