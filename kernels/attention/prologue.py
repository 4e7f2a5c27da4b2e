"""Prologue of attention: qk-norm, RoPE and the joining of image and text keys, in one pass over the data.

    q, k   = RoPE(RMSNorm(q)), RoPE(RMSNorm(k))      per head, image tokens, at their positions
    k_text = RMSNorm(k_text)                          text tokens carry no position
    keys   = [k, k_text],  values = [v, v_text]       of each sample, image rows first

Keys and values are written where attention wants them, in one of the layouts of `layout.py`.

Saved for backward: the inputs alone, which the projections' outputs keep alive anyway. The norms' factors
are recomputed: one row's sum of squares costs less than writing and reading it back.

The kernels: a program owns a few heads of ROWS image tokens, or of ROWS text tokens, of one sample. The
offsets of the sample say where its rows come from and where they go, so nothing is searched, and no index is
read. Of n image and m text tokens where N and M have room, the free rows of the padded layout (n + m to
N + M) are filled by slots that have no token: image slot i with row M + i, text slot j with row n + j.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.attention.layout import Joint, PaddedRows, joint_shapes, packed_rows
from millrace.kernels.support.compilation import Launch, meta, multiprocessors
from millrace.kernels.support.packed import sample_slices, unit_stride
from millrace.kernels.support.registration import HAS_TRITON, register
from millrace.kernels.support.rows import fold

if HAS_TRITON:
    import triton
    import triton.language as tl

    from millrace.kernels.attention.tiles import norm, norm_backward, rotate, tile_angles, training_inputs


TILE = 2048
"""Elements of a (ROWS, D) tile: 16 a thread for four warps."""


PROGRAMS = 12
"""For each multiprocessor: four waves of the three that run at a time."""


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
) -> tuple[Tensor, Tensor, Tensor]:
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
    dtype = _widest((q_weight, k_weight, text_k_weight))
    return grad_qkv, grad_text, torch.stack(grad_weights).to(dtype)


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


if HAS_TRITON:

    @triton.jit
    def _sample(cu_seqlens, cu_seqlens_text, bound, bound_text, blocks, PADDED: tl.constexpr):
        """Offsets and lengths of this program's sample, and the rows where its queries and its keys begin."""
        sample = (tl.program_id(0) // blocks).to(tl.int64)
        first = tl.load(cu_seqlens + sample).to(tl.int64)
        length = tl.load(cu_seqlens + sample + 1).to(tl.int64) - first
        first_text = tl.load(cu_seqlens_text + sample).to(tl.int64)
        length_text = tl.load(cu_seqlens_text + sample + 1).to(tl.int64) - first_text
        if PADDED:
            queries, keys = sample * bound, sample * (bound + bound_text)
        else:
            queries, keys = first, first + first_text
        return first, length, first_text, length_text, queries, keys

    @triton.jit(do_not_specialize=["bound", "bound_text", "blocks", "image_blocks", "group"])
    def rope_attention_prologue_fwd_kernel(
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
        q,
        k,
        v,
        row_stride,
        part_stride,
        head_stride,
        text_row_stride,
        text_part_stride,
        text_head_stride,
        bound,
        bound_text,
        blocks,
        image_blocks,
        group,
        eps,
        NUM_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        PADDED: tl.constexpr,
    ):
        first, length, first_text, length_text, queries, keys = _sample(
            cu_seqlens, cu_seqlens_text, bound, bound_text, blocks, PADDED
        )
        block = tl.program_id(0) % blocks
        first_head = tl.program_id(1) * group
        end_head = tl.minimum(first_head + group, NUM_HEADS)
        d = tl.arange(0, BLOCK)
        inside = d < DIM
        if block < image_blocks:
            slot = block * ROWS + tl.arange(0, ROWS)
            owned = (slot < length)[:, None] & inside[None, :]
            written = ((slot < bound)[:, None] & inside[None, :]) if PADDED else owned
            q_gain = tl.load(q_weight + d, mask=inside, other=0.0).to(tl.float32)
            k_gain = tl.load(k_weight + d, mask=inside, other=0.0).to(tl.float32)
            cosine, sine = tile_angles(cos, sin, positions + first, slot, slot < length, DIM, BLOCK)
            source = qkv + (first + slot)[:, None] * row_stride + d[None, :]
            to_query = (queries + slot)[:, None] * (NUM_HEADS * DIM) + d[None, :]
            row = keys + tl.where(slot < length, slot, bound_text + slot)
            to_key = row[:, None] * (NUM_HEADS * DIM) + d[None, :]
            for head in range(first_head, end_head):
                at = source + head * head_stride
                query = tl.load(at, mask=owned, other=0.0).to(tl.float32)
                key = tl.load(at + part_stride, mask=owned, other=0.0).to(tl.float32)
                value = tl.load(at + 2 * part_stride, mask=owned, other=0.0)
                query = rotate(norm(query, q_gain, eps, DIM), cosine, sine)
                key = rotate(norm(key, k_gain, eps, DIM), cosine, sine)
                tl.store(q + to_query + head * DIM, query, mask=written)
                tl.store(k + to_key + head * DIM, key, mask=written)
                tl.store(v + to_key + head * DIM, value, mask=written)
        else:
            slot = (block - image_blocks) * ROWS + tl.arange(0, ROWS)
            owned = (slot < length_text)[:, None] & inside[None, :]
            written = ((slot < bound_text)[:, None] & inside[None, :]) if PADDED else owned
            gain = tl.load(text_k_weight + d, mask=inside, other=0.0).to(tl.float32)
            source = text_kv + (first_text + slot)[:, None] * text_row_stride + d[None, :]
            to_key = (keys + length + slot)[:, None] * (NUM_HEADS * DIM) + d[None, :]
            for head in range(first_head, end_head):
                at = source + head * text_head_stride
                key = tl.load(at, mask=owned, other=0.0).to(tl.float32)
                value = tl.load(at + text_part_stride, mask=owned, other=0.0)
                key = norm(key, gain, eps, DIM)
                tl.store(k + to_key + head * DIM, key, mask=written)
                tl.store(v + to_key + head * DIM, value, mask=written)

    @triton.jit(
        do_not_specialize=["bound", "bound_text", "blocks", "image_blocks", "group", "partial_stride"]
    )
    def rope_attention_prologue_bwd_kernel(
        grad_q,
        grad_k,
        grad_v,
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
        grad_qkv,
        grad_text,
        partial,
        row_stride,
        part_stride,
        head_stride,
        text_row_stride,
        text_part_stride,
        text_head_stride,
        q_row_stride,
        q_head_stride,
        k_row_stride,
        k_head_stride,
        v_row_stride,
        v_head_stride,
        partial_stride,
        bound,
        bound_text,
        blocks,
        image_blocks,
        group,
        eps,
        NUM_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        PADDED: tl.constexpr,
    ):
        first, length, first_text, length_text, queries, keys = _sample(
            cu_seqlens, cu_seqlens_text, bound, bound_text, blocks, PADDED
        )
        block = tl.program_id(0) % blocks
        first_head = tl.program_id(1) * group
        end_head = tl.minimum(first_head + group, NUM_HEADS)
        d = tl.arange(0, BLOCK)
        inside = d < DIM
        # Sums stay spread over the threads until the last head: a thread adds its rows, half a tile apart.
        HALF: tl.constexpr = max(ROWS // 2, 1)
        if block < image_blocks:
            q_sum = tl.zeros((HALF, BLOCK), tl.float32)
            k_sum = tl.zeros((HALF, BLOCK), tl.float32)
            slot = block * ROWS + tl.arange(0, ROWS)
            owned = (slot < length)[:, None] & inside[None, :]
            q_gain = tl.load(q_weight + d, mask=inside, other=0.0).to(tl.float32)
            k_gain = tl.load(k_weight + d, mask=inside, other=0.0).to(tl.float32)
            cosine, sine = tile_angles(cos, sin, positions + first, slot, slot < length, DIM, BLOCK)
            source = qkv + (first + slot)[:, None] * row_stride + d[None, :]
            target = grad_qkv + (first + slot)[:, None] * (3 * NUM_HEADS * DIM) + d[None, :]
            from_query = grad_q + (queries + slot)[:, None] * q_row_stride + d[None, :]
            from_key = grad_k + (keys + slot)[:, None] * k_row_stride + d[None, :]
            from_value = grad_v + (keys + slot)[:, None] * v_row_stride + d[None, :]
            for head in range(first_head, end_head):
                x = tl.load(source + head * head_stride, mask=owned, other=0.0).to(tl.float32)
                grad = tl.load(from_query + head * q_head_stride, mask=owned, other=0.0).to(tl.float32)
                grad, parts = norm_backward(x, rotate(grad, cosine, -sine), q_gain, eps, DIM)
                q_sum += tl.sum(tl.reshape(parts, (ROWS // HALF, HALF, BLOCK)), axis=0)
                tl.store(target + head * DIM, grad, mask=owned)
                x = tl.load(source + part_stride + head * head_stride, mask=owned, other=0.0).to(tl.float32)
                grad = tl.load(from_key + head * k_head_stride, mask=owned, other=0.0).to(tl.float32)
                grad, parts = norm_backward(x, rotate(grad, cosine, -sine), k_gain, eps, DIM)
                k_sum += tl.sum(tl.reshape(parts, (ROWS // HALF, HALF, BLOCK)), axis=0)
                tl.store(target + (NUM_HEADS + head) * DIM, grad, mask=owned)
                grad = tl.load(from_value + head * v_head_stride, mask=owned, other=0.0)
                tl.store(target + (2 * NUM_HEADS + head) * DIM, grad, mask=owned)
            program = (tl.program_id(0) // blocks * image_blocks + block) * tl.num_programs(
                1
            ) + tl.program_id(1)
            at = partial + program.to(tl.int64) * DIM + d
            tl.store(at, tl.sum(q_sum, axis=0), mask=inside)
            tl.store(at + partial_stride, tl.sum(k_sum, axis=0), mask=inside)
        else:
            block -= image_blocks
            text_sum = tl.zeros((HALF, BLOCK), tl.float32)
            slot = block * ROWS + tl.arange(0, ROWS)
            owned = (slot < length_text)[:, None] & inside[None, :]
            attended = owned & (length > 0)  # no query has read the text of an empty sample
            gain = tl.load(text_k_weight + d, mask=inside, other=0.0).to(tl.float32)
            source = text_kv + (first_text + slot)[:, None] * text_row_stride + d[None, :]
            target = grad_text + (first_text + slot)[:, None] * (2 * NUM_HEADS * DIM) + d[None, :]
            from_key = grad_k + (keys + length + slot)[:, None] * k_row_stride + d[None, :]
            from_value = grad_v + (keys + length + slot)[:, None] * v_row_stride + d[None, :]
            for head in range(first_head, end_head):
                x = tl.load(source + head * text_head_stride, mask=owned, other=0.0).to(tl.float32)
                grad = tl.load(from_key + head * k_head_stride, mask=attended, other=0.0).to(tl.float32)
                grad, parts = norm_backward(x, grad, gain, eps, DIM)
                text_sum += tl.sum(tl.reshape(parts, (ROWS // HALF, HALF, BLOCK)), axis=0)
                tl.store(target + head * DIM, grad, mask=owned)
                grad = tl.load(from_value + head * v_head_stride, mask=attended, other=0.0)
                tl.store(target + (NUM_HEADS + head) * DIM, grad, mask=owned)
            program = tl.program_id(0) // blocks * (blocks - image_blocks) + block
            program = program * tl.num_programs(1) + tl.program_id(1)
            at = partial + 2 * partial_stride + program.to(tl.int64) * DIM + d
            tl.store(at, tl.sum(text_sum, axis=0), mask=inside)


def heads_of_program(qkv: Tensor, tiles: int) -> int:
    """So many that the programs run in a few waves: their heads share a tile of the RoPE table, and a sum."""
    heads = qkv.shape[2]
    parts = min(max(-(-PROGRAMS * multiprocessors(qkv) // max(tiles, 1)), 1), heads)
    return -(-heads // parts)


def _launch(
    qkv: Tensor, cu_seqlens: Tensor, bound: int, bound_text: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid, and the arguments that both kernels end with."""
    _, _, heads, dim = qkv.shape
    block = triton.next_power_of_2(dim)
    rows = max(TILE // block, 1)
    image_blocks = triton.cdiv(bound, rows)
    blocks = image_blocks + triton.cdiv(bound_text, rows)
    tiles = (cu_seqlens.shape[0] - 1) * blocks
    group = heads_of_program(qkv, tiles)
    ends = {
        "bound": bound,
        "bound_text": bound_text,
        "blocks": blocks,
        "image_blocks": image_blocks,
        "group": group,
        "NUM_HEADS": heads,
        "DIM": dim,
        "BLOCK": block,
        "ROWS": rows,
        "num_warps": 4,
    }
    return (tiles, triton.cdiv(heads, group)), ends


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
    padded: bool,
    eps: float,
) -> Joint:
    """Launch the forward kernel."""
    qkv, text_kv = unit_stride(qkv), unit_stride(text_kv)
    shape, joint_shape = joint_shapes(qkv, text_kv, cu_seqlens, max_seqlen, max_seqlen_text, padded)
    q, k, v = (torch.empty(s, dtype=qkv.dtype, device=qkv.device) for s in (shape, joint_shape, joint_shape))
    grid, ends = _launch(qkv, cu_seqlens, max_seqlen, max_seqlen_text)
    rope_attention_prologue_fwd_kernel[grid](
        qkv,
        text_kv,
        *(x.contiguous() for x in (q_weight, k_weight, text_k_weight, cos, sin, positions)),
        cu_seqlens,
        cu_seqlens_text,
        q,
        k,
        v,
        *qkv.stride()[:3],
        *text_kv.stride()[:3],
        eps=eps,
        PADDED=padded,
        **ends,
    )
    return q, k, v


def backward_triton(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel, then add up the programs' sums for the weights."""
    qkv, text_kv = unit_stride(qkv), unit_stride(text_kv)
    grads = [_rows(grad) for grad in (grad_q, grad_k, grad_v)]
    grad_qkv, grad_text = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (qkv, text_kv))
    grid, ends = _launch(qkv, cu_seqlens, max_seqlen, max_seqlen_text)
    weights = q_weight, k_weight, text_k_weight
    dtype, samples = _widest(weights), cu_seqlens.shape[0] - 1
    programs = [
        samples * part * grid[1] for part in (ends["image_blocks"], ends["blocks"] - ends["image_blocks"])
    ]
    partial = torch.empty(3, max(programs), qkv.shape[3], dtype=torch.float32, device=qkv.device)
    sums = torch.empty(3, qkv.shape[3], dtype=dtype, device=qkv.device)
    rope_attention_prologue_bwd_kernel[grid](
        *grads,
        qkv,
        text_kv,
        *(x.contiguous() for x in (*weights, cos, sin, positions)),
        cu_seqlens,
        cu_seqlens_text,
        grad_qkv,
        grad_text,
        partial,
        *qkv.stride()[:3],
        *text_kv.stride()[:3],
        *(stride for grad in grads for stride in grad.stride()[:2]),
        partial.stride(0),
        eps=eps,
        PADDED=padded,
        **ends,
    )
    fold(partial, sums, (programs[0], programs[1]))
    return grad_qkv, grad_text, sums


def _rows(grad: Tensor) -> Tensor:
    """(rows, H, D) of a packed or padded gradient; a view where the attention left rows of equal distance."""
    return unit_stride(grad.flatten(0, 1) if grad.dim() == 4 else grad)


def _forward_fake(qkv: Tensor, text_kv: Tensor, *rest: Any) -> Joint:
    *_, cu_seqlens, _, max_seqlen, max_seqlen_text, padded, _ = rest
    shape, joint_shape = joint_shapes(qkv, text_kv, cu_seqlens, max_seqlen, max_seqlen_text, padded)
    return qkv.new_empty(shape), qkv.new_empty(joint_shape), qkv.new_empty(joint_shape)


def _backward_fake(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:2])
    weights = inputs[2:5]
    return *grads, weights[0].new_empty(3, len(weights[0]), dtype=_widest(weights))


def _widest(weights: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (weight.dtype for weight in weights))


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
    "-> (Tensor grad_qkv, Tensor grad_text_kv, Tensor grad_weights)",
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
        saved = ctx.saved_tensors
        *gradients, of_weights = _backward(grad_q, grad_k, grad_v, *saved, *ctx.settings)
        weights = (g.to(w.dtype) for g, w in zip(of_weights, saved[2:5], strict=True))
        return *gradients, *weights, *(None,) * (5 + len(ctx.settings))


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


def configurations() -> list[Launch]:
    """The launches of training, for ahead-of-time compilation: with masters in FP32 and in BF16, and of the
    FP32 model that is made for a CPU, which has five heads."""
    single, bf16 = torch.float32, torch.bfloat16
    dtypes = ((bf16, single), (bf16, bf16), (torch.float16, single), (single, single))
    shapes = [(dim, 28, *pair) for dim in (64, 128) for pair in dtypes]
    launches = []
    for dim, heads, dtype, weights in [*shapes, (32, 5, single, single)]:
        inputs = training_inputs(dim, dtype, heads, weights)
        names = " with weights in ".join(str(one).removeprefix("torch.") for one in (dtype, weights))
        for padded in (False, True):
            arguments = *inputs, 1024, 256, padded, 1e-6
            joint = joint_shapes(inputs[0], inputs[1], inputs[8], 1024, 256, padded)
            grads = (meta(*shape, dtype=dtype) for shape in (joint[0], joint[1], joint[1]))
            kind = f"head_dim {dim}, {names}, {'padded' if padded else 'packed'}"
            launches += [
                Launch(f"prologue forward, {kind}", forward_triton, arguments),
                Launch(f"prologue backward, {kind}", backward_triton, (*grads, *arguments)),
            ]
    return launches
