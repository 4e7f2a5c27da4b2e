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

from millrace.kernels.attention.layout import Joint, joint_shapes, sample_rows
from millrace.kernels.operators import HAS_TRITON, register
from millrace.kernels.packed import widen

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
    """Sample by sample: what one step writes is still in the cache when the next reads it."""
    shape, joint_shape = joint_shapes(qkv, text_kv, cu_seqlens, max_seqlen, max_seqlen_text, padded)
    full = shape[:-2].numel() == len(qkv) and joint_shape[:-2].numel() == len(qkv) + len(text_kv)
    create = qkv.new_empty if full else qkv.new_zeros
    q, k, v = create(shape), create(joint_shape), create(joint_shape)
    rotation = _rotation(cos, sin, positions, qkv.dtype)
    for rows in sample_rows(cu_seqlens, cu_seqlens_text, padded):
        image, text, turn = qkv[rows.image], text_kv[rows.text], rotation[rows.image]
        _norm(image[:, 0], q_weight, eps, q[rows.q], turn)
        _norm(image[:, 1], k_weight, eps, k[rows.keys], turn)
        _norm(text[:, 0], text_k_weight, eps, k[rows.text_keys])
        v[rows.keys] = image[:, 2]
        v[rows.text_keys] = text[:, 1]
    return q, k, v


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


def _norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, rotation: Tensor | None = None) -> None:
    """Write RMSNorm(x) * weight, turned, to `out` (rows, H, D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    result = out if out.dtype == wide else torch.empty(out.shape, dtype=wide, device=out.device)
    torch.mul(x, _reciprocal_rms(x, eps), out=result).mul_(weight)
    if rotation is not None:
        _turn_(result, rotation)
    if result is not out:
        out.copy_(result)


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
    weights = q_weight, k_weight, text_k_weight
    grad_weights = [torch.zeros(w.shape, dtype=widen(qkv[:0]).dtype, device=w.device) for w in weights]
    rotation = _rotation(cos, sin, positions, qkv.dtype).conj_physical()
    for rows in sample_rows(cu_seqlens, cu_seqlens_text, padded):
        image, text, turn = qkv[rows.image], text_kv[rows.text], rotation[rows.image]
        to_image, to_text = grad_qkv[rows.image], grad_text[rows.text]
        if not len(image):
            to_text.zero_()  # no query has read the text of an empty sample
            continue
        q, k, text_k = grad_q[rows.q], grad_k[rows.keys], grad_k[rows.text_keys]
        grad_weights[0] += _norm_backward(image[:, 0], q, q_weight, eps, to_image[:, 0], turn)
        grad_weights[1] += _norm_backward(image[:, 1], k, k_weight, eps, to_image[:, 1], turn)
        grad_weights[2] += _norm_backward(text[:, 0], text_k, text_k_weight, eps, to_text[:, 0])
        to_image[:, 2] = grad_v[rows.keys]
        to_text[:, 1] = grad_v[rows.text_keys]
    return grad_qkv, grad_text, *(g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True))


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
