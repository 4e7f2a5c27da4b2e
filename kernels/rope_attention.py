"""Attention of each sample's image queries over its own image and text keys, with qk-norm and 2D RoPE.

    q, k      = RoPE(RMSNorm(q), positions), RoPE(RMSNorm(k), positions)     per head, image tokens
    k_text    = RMSNorm(k_text)                                               no position
    out       = softmax(scale * q [k, k_text]^T) [v, v_text]

RMSNorm: Zhang & Sennrich, arXiv 1910.07467, applied to queries and keys as in arXiv 2302.05442. RoPE: Su et
al., arXiv 2104.09864, interleaved pairs (2i, 2i+1). Text keys carry no position, so their order, and
where padding was, do not matter: padded rows are simply absent and no mask exists. Norms, RoPE and softmax
are FP32.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.checks import expect_offsets, expect_shape
from millrace.kernels.packed import is_uniform, sample_of_row, widen

Backend = Literal["auto", "reference", "sdpa", "varlen"]
Packed = tuple[Tensor, ...]
"""(q, k, v) of the image tokens or (k, v) of the text tokens, each (rows, H, D), normed and rotated."""


class Offsets(NamedTuple):
    """Where the samples lie in the packed rows."""

    image: Tensor
    text: Tensor
    longest: int
    longest_text: int


def rope_attention(
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
    eps: float = 1e-6,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Joint attention over packed tokens.

    Args:
        qkv: (T, 3, H, D), queries, keys and values of the image tokens.
        text_kv: (S, 2, H, D), keys and values of the text tokens; any strides.
        q_weight, k_weight, text_k_weight: (D,), scales of the RMS norms.
        cos, sin: (P, D/2) FP32, RoPE table; row `positions[i]` belongs to image token i.
        positions: (T,) int64.
        cu_seqlens, cu_seqlens_text: (B+1,) int32.
        max_seqlen, max_seqlen_text: upper bounds of the sample lengths.
        eps: of the RMS norms.
        scale: of the logits, default 1 / sqrt(D).
        backend: `reference` spells the equations out; `sdpa` is torch's scaled_dot_product_attention, dense
            where the batch is uniform and sample by sample elsewhere; `varlen` is torch's packed
            FlashAttention (CUDA, 16 bit). `auto` takes dense `sdpa` for uniform batches, else `varlen` where
            it runs, else `sdpa`.

    Returns:
        (T, H, D) in the dtype of qkv.
    """
    samples = expect_offsets("cu_seqlens", cu_seqlens)
    if expect_offsets("cu_seqlens_text", cu_seqlens_text) != samples:
        raise ValueError(f"cu_seqlens_text has {cu_seqlens_text.numel()} entries, expected {samples + 1}")
    expect_shape("qkv", qkv, "T", 3, "H", "D")
    total, _, heads, dim = qkv.shape
    expect_shape("text_kv", text_kv, "S", 2, heads, dim)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight), ("text_k_weight", text_k_weight)):
        expect_shape(name, weight, dim)
    expect_shape("cos", cos, "P", dim // 2)
    expect_shape("sin", sin, "P", dim // 2)
    expect_shape("positions", positions, total)

    dense = is_uniform(total, samples, max_seqlen) and is_uniform(len(text_kv), samples, max_seqlen_text)
    if backend == "auto":
        backend = "sdpa" if dense or not _varlen_runs(qkv) else "varlen"
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of: auto, {', '.join(_BACKENDS)}")

    rotation = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    q = _rotate(_rms_norm(qkv[:, 0], q_weight, eps), *rotation).to(qkv.dtype)
    k = _rotate(_rms_norm(qkv[:, 1], k_weight, eps), *rotation).to(qkv.dtype)
    text_k = _rms_norm(text_kv[:, 0], text_k_weight, eps).to(qkv.dtype)
    text_v = text_kv[:, 1].to(qkv.dtype)
    scale = dim**-0.5 if scale is None else scale
    image, text = (q, k, qkv[:, 2]), (text_k, text_v)
    if backend == "sdpa" and dense:
        return _dense_sdpa(image, text, samples, scale)
    offsets = Offsets(cu_seqlens, cu_seqlens_text, max_seqlen, max_seqlen_text)
    return _BACKENDS[backend](image, text, offsets, scale)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over head_dim of (rows, H, D), FP32."""
    x = widen(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * widen(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]) of (T, H, D) by the angles of (T, 1, D/2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of one sample, (N, H, D) over (M, H, D), written out in FP32 (FP64 stays FP64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("nhd,mhd->hnm", q.to(wide), k.to(wide)) * scale
    return torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v.to(wide)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's attention of one sample, (N, H, D) over (M, H, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)


def _sample_by_sample(
    attend: Callable[..., Tensor], image: Packed, text: Packed, samples: Offsets, scale: float
) -> Tensor:
    """Run `attend` on each sample's slice; reads the lengths on the host, so it waits for a CUDA device."""
    lengths, text_lengths = samples.image.diff().tolist(), samples.text.diff().tolist()
    parts = zip(*(x.split(lengths) for x in image), *(x.split(text_lengths) for x in text), strict=True)
    outputs = [
        attend(q, torch.cat((k, text_k)), torch.cat((v, text_v)), scale) for q, k, v, text_k, text_v in parts
    ]
    return torch.cat(outputs)


def _dense_sdpa(image: Packed, text: Packed, samples: int, scale: float) -> Tensor:
    q, k, v, text_k, text_v = (
        x.reshape(samples, len(x) // samples, *x.shape[1:]).transpose(1, 2) for x in (*image, *text)
    )
    keys, values = torch.cat((k, text_k), 2), torch.cat((v, text_v), 2)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale).transpose(1, 2).flatten(0, 1)


def _varlen(image: Packed, text: Packed, samples: Offsets, scale: float) -> Tensor:
    """Packed FlashAttention. The keys of a sample must be adjacent: its image rows, then its text rows."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = image
    text_k, text_v = text
    if scale != q.shape[-1] ** -0.5:  # torch 2.11's varlen_attn has no scale argument
        q = q * (scale * q.shape[-1] ** 0.5)
    image_sample = sample_of_row(samples.image, len(k))
    text_sample = sample_of_row(samples.text, len(text_k))
    place = torch.cat(
        (
            torch.arange(len(k), device=k.device) + samples.text[image_sample],
            torch.arange(len(text_k), device=k.device) + samples.image[1:][text_sample],
        )
    )
    keys, values = torch.cat((k, text_k)), torch.cat((v, text_v))
    return varlen_attn(
        q,
        torch.empty_like(keys).index_copy(0, place, keys),
        torch.empty_like(values).index_copy(0, place, values),
        samples.image,
        samples.image + samples.text,
        samples.longest,
        samples.longest + samples.longest_text,
    )


def _varlen_runs(qkv: Tensor) -> bool:
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16)


_BACKENDS = {
    "reference": functools.partial(_sample_by_sample, _attend),
    "sdpa": functools.partial(_sample_by_sample, _sdpa),
    "varlen": _varlen,
}
