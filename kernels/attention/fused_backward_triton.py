"""Triton kernels of the fused attention's backward pass. With P = softmax(S), S = scale * Q K^T, O = P V:

    delta_i = sum_d O_id dO_id          dP = dO V^T          dS = P * (dP - delta)
    dV = P^T dO                         dK = scale * dS^T Q  dQ = scale * dS K

(Dao, arXiv 2307.08691, algorithm 2). Q and K are recomputed from the raw projections as in the forward pass,
and each kernel ends with the derivative of rotation and norm: it writes the gradient of the projections.

One kernel owns queries: it forms delta and dQ. The next owns keys, of image or of text: it forms dK and dV.
Both write their sums for the norms' weights to memory of their own; nothing is added atomically.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.attention import fused_triton
from millrace.kernels.attention.fused_triton import LN_2, LOG2_E, configuration, load_rows, sample_rows
from millrace.kernels.attention.tiles import norm, norm_backward, rotate, tile_angles
from millrace.kernels.support.compilation import (
    Launch,
    meta,
)
from millrace.kernels.support.packed import unit_stride


@triton.jit
def _grad_q_tile(q, k, v, exists, grad_out, lse, delta, grad_q):
    """Add one tile of keys' share to grad_q."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    share = tl.where(exists[None, :], tl.exp2(logits - lse[:, None]), 0.0)
    grad_share = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
    grad_logits = share * (grad_share - delta[:, None])
    return tl.dot(grad_logits.to(k.dtype), k, grad_q, input_precision="ieee")


