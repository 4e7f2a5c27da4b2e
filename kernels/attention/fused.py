"""The fused attention: FlashAttention that normalises, rotates and joins raw projections on the way.

    out = softmax(scale * RoPE(RMSNorm(q)) [RoPE(RMSNorm(k)), RMSNorm(k_text)]^T) [v, v_text]

Saved for backward: the inputs, the output, and the log of the softmax's denominator, one number a row and
head. Queries, keys and values are recomputed, so a block keeps 3 T + 2 S rows of C less than the prologue's.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from millrace.kernels.attention import prologue
from millrace.kernels.support.packed import sample_slices
from millrace.kernels.support.registration import (
    HAS_TRITON,
    register,
    uses_triton,
)

if HAS_TRITON:
    from millrace.kernels.attention.fused_backward_triton import backward_triton
    from millrace.kernels.attention.fused_triton import forward_triton
else:
    forward_triton = backward_triton = None

HEAD_DIMS = (16, 32, 64, 128)
"""Powers of two that tensor cores take and registers hold."""


def _forward_eager(
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
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The prologue and torch's flash attention for the CPU, sample by sample."""
    out, lse = _forward_fake(qkv)
    q, k, v = prologue.forward_eager(
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
        padded=False,
        eps=eps,
    )
    for rows, joint in _sample_rows(cu_seqlens, cu_seqlens_text):
        if rows.start == rows.stop:
            continue
        heads = (x.transpose(0, 1)[None] for x in (q[rows], k[joint], v[joint]))
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
        out[rows], lse[:, rows] = part[0].transpose(0, 1), part_lse[0]
    return out, lse


def _sample_rows(cu_seqlens: Tensor, cu_seqlens_text: Tensor) -> list[tuple[slice, slice]]:
    """Rows of the queries, and of the keys, of each sample in the packed layout."""
    return list(zip(sample_slices(cu_seqlens), sample_slices(cu_seqlens + cu_seqlens_text), strict=True))


def _backward_eager(
    grad_out: Tensor,
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
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    max_seqlen_text: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (
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
    )
    q, k, v = prologue.forward_eager(*inputs, padded=False, eps=eps)
    for rows, joint in _sample_rows(cu_seqlens, cu_seqlens_text):
        if rows.start == rows.stop:  # text that no query attends
            k[joint], v[joint] = 0, 0
            continue
        grad, *parts, result = (
            x.transpose(0, 1)[None] for x in (grad_out[rows], q[rows], k[joint], v[joint], out[rows])
        )
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *parts, result, lse[None, :, rows], 0.0, False, scale=scale
        )
        # A sample's queries, keys and values are not read again: their memory takes the gradients.
        for x, index, gradient in zip((q, k, v), (rows, joint, joint), gradients, strict=True):
            x[index] = gradient[0].transpose(0, 1)
    return prologue.backward_eager(q, k, v, *inputs, padded=False, eps=eps)


def _forward_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    total, _, heads, dim = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(total, heads, dim), qkv.new_empty(heads, total, dtype=wide)


def _backward_fake(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:5])


_INPUTS = (
    "Tensor qkv, Tensor text_kv, Tensor q_weight, Tensor k_weight, Tensor text_k_weight, Tensor cos, "
    "Tensor sin, Tensor positions, Tensor cu_seqlens, Tensor cu_seqlens_text"
)
_SETTINGS = "SymInt max_seqlen, SymInt max_seqlen_text, float eps, float scale"
_forward = register(
    f"rope_attention_fused({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)",
    eager=_forward_eager,
    triton=forward_triton,
    fake=_forward_fake,
)
_backward = register(
    f"rope_attention_fused_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    eager=_backward_eager,
    triton=backward_triton,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.millrace.rope_attention_fused, get_raw=True)
def _forward_flops(qkv: Tensor, text_kv: Tensor, *rest: Any, **_: Any) -> int:
    """4 L_q L_k D H of each sample; without data to read the lengths from, of their bounds."""
    *_, cu_seqlens, cu_seqlens_text, longest, longest_text, _, _ = rest
    heads, dim = qkv.shape[2:]
    if cu_seqlens.device.type == "meta" or isinstance(cu_seqlens, FakeTensor):
        pairs = qkv.shape[0] * (longest + longest_text)
    else:
        lengths = cu_seqlens.diff().long()
        pairs = int((lengths * (lengths + cu_seqlens_text.diff())).sum())
    return 4 * pairs * heads * dim


@register_flop_formula(torch.ops.millrace.rope_attention_fused_backward, get_raw=True)
def _backward_flops(_grad_out: Tensor, *inputs: Any, **_: Any) -> int:
    """Five products for the forward pass's two."""
    return _forward_flops(*inputs[:10], *inputs[12:]) * 5 // 2


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = _forward(*inputs)
        ctx.save_for_backward(*inputs[:10], out, lse)
        ctx.settings = inputs[10:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(grad_out, *ctx.saved_tensors, *ctx.settings)
        return *gradients, *(None,) * (5 + len(ctx.settings))


def fused_attention(
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
    eps: float,
    scale: float,
) -> Tensor:
    """`rope_attention`, which checks the arguments, in one kernel; (T, H, D) in the dtype of qkv.

    Raises ValueError for a head_dim or dtype that the kernels do not take.
    """
    if uses_triton(qkv):
        if qkv.shape[3] not in HEAD_DIMS:
            raise ValueError(f"backend 'triton' takes head_dim {HEAD_DIMS}, qkv has {qkv.shape[3]}")
    elif not qkv.is_cpu and not qkv.is_meta:
        raise ValueError(f"backend 'triton' takes FP32, BF16 and FP16 and needs Triton, qkv is {qkv.dtype}")
    return _FusedAttention.apply(
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
        eps,
        scale,
    )
