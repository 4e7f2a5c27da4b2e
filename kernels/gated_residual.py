"""x + gate_b * branch: the gated residual of adaLN-zero (Peebles & Xie, arXiv 2212.09748), and its fusion
with the norm that follows it.

The sum is formed in FP32 and rounded once to the dtype of x.
"""

from torch import Tensor

from millrace.kernels.checks import expect_offsets, expect_shape
from millrace.kernels.norm_modulate import norm_modulate
from millrace.kernels.packed import rows_from_samples, widen


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
) -> Tensor:
    """Add a branch to the residual stream, scaled by its sample's gate.

    Args:
        x, branch: (T, C).
        gate: (B, C).
        cu_seqlens: (B+1,) int32.
        max_seqlen: upper bound of the sample lengths, for the uniform fast path.

    Returns:
        (T, C) in the dtype of x.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    expect_shape("x", x, "T", "C")
    expect_shape("branch", branch, *x.shape)
    expect_shape("gate", gate, samples, x.shape[1])
    gate = rows_from_samples(widen(gate), cu_seqlens, len(x), max_seqlen)
    return (widen(x) + gate * widen(branch)).to(x.dtype)


def gated_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`x' = gated_residual(x, branch, gate)`, `y = norm_modulate(x', shift, scale)`: (x', y), each (T, C)."""
    x = gated_residual(x, branch, gate, cu_seqlens, max_seqlen)
    return x, norm_modulate(x, shift, scale, cu_seqlens, eps, max_seqlen)
