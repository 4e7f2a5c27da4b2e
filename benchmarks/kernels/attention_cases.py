"""The case of `rope_attention`, and the best that its parts make without us: qk-norm and RoPE in plain
PyTorch, compiled, then a library's attention.

Routed tokens keep their positions. Libraries that take packed rows get them; those that take a rectangle get
keys padded to the longest caption, and a (B, 1, 1, keys) mask if there is any padding. What depends on the
batch alone (offsets, masks, which row goes where) is made before the clock starts, as a model would make it
once for all of its blocks.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from millrace.benchmarks.kernels.accuracy import Function
from millrace.benchmarks.kernels.cases import EPS, Build, Case, Setting, Shape, arithmetic_work
from millrace.kernels import rope_attention
from millrace.kernels.attention.backends import Inputs
from millrace.kernels.attention.rope_attention import reference as rope_reference

OURS = ("triton", "sdpa", "varlen", "flash_attn", "xformers")
Joint = tuple[Tensor, Tensor, Tensor]


@dataclass
class Batch:
    """The lengths of a batch, and everything that follows from them alone."""

    shape: Shape
    setting: Setting
    offsets: Tensor = field(init=False)
    text_offsets: Tensor = field(init=False)
    key_offsets: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    packed_rows: Tensor = field(init=False)
    """(T + S,) row of cat(image, text) that each packed key is."""
    padded_rows: Tensor = field(init=False)
    """(B * M,) row of the text with one row of zeros behind it."""
    keys: Tensor = field(init=False)
    """(B,) keys of each sample."""

    def __post_init__(self) -> None:
        shape, setting, device = self.shape, self.setting, self.setting.device
        text, kept = shape.text_lengths(), shape.kept
        self.offsets = setting.image_offsets(shape)
        self.text_offsets = setting.offsets(text)
        self.key_offsets = self.offsets + self.text_offsets
        self.keys = self.key_offsets.diff()
        if shape.keep == 1:
            self.positions = torch.arange(shape.tokens, device=device).repeat(shape.samples)
        else:
            self.positions = setting.route(shape).index % shape.tokens
        packed, padded, start = [], [], 0
        for b, length in enumerate(text):
            rows = torch.arange(start, start + length)
            packed += [torch.arange(b * kept, (b + 1) * kept), shape.rows + rows]
            padded.append(F.pad(rows, (0, self.longest_text - length), value=sum(text)))
            start += length
        self.packed_rows = torch.cat(packed).to(device)
        self.padded_rows = torch.cat(padded).to(device)

    @property
    def longest_text(self) -> int:
        """Most text tokens of a sample."""
        return max(self.shape.text_lengths())

    @property
    def flops(self) -> float:
        """Of the two products of the forward pass; the backward pass has five."""
        keys = sum(self.shape.kept + length for length in self.shape.text_lengths())
        return 4.0 * self.shape.kept * keys * self.shape.width


class Plain:
    """qk-norm, RoPE and the joining of image and text in plain PyTorch, in both layouts."""

    def __init__(self, batch: Batch, cos: Tensor, sin: Tensor) -> None:
        self.batch = batch
        self.cos, self.sin = (table[batch.positions][:, None] for table in (cos, sin))

    def parts(
        self, qkv: Tensor, text_kv: Tensor, q_weight: Tensor, k_weight: Tensor, text_k_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, D), image keys (T, H, D), text keys (S, H, D), normalised and rotated."""
        dim = qkv.shape[-1:]
        q, k, _ = qkv.unbind(1)
        q, k = (
            self._rotate(F.rms_norm(x, dim, w, EPS)).to(x.dtype) for x, w in ((q, q_weight), (k, k_weight))
        )
        return q, k, F.rms_norm(text_kv[:, 0], dim, text_k_weight, EPS)

    def _rotate(self, x: Tensor) -> Tensor:
        even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos, self.sin
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def packed(self, qkv: Tensor, text_kv: Tensor, *weights: Tensor, **named: Tensor) -> Joint:
        """q (T, H, D), k and v (T + S, H, D), the rows of a sample adjacent."""
        q, k, text_k = self.parts(qkv, text_kv, *weights, **named)
        rows = self.batch.packed_rows
        return q, torch.cat((k, text_k))[rows], torch.cat((qkv[:, 2], text_kv[:, 1]))[rows]

    def padded(self, qkv: Tensor, text_kv: Tensor, *weights: Tensor, **named: Tensor) -> Joint:
        """q (B, H, N, D), k and v (B, H, N + M, D)."""
        q, k, text_k = self.parts(qkv, text_kv, *weights, **named)
        q, k, v = (x.unflatten(0, (self.batch.shape.samples, -1)) for x in (q, k, qkv[:, 2]))
        k, v = (
            torch.cat((x, self._pad(y)), dim=1).transpose(1, 2) for x, y in ((k, text_k), (v, text_kv[:, 1]))
        )
        return q.transpose(1, 2), k, v

    def _pad(self, text: Tensor) -> Tensor:
        rows = torch.cat((text, text.new_zeros(1, *text.shape[1:])))[self.batch.padded_rows]
        return rows.unflatten(0, (self.batch.shape.samples, -1))