@triton.jit
def rope_attention_bwd_dq_kernel(
    grad_out,
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
    out,
    lse,
    delta,
    grad_qkv,
    partial,
    grad_row_stride,
    grad_head_stride,
    row_stride,
    part_stride,
    head_stride,
    text_row_stride,
    text_part_stride,
    text_head_stride,
    lse_stride,
    eps,
    scale,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first, length, first_text, length_text = sample_rows(cu_seqlens, cu_seqlens_text, tl.program_id(2))
    d = tl.arange(0, DIM)
    program = (tl.program_id(2).to(tl.int64) * NUM_HEADS + head) * tl.num_programs(0) + tl.program_id(0)
    if tl.program_id(0) * BLOCK_M >= length:
        tl.store(partial + program * DIM + d, tl.zeros((DIM,), tl.float32))
        return
    dtype = qkv.dtype.element_ty
    slot = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    owned = slot < length
    rows = qkv + first * row_stride + head * head_stride
    q_gain = tl.load(q_weight + d).to(tl.float32)
    q_cosine, q_sine = tile_angles(cos, sin, positions + first, slot, owned, DIM, DIM)
    raw = load_rows(rows, row_stride, slot, length, DIM).to(tl.float32)
    q = rotate(norm(raw, q_gain * (scale * LOG2_E), eps, DIM), q_cosine, q_sine).to(dtype)
    towards = load_rows(
        grad_out + first * grad_row_stride + head * grad_head_stride, grad_row_stride, slot, length, DIM
    )
    result = load_rows(out + (first * NUM_HEADS + head) * DIM, NUM_HEADS * DIM, slot, length, DIM)
    row_delta = tl.sum(towards.to(tl.float32) * result.to(tl.float32), axis=1)
    at_row = head * lse_stride + first + slot
    tl.store(delta + at_row, row_delta, mask=owned)
    row_lse = tl.load(lse + at_row, mask=owned, other=0.0) * LOG2_E
    grad = tl.zeros((BLOCK_M, DIM), tl.float32)

    rows += part_stride
    gain = tl.load(k_weight + d).to(tl.float32)
    for start in range(0, length, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        cosine, sine = tile_angles(cos, sin, positions + first, key, key < length, DIM, DIM)
        k = load_rows(rows, row_stride, key, length, DIM).to(tl.float32)
        v = load_rows(rows + part_stride, row_stride, key, length, DIM)
        k = rotate(norm(k, gain, eps, DIM), cosine, sine).to(dtype)
        grad = _grad_q_tile(q, k, v, key < length, towards, row_lse, row_delta, grad)

    rows = text_kv + first_text * text_row_stride + head * text_head_stride
    gain = tl.load(text_k_weight + d).to(tl.float32)
    for start in range(0, length_text, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(rows, text_row_stride, key, length_text, DIM).to(tl.float32)
        v = load_rows(rows + text_part_stride, text_row_stride, key, length_text, DIM)
        k = norm(k, gain, eps, DIM).to(dtype)
        grad = _grad_q_tile(q, k, v, key < length_text, towards, row_lse, row_delta, grad)

    # Loaded again: held over the loops, these tiles would cost registers.
    raw = load_rows(qkv + first * row_stride + head * head_stride, row_stride, slot, length, DIM).to(
        tl.float32
    )
    q_cosine, q_sine = tile_angles(cos, sin, positions + first, slot, owned, DIM, DIM)
    grad, grad_gain = norm_backward(raw, rotate(grad * scale, q_cosine, -q_sine), q_gain, eps, DIM)
    at = grad_qkv + ((first + slot) * (3 * NUM_HEADS) + head)[:, None] * DIM + d[None, :]
    tl.store(at, grad, mask=owned[:, None])
    tl.store(partial + program * DIM + d, grad_gain)


@triton.jit(do_not_specialize=["image_blocks"])
def rope_attention_bwd_dkv_kernel(
    grad_out,
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
    lse,
    delta,
    grad_qkv,
    grad_text,
    partial,
    grad_row_stride,
    grad_head_stride,
    row_stride,
    part_stride,
    head_stride,
    text_row_stride,
    text_part_stride,
    text_head_stride,
    lse_stride,
    image_blocks,
    eps,
    scale,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first, length, first_text, length_text = sample_rows(cu_seqlens, cu_seqlens_text, tl.program_id(2))
    d = tl.arange(0, DIM)
    program = (tl.program_id(2).to(tl.int64) * NUM_HEADS + head) * tl.num_programs(0) + tl.program_id(0)
    if tl.program_id(0) < image_blocks:
        block, keys = tl.program_id(0), length
        turned = length
        source, stride, part = (
            qkv + first * row_stride + head * head_stride + part_stride,
            row_stride,
            part_stride,
        )
        target = grad_qkv + (first * (3 * NUM_HEADS) + NUM_HEADS + head) * DIM
        target_stride = 3 * NUM_HEADS * DIM
        gain = tl.load(k_weight + d).to(tl.float32)
    else:
        block, keys, turned = tl.program_id(0) - image_blocks, length_text, 0
        source = text_kv + first_text * text_row_stride + head * text_head_stride
        stride, part = text_row_stride, text_part_stride
        target = grad_text + (first_text * (2 * NUM_HEADS) + head) * DIM
        target_stride = 2 * NUM_HEADS * DIM
        gain = tl.load(text_k_weight + d).to(tl.float32)
    if block * BLOCK_N >= keys:
        tl.store(partial + program * DIM + d, tl.zeros((DIM,), tl.float32))
        return
    dtype = qkv.dtype.element_ty
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = slot < keys
    k_cosine, k_sine = tile_angles(cos, sin, positions + first, slot, slot < turned, DIM, DIM)
    raw = load_rows(source, stride, slot, keys, DIM).to(tl.float32)
    k = rotate(norm(raw, gain, eps, DIM), k_cosine, k_sine).to(dtype)
    v = load_rows(source + part, stride, slot, keys, DIM)
    grad_k = tl.zeros((BLOCK_N, DIM), tl.float32)
    grad_v = tl.zeros((BLOCK_N, DIM), tl.float32)

    rows = qkv + first * row_stride + head * head_stride
    towards_rows = grad_out + first * grad_row_stride + head * grad_head_stride
    q_gain = tl.load(q_weight + d).to(tl.float32) * (scale * LOG2_E)
    for start in range(0, length, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        cosine, sine = tile_angles(cos, sin, positions + first, query, query < length, DIM, DIM)
        q = load_rows(rows, row_stride, query, length, DIM).to(tl.float32)
        towards = load_rows(towards_rows, grad_row_stride, query, length, DIM)
        at_row = head * lse_stride + first + query
        row_lse = tl.load(lse + at_row, mask=query < length, other=0.0) * LOG2_E
        row_delta = tl.load(delta + at_row, mask=query < length, other=0.0)
        q = rotate(norm(q, q_gain, eps, DIM), cosine, sine).to(dtype)
        # Queries and keys that do not exist need no mask: the former have zero gradients, and what the
        # latter sum up stays in their own rows.
        share = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") - row_lse[None, :])
        grad_v = tl.dot(share.to(dtype), towards, grad_v, input_precision="ieee")
        grad_share = tl.dot(v, tl.trans(towards), input_precision="ieee")
        grad_logits = (share * (grad_share - row_delta[None, :])).to(dtype)
        grad_k = tl.dot(grad_logits, q, grad_k, input_precision="ieee")

    at = target + slot.to(tl.int64)[:, None] * target_stride + d[None, :]
    tl.store(at + NUM_HEADS * DIM, grad_v, mask=owned[:, None])
    raw = load_rows(source, stride, slot, keys, DIM).to(tl.float32)
    k_cosine, k_sine = tile_angles(cos, sin, positions + first, slot, slot < turned, DIM, DIM)
    grad_k = tl.where(owned[:, None], grad_k * LN_2, 0.0)
    grad_k, grad_gain = norm_backward(raw, rotate(grad_k, k_cosine, -k_sine), gain, eps, DIM)
    tl.store(at, grad_k, mask=owned[:, None])
    tl.store(partial + program * DIM + d, grad_gain)


def backward_triton(
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
    """Launch both kernels, then add up the programs' sums for the weights."""
    grad_out, qkv, text_kv = unit_stride(grad_out), unit_stride(qkv), unit_stride(text_kv)
    heads, dim = out.shape[1:]
    samples = cu_seqlens.shape[0] - 1
    weights = q_weight, k_weight, text_k_weight
    tables = tuple(x.contiguous() for x in (*weights, cos, sin, positions))
    inputs = grad_out, qkv, text_kv, *tables, cu_seqlens, cu_seqlens_text
    strides = (*grad_out.stride()[:2], *qkv.stride()[:3], *text_kv.stride()[:3], lse.stride(0))
    grad_qkv, grad_text = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (qkv, text_kv))
    delta = torch.empty_like(lse)

    tiles = configuration(qkv).grad_q
    blocks = triton.cdiv(max_seqlen, tiles.queries)
    partial = torch.empty(samples, heads, blocks, dim, dtype=torch.float32, device=qkv.device)
    rope_attention_bwd_dq_kernel[(blocks, heads, samples)](
        *inputs,
        out,
        lse,
        delta,
        grad_qkv,
        partial,
        *strides,
        eps,
        scale,
        NUM_HEADS=heads,
        DIM=dim,
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    sums = [partial.sum((0, 1, 2))]

    tiles = configuration(qkv).grad_kv
    image_blocks = triton.cdiv(max_seqlen, tiles.keys)
    blocks = image_blocks + triton.cdiv(max_seqlen_text, tiles.keys)
    partial = torch.empty(samples, heads, blocks, dim, dtype=torch.float32, device=qkv.device)
    rope_attention_bwd_dkv_kernel[(blocks, heads, samples)](
        *inputs,
        lse,
        delta,
        grad_qkv,
        grad_text,
        partial,
        *strides,
        image_blocks,
        eps,
        scale,
        NUM_HEADS=heads,
        DIM=dim,
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    sums += [partial[:, :, :image_blocks].sum((0, 1, 2)), partial[:, :, image_blocks:].sum((0, 1, 2))]
    return grad_qkv, grad_text, *(g.to(w.dtype) for g, w in zip(sums, weights, strict=True))


def configurations() -> list[Launch]:
    """The launches of training, for ahead-of-time compilation."""
    launches = []
    for forward in fused_triton.configurations():
        *tensors, max_seqlen, max_seqlen_text, eps, scale = forward.arguments
        qkv = tensors[0]
        total, _, heads, dim = qkv.shape
        out, lse = meta(total, heads, dim, dtype=qkv.dtype), meta(heads, total, dtype=torch.float32)
        arguments = (out, *tensors, out, lse, max_seqlen, max_seqlen_text, eps, scale)
        launches.append(
            Launch(
                forward.name.replace("forward", "backward"),
                backward_triton,
                arguments,
                frozenset(
                    {"rope_attention_bwd_dq_kernel", "rope_attention_bwd_dkv_kernel"} if forward.wgmma else ()
                ),
            )
        )
    return launches
