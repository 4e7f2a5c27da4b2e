"""Triton kernel of the fused attention's forward pass, and the tiles that it and its derivative use.

FlashAttention (Dao, arXiv 2307.08691) on raw projections. A program owns BLOCK_M queries of one head of one
sample; it normalises and rotates them once, then walks over the sample's image keys and its text keys, and
normalises (and rotates) each tile of keys when it comes by. So each key is normalised once for every BLOCK_M
queries: work of about 10 operations a feature beside the 4 * BLOCK_M of the products, but outside the tensor
cores, and a key tile passes through registers on its way to them. That is what saving q, k and v costs.

Logits are in units of log 2, so that the softmax is `exp2`; scale and log2(e) are factors of the queries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.attention.tiles import norm, rotate, tile_angles, training_inputs
from millrace.kernels.support.compilation import (
    Launch,
    capability,
)
from millrace.kernels.support.packed import unit_stride
from millrace.kernels.support.registration import INTERPRETING

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Queries and keys of a tile, and how a program runs."""

    queries: int
    keys: int
    warps: int
    stages: int


class Configuration(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tiles
    grad_q: Tiles
    grad_kv: Tiles


_CONFIGURATIONS = {
    # (head_dim, compute capability): the largest tiles that spill no registers under Triton 3.6 and 3.7
    (64, 90): Configuration(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
    (128, 90): Configuration(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
    (64, 80): Configuration(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 1)),
    (128, 80): Configuration(Tiles(64, 64, 8, 1), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
}
_SINGLE = Configuration(*(Tiles(16, 16, 8, 1),) * 3)
"""FP32: products without tensor cores."""
_INTERPRETED = Configuration(*(Tiles(16, 16, 1, 1),) * 3)


def configuration(qkv: Tensor) -> Configuration:
    """The tiles for this dtype, head_dim and GPU."""
    if INTERPRETING:
        return _INTERPRETED
    if qkv.dtype == torch.float32:
        return _SINGLE
    return _CONFIGURATIONS[max(qkv.shape[3], 64), 90 if capability(qkv) == 90 else 80]


@triton.jit
def sample_rows(cu_seqlens, cu_seqlens_text, sample):
    """First row and length of a sample's image, then of its text."""
    first = tl.load(cu_seqlens + sample)
    length = tl.load(cu_seqlens + sample + 1) - first
    first_text = tl.load(cu_seqlens_text + sample)
    length_text = tl.load(cu_seqlens_text + sample + 1) - first_text
    return first.to(tl.int64), length, first_text.to(tl.int64), length_text


@triton.jit
def load_rows(pointer, row_stride, slot, length, DIM: tl.constexpr):
    """(R, D) tile of the rows `slot` from the pointer on, zero from `length` on."""
    at = pointer + slot.to(tl.int64)[:, None] * row_stride + tl.arange(0, DIM)[None, :]
    return tl.load(at, mask=(slot < length)[:, None], other=0.0)


@triton.jit
def _attend(q, k, v, exists, top, total, acc):
    """One tile of keys: online softmax. `top` is the largest logit so far, `total` the sum of odds."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    logits = tl.where(exists[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    odds = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(odds.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(odds, axis=1), acc


@triton.jit
def rope_attention_fwd_kernel(
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
    if tl.program_id(0) * BLOCK_M >= length:
        return
    dtype = qkv.dtype.element_ty
    d = tl.arange(0, DIM)
    slot = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = qkv + first * row_stride + head * head_stride
    q_gain = tl.load(q_weight + d).to(tl.float32) * (scale * LOG2_E)
    q_cosine, q_sine = tile_angles(cos, sin, positions + first, slot, slot < length, DIM, DIM)
    raw = load_rows(rows, row_stride, slot, length, DIM).to(tl.float32)
    q = rotate(norm(raw, q_gain, eps, DIM), q_cosine, q_sine).to(dtype)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)

    rows += part_stride
    gain = tl.load(k_weight + d).to(tl.float32)
    for start in range(0, length, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        cosine, sine = tile_angles(cos, sin, positions + first, key, key < length, DIM, DIM)
        k = load_rows(rows, row_stride, key, length, DIM).to(tl.float32)
        v = load_rows(rows + part_stride, row_stride, key, length, DIM)
        k = rotate(norm(k, gain, eps, DIM), cosine, sine).to(dtype)
        top, total, acc = _attend(q, k, v, key < length, top, total, acc)

    rows = text_kv + first_text * text_row_stride + head * text_head_stride
    gain = tl.load(text_k_weight + d).to(tl.float32)
    for start in range(0, length_text, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(rows, text_row_stride, key, length_text, DIM).to(tl.float32)
        v = load_rows(rows + text_part_stride, text_row_stride, key, length_text, DIM)
        top, total, acc = _attend(q, norm(k, gain, eps, DIM).to(dtype), v, key < length_text, top, total, acc)

    at = out + ((first + slot) * NUM_HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(at, acc / total[:, None], mask=(slot < length)[:, None])
    tl.store(lse + head * lse_stride + first + slot, (top + tl.log2(total)) * LN_2, mask=slot < length)


def forward_triton(
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
    """Launch the forward kernel: (T, H, D) output and (H, T) FP32 log of the softmax's denominator."""
    qkv, text_kv = unit_stride(qkv), unit_stride(text_kv)
    total, _, heads, dim = qkv.shape
    out = torch.empty(total, heads, dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, total, dtype=torch.float32, device=qkv.device)
    tiles = configuration(qkv).forward
    rope_attention_fwd_kernel[(triton.cdiv(max_seqlen, tiles.queries), heads, cu_seqlens.shape[0] - 1)](
        qkv,
        text_kv,
        *(x.contiguous() for x in (q_weight, k_weight, text_k_weight, cos, sin, positions)),
        cu_seqlens,
        cu_seqlens_text,
        out,
        lse,
        *qkv.stride()[:3],
        *text_kv.stride()[:3],
        lse.stride(0),
        eps,
        scale,
        NUM_HEADS=heads,
        DIM=dim,
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out, lse


def configurations() -> list[Launch]:
    """The launches of training, for ahead-of-time compilation."""
    return [
        Launch(
            f"fused forward, head_dim {dim}, {str(dtype).removeprefix('torch.')}",
            forward_triton,
            (*training_inputs(dim, dtype), 1024, 256, 1e-6, dim**-0.5),
            frozenset(() if dtype == torch.float32 else {"rope_attention_fwd_kernel"}),
        )
        for dim in (64, 128)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