def rope_attention_case(shape: Shape, setting: Setting) -> Case:
    """Joint attention of a block."""
    batch, heads, dim = Batch(shape, setting), shape.heads, shape.width // shape.heads
    text_rows = sum(shape.text_lengths())
    fused = setting.randn(text_rows, shape.depth * 2 * shape.width)
    inputs = {
        "qkv": setting.randn(shape.rows, 3, heads, dim),
        "text_kv": fused.unflatten(1, (shape.depth, 2, heads, dim)).unbind(1)[shape.depth // 2],
        "q_weight": setting.randn(dim) * 0.1 + 1,
        "k_weight": setting.randn(dim) * 0.1 + 1,
        "text_k_weight": setting.randn(dim) * 0.1 + 1,
    }
    angle = torch.randn(shape.tokens, dim // 2, device=setting.device) * 3
    cos, sin = angle.cos(), angle.sin()
    fixed = (cos, sin, batch.positions, batch.offsets, batch.text_offsets, shape.kept, batch.longest_text)

    def reference(**inputs: Tensor) -> Tensor:
        return rope_reference(Inputs(*inputs.values(), *fixed), EPS, dim**-0.5)

    def ours(backend: str) -> Function:
        return lambda **inputs: rope_attention(*inputs.values(), *fixed, EPS, backend=backend)

    peers = _peers(batch, Plain(batch, cos, sin), setting)
    own = {setting.ours(backend): lambda b=backend: ours(b) for backend in OURS}
    return Case(
        "rope_attention",
        shape,
        inputs,
        reference,
        arithmetic_work(batch.flops, 2.5 * batch.flops),
        {"eager": lambda: reference} | peers | own,
        plain=lambda **inputs: _in_dtype(Plain(batch, cos, sin), batch, inputs),
    )


def _in_dtype(plain: Plain, batch: Batch, inputs: dict[str, Tensor]) -> Tensor:
    """Attention as PyTorch evaluates it when every tensor, the probabilities too, is in the inputs' dtype."""
    q, k, v = plain.packed(**inputs)
    outputs, first = [], 0
    kept = batch.shape.kept
    for b, keys in enumerate(batch.keys.tolist()):
        rows = slice(first, first + keys)
        logits = torch.einsum("nhd,mhd->hnm", q[b * kept : (b + 1) * kept], k[rows]) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v[rows]))
        first += keys
    return torch.cat(outputs)


def _peers(batch: Batch, plain: Plain, setting: Setting) -> dict[str, Build]:
    """Compiled prologue, then a library."""
    shape, device = batch.shape, setting.device
    longest = shape.kept + batch.longest_text
    mask = None
    if shape.ragged:
        mask = (torch.arange(longest, device=device) < batch.keys[:, None])[:, None, None]

    def sdpa(*backends: SDPBackend) -> Build:
        def call(**inputs: Tensor) -> Tensor:
            q, k, v = plain.padded(**inputs)
            with sdpa_kernel(list(backends)):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(0, 1)

        return setting.compiled(call)

    def flex() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        keys = batch.keys
        blocks = create_block_mask(
            lambda b, h, q, k: k < keys[b], shape.samples, None, shape.kept, longest, device=str(device)
        )

        def call(**inputs: Tensor) -> Tensor:
            out = flex_attention(*plain.padded(**inputs), block_mask=blocks if shape.ragged else None)
            return out.transpose(1, 2).flatten(0, 1)

        return setting.compiled(call)()

    def packed(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
        prologue = setting.compiled(plain.packed)()
        return lambda **inputs: attend(*prologue(**inputs))

    ends = (batch.offsets, batch.key_offsets)

    def varlen() -> Function:
        from torch.nn.attention.varlen import varlen_attn

        return packed(lambda q, k, v: varlen_attn(q, k, v, *ends, shape.kept, longest))

    def flash(module: str) -> Build:
        def build() -> Function:
            library = importlib.import_module(module).flash_attn_varlen_func

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
                out = library(q, k, v, **dict(zip(names, (*ends, shape.kept, longest), strict=True)))
                return out[0] if isinstance(out, tuple) else out

            return packed(attend)

        return build

    def xformers() -> Function:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        bias = BlockDiagonalMask.from_seqlens([shape.kept] * shape.samples, batch.keys.tolist())
        bias = bias.to(device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

        return packed(attend)

    def transformer_engine() -> Function:
        from transformer_engine.pytorch import DotProductAttention

        dim = shape.width // shape.heads
        layer = DotProductAttention(shape.heads, dim, qkv_format="thd", attn_mask_type="padding")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            names = "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"
            offsets = dict(zip(names, (*ends, shape.kept, longest), strict=True))
            return layer(q, k, v, **offsets).unflatten(-1, (shape.heads, dim))

        return packed(attend)

    peers: dict[str, Build] = {}
    if device.type == "cuda":
        peers |= {
            "torch.compile + cuDNN SDPA": sdpa(SDPBackend.CUDNN_ATTENTION),
            "torch.compile + efficient SDPA": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        }
        if mask is None:
            peers["torch.compile + flash SDPA"] = sdpa(SDPBackend.FLASH_ATTENTION)
    else:
        peers["torch.compile + SDPA"] = sdpa(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    return peers | {
        "torch.compile + flex": flex,
        "torch.compile + varlen_attn": varlen,
        "torch.compile + flash-attn 2": flash("flash_attn"),
        "torch.compile + flash-attn 3": flash("flash_attn_interface"),
        "torch.compile + flash-attn 4": flash("flash_attn.cute"),
        "torch.compile + xformers": xformers,
        "torch.compile + transformer-engine": transformer_engine,
    }
