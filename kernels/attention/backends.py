"""Attention after the prologue: torch's SDPA and varlen attention, flash-attn, xformers.

Each function takes the inputs of `rope_attention` as `Inputs`, runs the prologue in the layout that its
library reads, and returns (T, H, D). None waits for a CUDA device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from millrace.kernels.attention.fused_attention import HEAD_DIMS
from millrace.kernels.attention.layout import key_mask
from millrace.kernels.attention.prologue import prologue
from millrace.kernels.support.choice import Obstacle
from millrace.kernels.support.packages import is_importable, is_installed
from millrace.kernels.support.packed import is_uniform, sample_of_row, sample_slices, widen
from millrace.kernels.support.registration import HAS_TRITON

SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch's own order puts FlashAttention-2 first on Hopper, where cuDNN is about twice as fast."""

MASKED_SDPA_ORDER = [backend for backend in SDPA_ORDER if backend != SDPBackend.CUDNN_ATTENTION]
"""With a mask cuDNN's gradient of the queries can be NaN on Hopper, where all logits of a row are far below
zero (pytorch issue 196678)."""


INSTALL_FLASH_ATTENTION = "pip install 'flash-attn-4>=4.0.0b36'"
"""A wheel: no compiler is needed. With a version, because pip skips pre-releases, and there are no others."""


MOST_QUERIES = 512
"""Of a sample, up to which `auto` may take the fused kernels. They normalise and rotate every key again for
each block of queries, so a library's kernels gain on them as spans grow. At head_dim 128 their tiles are
small, which takes more instructions for every product. Both by the compiled code; nothing is timed yet."""


_SMALL = 4096
"""Logits of a sample and head up to which one call for all samples beats a call for each on the CPU: with 32
samples of 16 queries and 28 keys it takes 0.43 of the time, with 4 of 64 and 256 they are equal."""


class Inputs(NamedTuple):
    """Arguments of `rope_attention`, in its order."""

    qkv: Tensor
    text_kv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    text_k_weight: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    cu_seqlens_text: Tensor
    max_seqlen: int
    max_seqlen_text: int

    @property
    def uniform_image(self) -> bool:
        """Whether every sample has max_seqlen image tokens."""
        return is_uniform(self.qkv.shape[0], self.cu_seqlens.shape[0] - 1, self.max_seqlen)

    @property
    def uniform_text(self) -> bool:
        """Whether every sample has max_seqlen_text text tokens."""
        return is_uniform(self.text_kv.shape[0], self.cu_seqlens.shape[0] - 1, self.max_seqlen_text)


