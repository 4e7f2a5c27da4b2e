"""What lies between the QKV projection and attention, in one pass over the data.

    q, k   = RoPE(RMSNorm(q)), RoPE(RMSNorm(k))      per head, image tokens, at their positions
    k_text = RMSNorm(k_text)                          text tokens carry no position
    keys   = [k, k_text],  values = [v, v_text]       of each sample, image rows first

Keys and values are written where attention wants them, in one of the layouts of `layout.py`.

Saved for backward: the inputs alone, which the projections' outputs keep alive anyway. The norms' factors
are recomputed: one row's sum of squares costs less than writing and reading it back.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.attention.layout import Joint, PaddedRows, joint_shapes, packed_rows
from millrace.kernels.support.packed import sample_slices
from millrace.kernels.support.registration import (
    HAS_TRITON,
    register,
)

if HAS_TRITON:
    from millrace.kernels.attention.prologue_triton import backward_triton, forward_triton
else:
    forward_triton = backward_triton = None


def forward_eager(
    qkv: Tensor,
    text_kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_text: Tensor,
    max_seqlen: int,
    max_seqlen_text: int,
    padded: bool,
    eps: float,
) -> Joint:
    """Norms and rotation run over all rows at once; only joining image and text goes sample by sample."""
    shape, joint_shape = joint_shapes(qkv, text_kv, cu_seqlens, max_seqlen, max_seqlen_text, padded)
    rotation = _rotation(cos, sin, positions, qkv.dtype)
    q = _norm(qkv[:, 0], q_weight, eps, rotation)
    k, text_k = _norm(qkv[:, 1], k_weight, eps, rotation), _norm(text_kv[:, 0], text_k_weight, eps)
    v, text_v = qkv[:, 2], text_kv[:, 1]
    if not padded:
        rows = list(packed_rows(cu_seqlens, cu_seqlens_text))
        return q, *(
            torch.cat([part for sample in rows for part in (image[sample.image], text[sample.text])])
            for image, text in ((k, text_k), (v, text_v))
        )
    places = PaddedRows.of(
        cu_seqlens, cu_seqlens_text, (len(qkv), len(text_kv)), (max_seqlen, max_seqlen_text)
    )
    q = q.view(shape) if q.numel() == shape.numel() else _spread(shape, (q, places.q))
    return q, *(
        _spread(joint_shape, (image, places.image), (text, places.text))
        for image, text in ((k, text_k), (v, text_v))
    )


def _spread(shape: torch.Size, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """(B, rows, H, D) with each part's rows (., H, D) at their places; free rows are zero."""
    full = shape[:2].numel() == sum(len(values) for values, _ in parts)
    result = parts[0][0].new_empty(shape) if full else parts[0][0].new_zeros(shape)
    for values, rows in parts:
        result.flatten(0, 1).index_copy_(0, rows, values)
    return result


