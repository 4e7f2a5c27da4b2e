"""Fused attention: FlashAttention that normalises, rotates and joins raw projections on the way.

    out = softmax(scale * RoPE(RMSNorm(q)) [RoPE(RMSNorm(k)), RMSNorm(k_text)]^T) [v, v_text]

Forward (Dao, arXiv 2307.08691): a program owns BLOCK_M queries of one head of one sample; it normalises and
rotates them once, then walks over the sample's image keys and its text keys, and normalises (and rotates)
each tile of keys when it comes by. So each key is normalised once for every BLOCK_M queries: work of about 10
operations a feature beside the 4 * BLOCK_M of the products, but outside the tensor cores, and a key tile
passes through registers on its way to them. That is what saving q, k and v costs. Logits are in units of
log 2, so that the softmax is `exp2`; scale and log2(e) are factors of the queries.

Backward (algorithm 2 there), with P = softmax(S), S = scale * Q K^T, O = P V:

    delta_i = sum_d O_id dO_id          dP = dO V^T          dS = P * (dP - delta)
    dV = P^T dO                         dK = scale * dS^T Q  dQ = scale * dS K

One kernel owns queries: it forms delta and dQ. The next owns keys, of image or of text: it forms dK and dV.
Each ends with the derivative of rotation and norm, so it writes the gradient of the projections. Both write
their sums for the norms' weights to memory of their own; nothing is added atomically.

Saved for backward: the inputs, the output, and the log of the softmax's denominator (lse), one number a row
and head. Queries, keys and values are recomputed, so a block keeps 3 T + 2 S rows of C less than the
prologue's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from millrace.kernels.attention import prologue
from millrace.kernels.support.compilation import Launch, capability, meta
from millrace.kernels.support.packed import sample_slices, unit_stride
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING, register, uses_triton

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.attention.tiles import norm, norm_backward, rotate, tile_angles, training_inputs

    LOG2_E = tl.constexpr(1.4426950408889634)
    LN_2 = tl.constexpr(0.6931471805599453)


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
    grad_qkv, grad_text_kv, weights = prologue.backward_eager(q, k, v, *inputs, padded=False, eps=eps)
    norms = (q_weight, k_weight, text_k_weight)
    return grad_qkv, grad_text_kv, *(g.to(w.dtype, copy=True) for g, w in zip(weights, norms, strict=True))


class Tiles(NamedTuple):
    """Queries and keys of a tile, and how a program runs."""

    queries: int
    keys: int
    warps: int
    stages: int
    maxnreg: int | None = None
    """Most registers of a thread, for more blocks on a multiprocessor; None leaves it to ptxas."""

    @property
    def constants(self) -> dict[str, int]:
        """The arguments of a launch that follow from these."""
        # Only NVIDIA's backend knows `maxnreg`.
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        tiles = {"BLOCK_M": self.queries, "BLOCK_N": self.keys}
        return {**tiles, "num_warps": self.warps, "num_stages": self.stages, **limit}


class Configuration(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


_CONFIGURATIONS = {
    # (head_dim, compute capability): tiles without accesses to local memory in a loop, under Triton 3.6 and
    # 3.7. On Hopper two blocks run on a multiprocessor, so that one normalises and rotates while the other
    # waits for its products. The exceptions are the keys' gradients at 64 and the forward pass at 128: tiles
    # of which two fit take 1.4 times the instructions for a pair of query and key, or more.
    (64, 90): Configuration(Tiles(128, 64, 8, 3, 128), Tiles(128, 32, 8, 2, 128), Tiles(64, 128, 8, 2)),
    (128, 90): Configuration(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
    (64, 80): Configuration(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 1)),
    (128, 80): Configuration(Tiles(64, 64, 8, 1), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
    # tcgen05 takes no fewer than 64 rows
    (64, 100): Configuration(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 1)),
    (128, 100): Configuration(Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
}


_SINGLE = Configuration(*(Tiles(16, 16, 8, 1),) * 3)
"""FP32: products without tensor cores."""


_INTERPRETED = Configuration(*(Tiles(16, 16, 1, 1),) * 3)


if HAS_TRITON:

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
    def _attend(q, k, v, valid, m_i, l_i, acc):
        """One tile of keys: online softmax. m_i is the largest logit so far, l_i the sum of exponentials."""
        # ieee: FP32 operands would be rounded to TF32 otherwise; 16-bit products are not touched by it.
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        # Keys beyond the sample would weigh exp2(0 - m_i), not nothing.
        s = tl.where(valid[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        return m_new, l_i * alpha + tl.sum(p, axis=1), acc

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
        o_ptr,
        lse_ptr,
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
        offs_d = tl.arange(0, DIM)
        offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = qkv + first * row_stride + head * head_stride
        q_w = tl.load(q_weight + offs_d).to(tl.float32) * (scale * LOG2_E)
        cos_m, sin_m = tile_angles(cos, sin, positions + first, offs_m, offs_m < length, DIM, DIM)
        raw = load_rows(rows, row_stride, offs_m, length, DIM).to(tl.float32)
        q = rotate(norm(raw, q_w, eps, DIM), cos_m, sin_m).to(dtype)
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DIM), tl.float32)

        rows += part_stride
        k_w = tl.load(k_weight + offs_d).to(tl.float32)
        for start in range(0, length, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            cos_n, sin_n = tile_angles(cos, sin, positions + first, offs_n, offs_n < length, DIM, DIM)
            k = load_rows(rows, row_stride, offs_n, length, DIM).to(tl.float32)
            v = load_rows(rows + part_stride, row_stride, offs_n, length, DIM)
            k = rotate(norm(k, k_w, eps, DIM), cos_n, sin_n).to(dtype)
            m_i, l_i, acc = _attend(q, k, v, offs_n < length, m_i, l_i, acc)

        rows = text_kv + first_text * text_row_stride + head * text_head_stride
        k_w = tl.load(text_k_weight + offs_d).to(tl.float32)
        for start in range(0, length_text, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            k = load_rows(rows, text_row_stride, offs_n, length_text, DIM).to(tl.float32)
            v = load_rows(rows + text_part_stride, text_row_stride, offs_n, length_text, DIM)
            m_i, l_i, acc = _attend(
                q, norm(k, k_w, eps, DIM).to(dtype), v, offs_n < length_text, m_i, l_i, acc
            )

        o_ptrs = o_ptr + ((first + offs_m) * NUM_HEADS + head)[:, None] * DIM + offs_d[None, :]
        # A sample has an image token, so l_i is never 0 for a row that is stored.
        tl.store(o_ptrs, acc / l_i[:, None], mask=(offs_m < length)[:, None])
        tl.store(
            lse_ptr + head * lse_stride + first + offs_m, (m_i + tl.log2(l_i)) * LN_2, mask=offs_m < length
        )

    @triton.jit
    def _dq_tile(q, k, v, valid, do, lse, delta, dq):
        """Add one tile of keys' share to dq."""
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.where(valid[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    @triton.jit
    def rope_attention_bwd_dq_kernel(
        do_ptr,
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
        o_ptr,
        lse_ptr,
        delta_ptr,
        dqkv,
        partial,
        do_row_stride,
        do_head_stride,
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
        offs_d = tl.arange(0, DIM)
        program = (tl.program_id(2).to(tl.int64) * NUM_HEADS + head) * tl.num_programs(0) + tl.program_id(0)
        if tl.program_id(0) * BLOCK_M >= length:
            # Every program's sums are added up afterwards, so one without rows writes zeros.
            tl.store(partial + program * DIM + offs_d, tl.zeros((DIM,), tl.float32))
            return
        dtype = qkv.dtype.element_ty
        offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = offs_m < length
        rows = qkv + first * row_stride + head * head_stride
        q_w = tl.load(q_weight + offs_d).to(tl.float32)
        cos_m, sin_m = tile_angles(cos, sin, positions + first, offs_m, mask, DIM, DIM)
        raw = load_rows(rows, row_stride, offs_m, length, DIM).to(tl.float32)
        q = rotate(norm(raw, q_w * (scale * LOG2_E), eps, DIM), cos_m, sin_m).to(dtype)
        do = load_rows(
            do_ptr + first * do_row_stride + head * do_head_stride, do_row_stride, offs_m, length, DIM
        )
        o = load_rows(o_ptr + (first * NUM_HEADS + head) * DIM, NUM_HEADS * DIM, offs_m, length, DIM)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        offs_row = head * lse_stride + first + offs_m
        tl.store(delta_ptr + offs_row, delta, mask=mask)
        lse = tl.load(lse_ptr + offs_row, mask=mask, other=0.0) * LOG2_E
        dq = tl.zeros((BLOCK_M, DIM), tl.float32)

        rows += part_stride
        k_w = tl.load(k_weight + offs_d).to(tl.float32)
        for start in range(0, length, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            cos_n, sin_n = tile_angles(cos, sin, positions + first, offs_n, offs_n < length, DIM, DIM)
            k = load_rows(rows, row_stride, offs_n, length, DIM).to(tl.float32)
            v = load_rows(rows + part_stride, row_stride, offs_n, length, DIM)
            k = rotate(norm(k, k_w, eps, DIM), cos_n, sin_n).to(dtype)
            dq = _dq_tile(q, k, v, offs_n < length, do, lse, delta, dq)

        rows = text_kv + first_text * text_row_stride + head * text_head_stride
        k_w = tl.load(text_k_weight + offs_d).to(tl.float32)
        for start in range(0, length_text, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            k = load_rows(rows, text_row_stride, offs_n, length_text, DIM).to(tl.float32)
            v = load_rows(rows + text_part_stride, text_row_stride, offs_n, length_text, DIM)
            k = norm(k, k_w, eps, DIM).to(dtype)
            dq = _dq_tile(q, k, v, offs_n < length_text, do, lse, delta, dq)

        # Loaded again: held over the loops, these tiles would cost registers.
        raw = load_rows(qkv + first * row_stride + head * head_stride, row_stride, offs_m, length, DIM).to(
            tl.float32
        )
        cos_m, sin_m = tile_angles(cos, sin, positions + first, offs_m, mask, DIM, DIM)
        dq, dw = norm_backward(raw, rotate(dq * scale, cos_m, -sin_m), q_w, eps, DIM)
        dq_ptrs = dqkv + ((first + offs_m) * (3 * NUM_HEADS) + head)[:, None] * DIM + offs_d[None, :]
        tl.store(dq_ptrs, dq, mask=mask[:, None])
        tl.store(partial + program * DIM + offs_d, tl.sum(dw, axis=0))

    @triton.jit(do_not_specialize=["image_blocks"])
    def rope_attention_bwd_dkv_kernel(
        do_ptr,
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
        lse_ptr,
        delta_ptr,
        dqkv,
        dtext_kv,
        partial,
        do_row_stride,
        do_head_stride,
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
        offs_d = tl.arange(0, DIM)
        program = (tl.program_id(2).to(tl.int64) * NUM_HEADS + head) * tl.num_programs(0) + tl.program_id(0)
        if tl.program_id(0) < image_blocks:
            block, keys = tl.program_id(0), length
            turned = length
            source, stride, part = (
                qkv + first * row_stride + head * head_stride + part_stride,
                row_stride,
                part_stride,
            )
            target = dqkv + (first * (3 * NUM_HEADS) + NUM_HEADS + head) * DIM
            target_stride = 3 * NUM_HEADS * DIM
            k_w = tl.load(k_weight + offs_d).to(tl.float32)
        else:
            block, keys, turned = tl.program_id(0) - image_blocks, length_text, 0
            source = text_kv + first_text * text_row_stride + head * text_head_stride
            stride, part = text_row_stride, text_part_stride
            target = dtext_kv + (first_text * (2 * NUM_HEADS) + head) * DIM
            target_stride = 2 * NUM_HEADS * DIM
            k_w = tl.load(text_k_weight + offs_d).to(tl.float32)
        if block * BLOCK_N >= keys:
            tl.store(partial + program * DIM + offs_d, tl.zeros((DIM,), tl.float32))
            return
        dtype = qkv.dtype.element_ty
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = offs_n < keys
        cos_n, sin_n = tile_angles(cos, sin, positions + first, offs_n, offs_n < turned, DIM, DIM)
        raw = load_rows(source, stride, offs_n, keys, DIM).to(tl.float32)
        k = rotate(norm(raw, k_w, eps, DIM), cos_n, sin_n).to(dtype)
        v = load_rows(source + part, stride, offs_n, keys, DIM)
        dk = tl.zeros((BLOCK_N, DIM), tl.float32)
        dv = tl.zeros((BLOCK_N, DIM), tl.float32)

        rows = qkv + first * row_stride + head * head_stride
        do_rows = do_ptr + first * do_row_stride + head * do_head_stride
        q_w = tl.load(q_weight + offs_d).to(tl.float32) * (scale * LOG2_E)
        for start in range(0, length, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            cos_m, sin_m = tile_angles(cos, sin, positions + first, offs_m, offs_m < length, DIM, DIM)
            q = load_rows(rows, row_stride, offs_m, length, DIM).to(tl.float32)
            do = load_rows(do_rows, do_row_stride, offs_m, length, DIM)
            offs_row = head * lse_stride + first + offs_m
            lse = tl.load(lse_ptr + offs_row, mask=offs_m < length, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + offs_row, mask=offs_m < length, other=0.0)
            q = rotate(norm(q, q_w, eps, DIM), cos_m, sin_m).to(dtype)
            # Queries and keys that do not exist need no mask: the former have zero gradients, and what the
            # latter sum up stays in their own rows.
            # Transposed: a row of p, dp and ds is a key here, so that dk and dv are plain products.
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") - lse[None, :])
            dv = tl.dot(p.to(dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")

        dk_ptrs = target + offs_n.to(tl.int64)[:, None] * target_stride + offs_d[None, :]
        tl.store(dk_ptrs + NUM_HEADS * DIM, dv, mask=mask[:, None])
        raw = load_rows(source, stride, offs_n, keys, DIM).to(tl.float32)
        cos_n, sin_n = tile_angles(cos, sin, positions + first, offs_n, offs_n < turned, DIM, DIM)
        dk = tl.where(mask[:, None], dk * LN_2, 0.0)
        dk, dw = norm_backward(raw, rotate(dk, cos_n, -sin_n), k_w, eps, DIM)
        tl.store(dk_ptrs, dk, mask=mask[:, None])
        tl.store(partial + program * DIM + offs_d, tl.sum(dw, axis=0))


def configuration(qkv: Tensor) -> Configuration:
    """The tiles for this dtype, head_dim and GPU."""
    if INTERPRETING:
        return _INTERPRETED
    if qkv.dtype == torch.float32:
        return _SINGLE
    # Hopper, Blackwell's data centre chips (100, 103), and all others, whose tensor cores are Ampere's.
    chip = {9: 90, 10: 100}.get(capability(qkv) // 10, 80)
    return _CONFIGURATIONS[max(qkv.shape[3], 64), chip]


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
        **tiles.constants,
    )
    return out, lse


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

    tiles = configuration(qkv).dq
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
        **tiles.constants,
    )
    sums = [partial.sum((0, 1, 2))]

    tiles = configuration(qkv).dkv
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
        **tiles.constants,
    )
    sums += [partial[:, :, :image_blocks].sum((0, 1, 2)), partial[:, :, image_blocks:].sum((0, 1, 2))]
    return grad_qkv, grad_text, *(g.to(w.dtype) for g, w in zip(sums, weights, strict=True))


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


def _forward_launches() -> list[Launch]:
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


def _backward_launches() -> list[Launch]:
    launches = []
    for forward in _forward_launches():
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


def configurations() -> list[Launch]:
    """The launches of training, for ahead-of-time compilation."""
    return [*_forward_launches(), *_backward_launches()]
