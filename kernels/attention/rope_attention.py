"""Attention of each sample's image queries over its own image and text keys, with qk-norm and 2D RoPE.

    q, k      = RoPE(RMSNorm(q), positions), RoPE(RMSNorm(k), positions)     per head, image tokens
    k_text    = RMSNorm(k_text)                                               no position
    out       = softmax(scale * q [k, k_text]^T) [v, v_text]

RMSNorm: Zhang & Sennrich, arXiv 1910.07467, applied to queries and keys as in arXiv 2302.05442. RoPE: Su et
al., arXiv 2104.09864, interleaved pairs (2i, 2i+1). Text keys carry no position, so their order, and
where padding was, do not matter: padded rows are simply absent and no mask exists. Norms, RoPE and softmax
are FP32.

Two designs stand behind one function. `attention/prologue.py` writes normalised, rotated and joined q, k, v
in one pass, and a library's attention reads them: the fastest where cuDNN or FlashAttention-3 runs.
`attention/fused_attention.py` normalises and rotates inside the attention kernels, so that nothing but the
output and one number a row is written or saved: the least memory, about q, k and v of every block less.
"""

from typing import Literal

import torch
from torch import Tensor

from millrace.kernels.attention import backends
from millrace.kernels.attention.backends import Inputs
from millrace.kernels.attention.fused_attention import fused_attention
from millrace.kernels.support.checks import expect_offsets, expect_shape
from millrace.kernels.support.choice import measured_choice, warn_unusable
from millrace.kernels.support.packed import is_uniform, sample_slices, widen

Backend = Literal["auto", "reference", "triton", "sdpa", "varlen", "flash_attn", "xformers"]


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
        backend: `reference` spells the equations out; `triton` is the fused operator (kernels on CUDA, plain
            PyTorch on the CPU). The others run the prologue, then `sdpa` torch's scaled_dot_product_attention
            (cuDNN first), `varlen` torch's packed FlashAttention (CUDA, 16 bit), `flash_attn` and `xformers`
            those packages. `auto` takes what `chosen_backend` says.

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

    if backend == "auto":
        backend = chosen_backend(qkv, text_kv, cu_seqlens, max_seqlen, max_seqlen_text)
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of: auto, {', '.join(_BACKENDS)}")
    inputs = Inputs(
        qkv,
        text_kv.to(qkv.dtype),
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
    return _BACKENDS[backend](inputs, eps, dim**-0.5 if scale is None else scale)


def chosen_backend(
    qkv: Tensor, text_kv: Tensor, cu_seqlens: Tensor, max_seqlen: int, max_seqlen_text: int
) -> str:
    """What `auto` takes for these arguments of `rope_attention`.

    On CUDA in 16 bit the fastest measured on this GPU for the shape class (`rope_attention_uniform` where all
    samples have as many image and as many text tokens, else `rope_attention_ragged`), where `measured.json`
    names one that can run here; the fused kernels only at a head_dim of at most 64 and for at most 512
    queries a sample. Else `sdpa` for uniform batches, and for ragged ones, without padding, an installed
    FlashAttention-4 or -3 on Hopper and data centre Blackwell, or `varlen`. Everything else goes to `sdpa`.
    """
    samples = cu_seqlens.shape[0] - 1
    images = is_uniform(qkv.shape[0], samples, max_seqlen)
    uniform = images and is_uniform(text_kv.shape[0], samples, max_seqlen_text)
    return _choice(uniform, qkv.device, qkv.dtype, qkv.shape[3], max_seqlen)[0]


def describe_choice(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """One line for people: what `auto` takes on a device for a dtype and head_dim, whether measured on this
    GPU, and what to install for a faster one."""
    if not _has_choice(device, dtype):
        return f"sdpa (no other backend for {dtype} on {device.type})".replace("torch.", "")
    index = device.index or 0
    parts, taken = [], set()
    for kind in ("uniform", "ragged"):
        spans = [_choice(kind == "uniform", device, dtype, dim, n) for n in (1, backends.MOST_QUERIES + 1)]
        names = [
            f"{name} ({backends.implementation(name, index)}; {'measured' if measured else 'not measured'})"
            for name, measured in spans
        ]
        taken.update(name for name, _ in spans)
        short = f"{names[0]} up to {backends.MOST_QUERIES} queries and " if names[0] != names[1] else ""
        parts.append(f"{short}{names[1]} for {kind} batches")
    line = ", ".join(parts)
    if "varlen" in taken and backends.gains_from_newer_flash_attention(index):
        line += (
            f"; faster for ragged batches on this GPU is FlashAttention-4: {backends.INSTALL_FLASH_ATTENTION}"
        )
    return line


def _has_choice(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _choice(
    uniform: bool, device: torch.device, dtype: torch.dtype, dim: int, queries: int
) -> tuple[str, bool]:
    """Backend, and whether `measured.json` names it."""
    if not _has_choice(device, dtype):
        return "sdpa", False
    kind = "rope_attention_uniform" if uniform else "rope_attention_ragged"
    index = device.index or 0
    measured = _measured(kind, index)
    if measured is not None:
        reason = backends.refusal(measured, dim, queries)
        if reason is None:
            return measured, True
        _refuse(kind, index, measured, reason)
    return backends.default(uniform, index, dim), False


# Constants for Dynamo, which traces neither files nor logs; head_dim and spans stay out, for they may be
# symbolic.
@torch.compiler.assume_constant_result
def _measured(shape_class: str, device: int) -> str | None:
    return measured_choice(shape_class, device, backends.obstacles(device))


@torch.compiler.assume_constant_result
def _refuse(shape_class: str, device: int, backend: str, reason: str) -> None:
    warn_unusable(shape_class, device, backend, reason)


def reference(inputs: Inputs, eps: float, scale: float) -> Tensor:
    """The equations in plain PyTorch, sample by sample; reads the lengths, so it waits for a CUDA device."""
    dtype = inputs.qkv.dtype
    angles = (table.index_select(0, inputs.positions)[:, None] for table in (inputs.cos, inputs.sin))
    cos, sin = (x.to(torch.promote_types(dtype, torch.float32)) for x in angles)
    q, k = (
        _rotate(_rms_norm(inputs.qkv[:, i], weight, eps), cos, sin).to(dtype)
        for i, weight in enumerate((inputs.q_weight, inputs.k_weight))
    )
    text_k = _rms_norm(inputs.text_kv[:, 0], inputs.text_k_weight, eps).to(dtype)
    rows = zip(sample_slices(inputs.cu_seqlens), sample_slices(inputs.cu_seqlens_text), strict=True)
    outputs = [
        _attend(
            q[image],
            torch.cat((k[image], text_k[text])),
            torch.cat((inputs.qkv[image, 2], inputs.text_kv[text, 1])),
            scale,
        )
        for image, text in rows
    ]
    return torch.cat(outputs)


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
    logits = torch.einsum("nhd,mhd->hnm", widen(q), widen(k)) * scale
    return torch.einsum("hnm,mhd->nhd", logits.softmax(-1), widen(v)).to(q.dtype)


def _fused(inputs: Inputs, eps: float, scale: float) -> Tensor:
    return fused_attention(*inputs, eps, scale)


_BACKENDS = {
    "reference": reference,
    "triton": _fused,
    "sdpa": backends.sdpa,
    "varlen": backends.varlen,
    "flash_attn": backends.flash_attention,
    "xformers": backends.xformers,
}