def _rotation(cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """cos + i sin of each image token, (T, 1, D/2) complex: one multiplication turns a pair of features."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.complex(cos.to(wide), sin.to(wide)).index_select(0, positions)[:, None]


def _turn_(x: Tensor, rotation: Tensor) -> None:
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation)


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """(rows, H, 1) of x (rows, H, D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm(x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None = None) -> Tensor:
    """RMSNorm(x) * weight, turned, of x (rows, H, D), in the dtype of x."""
    result = torch.mul(x, _reciprocal_rms(x, eps)).mul_(weight)
    if rotation is not None:
        _turn_(result, rotation)
    return result.to(x.dtype)


def backward_eager(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    text_kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_text: Tensor,
    max_seqlen: int,
    max_seqlen_text: int,
    padded: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_qkv, grad_text = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (qkv, text_kv))
    rotation = _rotation(cos, sin, positions, qkv.dtype).conj_physical()
    if padded:
        places = PaddedRows.of(
            cu_seqlens, cu_seqlens_text, (len(qkv), len(text_kv)), (max_seqlen, max_seqlen_text)
        )
        grad_k, grad_v = grad_k.flatten(0, 1), grad_v.flatten(0, 1)
        whole = grad_q.shape[:2].numel() == len(qkv)
        grad_q = grad_q.flatten(0, 1) if whole else grad_q.flatten(0, 1).index_select(0, places.q)
        image_k, image_v = (grad.index_select(0, places.image) for grad in (grad_k, grad_v))
        text_k, text_v = (grad.index_select(0, places.text) for grad in (grad_k, grad_v))
    else:
        rows = list(packed_rows(cu_seqlens, cu_seqlens_text))
        image_k, image_v = (torch.cat([grad[sample.keys] for sample in rows]) for grad in (grad_k, grad_v))
        text_k, text_v = (torch.cat([grad[sample.text_keys] for sample in rows]) for grad in (grad_k, grad_v))
    _forget_unread(text_k, text_v, cu_seqlens, cu_seqlens_text)
    grad_weights = (
        _norm_backward(qkv[:, 0], grad_q, q_weight, eps, grad_qkv[:, 0], rotation),
        _norm_backward(qkv[:, 1], image_k, k_weight, eps, grad_qkv[:, 1], rotation),
        _norm_backward(text_kv[:, 0], text_k, text_k_weight, eps, grad_text[:, 0]),
    )
    grad_qkv[:, 2], grad_text[:, 1] = image_v, text_v
    weights = q_weight, k_weight, text_k_weight
    return grad_qkv, grad_text, *(g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True))


def _forget_unread(text_k: Tensor, text_v: Tensor, cu_seqlens: Tensor, cu_seqlens_text: Tensor) -> None:
    """No query reads the text of a sample without image: its gradient is zero, whatever stands there."""
    for image, text in zip(sample_slices(cu_seqlens), sample_slices(cu_seqlens_text), strict=True):
        if image.start == image.stop:
            text_k[text], text_v[text] = 0, 0


def _norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, eps: float, out: Tensor, rotation: Tensor | None = None
) -> Tensor:
    """Write the gradient of x (rows, H, D) to `out`; return that of the weight (D,).

    With r = 1 / RMS(x) and g the gradient before the rotation, dx = r (g w - x r^2 mean(g w x)).
    """
    dim = x.shape[-1]
    factor = _reciprocal_rms(x, eps)
    grad = grad.to(factor.dtype, copy=True, memory_format=torch.contiguous_format)
    if rotation is not None:
        _turn_(grad, rotation)
    product = (grad * x).mul_(factor).view(-1, dim)
    grad_weight = product.sum(0)  # pairwise, where a matrix product would add rows one by one
    weight = weight.to(factor.dtype)
    slope = (product @ weight).view_as(factor).mul_(factor.square()).div_(-dim)
    grad.mul_(weight).mul_(factor)
    torch.addcmul(grad, x.to(factor.dtype), slope, out=out if out.dtype == factor.dtype else grad)
    if out.dtype != factor.dtype:
        out.copy_(grad)
    return grad_weight


def _forward_fake(qkv: Tensor, text_kv: Tensor, *rest: Any) -> Joint:
    *_, cu_seqlens, _, max_seqlen, max_seqlen_text, padded, _ = rest
    shape, joint_shape = joint_shapes(qkv, text_kv, cu_seqlens, max_seqlen, max_seqlen_text, padded)
    return qkv.new_empty(shape), qkv.new_empty(joint_shape), qkv.new_empty(joint_shape)


def _backward_fake(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:5])


_INPUTS = (
    "Tensor qkv, Tensor text_kv, Tensor q_weight, Tensor k_weight, Tensor text_k_weight, Tensor cos, "
    "Tensor sin, Tensor positions, Tensor cu_seqlens, Tensor cu_seqlens_text, SymInt max_seqlen, "
    "SymInt max_seqlen_text, bool padded, float eps"
)
_forward = register(
    f"rope_attention_prologue({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    eager=forward_eager,
    triton=forward_triton,
    fake=_forward_fake,
)
_backward = register(
    f"rope_attention_prologue_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    eager=backward_eager,
    triton=backward_triton,
    fake=_backward_fake,
)


class _Prologue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Joint:
        ctx.save_for_backward(*inputs[:10])
        ctx.settings = inputs[10:]
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(grad_q, grad_k, grad_v, *ctx.saved_tensors, *ctx.settings)
        return *gradients, *(None,) * (5 + len(ctx.settings))


def prologue(
    qkv: Tensor,
    text_kv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_text: Tensor,
    max_seqlen: int,
    max_seqlen_text: int,
    padded: bool,
    eps: float = 1e-6,
) -> Joint:
    """Normalise, rotate and join.

    Arguments are those of `rope_attention`, which checks them. Returns queries, keys and values in the dtype
    of qkv. Rows of the padded layout that no token owns are zero; their gradients are not read, nor
    are those of the text of a sample without image, which no query can have read.
    """
    return _Prologue.apply(
        qkv,
        text_kv,
        q_weight,
        k_weight,
        text_k_weight,
        cos,
        sin,
        positions,
        cu_seqlens,
        cu_seqlens_text,
        max_seqlen,
        max_seqlen_text,
        padded,
        eps,
    )