def sdpa(inputs: Inputs, eps: float, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention.

    Uniform batches need no mask. Else the padded layout and a (B, 1, 1, keys) mask, never expanded; on the
    CPU sample by sample where skipping the padding saves more than one large call does.
    """
    if inputs.uniform_image and inputs.uniform_text:
        return _attend(*prologue(*inputs, padded=True, eps=eps), None, scale).flatten(0, 1)
    logits = inputs.max_seqlen * (inputs.max_seqlen + inputs.max_seqlen_text)
    on_host = inputs.qkv.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and logits > _SMALL:
        return _sample_by_sample(*prologue(*inputs, padded=False, eps=eps), inputs, scale)
    q, k, v = prologue(*inputs, padded=True, eps=eps)
    mask = key_mask(inputs.cu_seqlens, inputs.cu_seqlens_text, k.shape[1])
    out = _attend(q, k, v, mask, scale).flatten(0, 1)
    return out if inputs.uniform_image else out.index_select(0, _padded_rows(inputs))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, N, H, D) of queries (B, N, H, D) over keys and values (B, M, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        return _attend_on_host(q, k, v, mask, scale).transpose(1, 2)
    with sdpa_kernel(SDPA_ORDER if mask is None else MASKED_SDPA_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _attend_on_host(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, N, D), computed in FP32 or FP64: torch's flash attention for CPUs takes 9 times as long in BF16.
    With a mask it is also less exact than plain products."""
    wide = (widen(x) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        if mask is None or torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale).to(q.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale).to(q.dtype)


def _sample_by_sample(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, scale: float) -> Tensor:
    """One call a sample, on views of the packed rows; reads the lengths on the host."""
    offsets, joint = inputs.cu_seqlens, inputs.cu_seqlens + inputs.cu_seqlens_text
    lengths, joint_lengths = ([s.stop - s.start for s in sample_slices(x)] for x in (offsets, joint))
    parts = zip(q.split(lengths), k.split(joint_lengths), v.split(joint_lengths), strict=True)
    return torch.cat([_attend(*(x[None] for x in part), None, scale)[0] for part in parts if len(part[0])])


def _padded_rows(inputs: Inputs) -> Tensor:
    """(T,) row of each image token among the (B * max_seqlen) padded ones."""
    total = inputs.qkv.shape[0]
    sample = sample_of_row(inputs.cu_seqlens, total)
    free = sample * inputs.max_seqlen - inputs.cu_seqlens[sample]
    return torch.arange(total, device=free.device) + free


def varlen(inputs: Inputs, eps: float, scale: float) -> Tensor:
    """torch's packed FlashAttention: CUDA, BF16 or FP16."""
    from torch.nn.attention.varlen import varlen_attn

    joint = prologue(*inputs, padded=False, eps=eps)
    return varlen_attn(*joint, **_offsets(inputs, "cu_seq_q", "cu_seq_k", "max_q", "max_k"), scale=scale)


def _offsets(inputs: Inputs, *names: str) -> dict[str, Any]:
    """Offsets of queries and keys, and their longest, under the names that a library gives them."""
    keys = inputs.cu_seqlens + inputs.cu_seqlens_text
    longest = inputs.max_seqlen, inputs.max_seqlen + inputs.max_seqlen_text
    return dict(zip(names, (inputs.cu_seqlens, keys, *longest), strict=True))


def flash_attention(inputs: Inputs, eps: float, scale: float) -> Tensor:
    """The newest installed flash-attn: 4 (`flash_attn.cute`) or 3 on Hopper and later, else 2."""
    match _newest_flash_attention(inputs.qkv.get_device()):
        case "flash_attn.cute":
            flash_attn_varlen_func = _flash_attention_4
        case "flash_attn_interface":
            from flash_attn_interface import flash_attn_varlen_func
        case _:
            from flash_attn import flash_attn_varlen_func
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    out = flash_attn_varlen_func(
        *prologue(*inputs, padded=False, eps=eps),
        **_offsets(inputs, *names),
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[0] if isinstance(out, tuple) else out


@torch.compiler.disable
def _flash_attention_4(*joint: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Between the graphs of `torch.compile`: this is no operator, and compiles kernels itself when called."""
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func(*joint, **settings)


@torch.compiler.assume_constant_result
def _newest_flash_attention(device: int) -> str:
    capability = torch.cuda.get_device_capability(device) if device >= 0 else (0, 0)
    # flash-attn 2 carries a folder `cute` too, of an early version 4 with other arguments.
    if capability >= (9, 0) and is_installed("flash-attn-4") and is_importable("flash_attn.cute"):
        return "flash_attn.cute"
    if capability[0] == 9 and is_importable("flash_attn_interface"):
        return "flash_attn_interface"
    if is_importable("flash_attn.flash_attn_interface"):
        return "flash_attn"
    raise ImportError(
        "attention backend 'flash_attn' needs flash-attn: pip install flash-attn --no-build-isolation "
        f"(or, for Hopper and later, without a compiler: {INSTALL_FLASH_ATTENTION})"
    )


@torch.compiler.assume_constant_result
def has_newer_flash_attention(device: int) -> bool:
    """Whether FlashAttention-4 or -3, faster than torch's own version 2, is there for this CUDA device."""
    if not gains_from_newer_flash_attention(device):
        return False
    try:
        return _newest_flash_attention(device) != "flash_attn"
    except ImportError:
        return False


def gains_from_newer_flash_attention(device: int) -> bool:
    """Whether a CUDA device is a Hopper or a data centre Blackwell, which FlashAttention-4 is written for."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def implementation(backend: str, device: int) -> str:
    """What a backend that can run here is on a CUDA device, for people."""
    match backend:
        case "sdpa":
            return "torch's SDPA, cuDNN first"
        case "varlen":
            return "torch's FlashAttention-2"
        case "triton":
            return "own fused kernels"
        case "flash_attn":
            versions = {"flash_attn.cute": 4, "flash_attn_interface": 3, "flash_attn": 2}
            return f"FlashAttention-{versions[_newest_flash_attention(device)]}"
    return backend


def xformers(inputs: Inputs, eps: float, scale: float) -> Tensor:
    """xformers' memory-efficient attention over blocks of unequal length."""
    _require_xformers()
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    offsets = _offsets(inputs, "q", "k", "longest_q", "longest_k")
    q, k, v = prologue(*inputs, padded=False, eps=eps)
    # Built by hand: xformers makes these from lists of lengths on the host, which its kernels do not read.
    blocks = [
        _SeqLenInfo(
            seqstart=offsets[name],
            max_seqlen=offsets[f"longest_{name}"],
            min_seqlen=0,
            seqstart_py=[0, rows.shape[0]],
        )
        for name, rows in (("q", q), ("k", k))
    ]
    bias = BlockDiagonalMask(*blocks)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]


@torch.compiler.assume_constant_result
def _require_xformers() -> None:
    if not is_importable("xformers"):
        raise ImportError("attention backend 'xformers' needs xformers: pip install xformers")


def obstacles(device: int) -> dict[str, Obstacle]:
    """What may stand in the way of each backend of `rope_attention` on a CUDA device in 16 bit."""
    return {
        "reference": _nothing,
        "sdpa": _nothing,
        "varlen": _nothing,
        "triton": lambda: None if HAS_TRITON else "Triton is not installed",
        "flash_attn": lambda: _failure_of(lambda: _newest_flash_attention(device)),
        "xformers": lambda: _failure_of(_require_xformers),
    }


def refusal(backend: str, dim: int, queries: int) -> str | None:
    """Why `auto` does not take a backend that can run here, for this head_dim and longest span of queries."""
    match backend:
        case "triton" if dim not in HEAD_DIMS:
            return "it does not take this head_dim"
        case "triton" if dim > 64:
            return "it is kept to head_dims of at most 64"
        case "triton" if queries > MOST_QUERIES:
            return f"it is kept to spans of at most {MOST_QUERIES} queries"
        case "varlen" | "flash_attn" if dim % 8 or dim > 256:
            return "it does not take this head_dim"
    return None


def default(uniform: bool, device: int, dim: int) -> str:
    """The backend for 16 bit on a CUDA device of which nothing is measured."""
    if uniform:
        return "sdpa"
    # FlashAttention-4 takes up to 128 on Blackwell.
    if dim % 8 == 0 and dim <= 128 and has_newer_flash_attention(device):
        return "flash_attn"
    return "varlen" if refusal("varlen", dim, 0) is None else "sdpa"


def _nothing() -> None:
    return None


def _failure_of(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except ImportError as error:
        return str(error)
    return None
