"""Queries and keys of a block's image tokens, for a loss that looks at its attention."""

import torch
from torch import Tensor

from millrace.kernels.support.packed import widen


def queries_and_keys(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `rope_attention` takes scalar products of, again, for the first `heads` heads.

    Its own are inside the kernels or joined with the text's; forming these again costs a pass over two thirds
    of qkv, in the few blocks that are looked at. Arguments are those of `rope_attention`.

    Returns queries and keys (T, heads, D) in the dtype of qkv.
    """
    angles = [table.index_select(0, positions)[:, None] for table in (cos, sin)]
    q, k = (
        rotate(_rms_norm(qkv[:, i, :heads], weight, eps), *angles).to(qkv.dtype)
        for i, weight in enumerate((q_weight, k_weight))
    )
    return q, k


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of (T, H, D) by the angles of (T, 1, D/2); FP32, or FP64 of FP64."""
    even, odd = widen(x)[..., 0::2], widen(x)[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = widen(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * widen(weight)
