"""Blocks of the PRX denoiser: embedders, the single-stream block, and the output layer."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.engine.config import Model
from millrace.engine.model.attention_taps import queries_and_keys
from millrace.kernels import (
    gated_residual,
    gated_residual_norm_modulate,
    geglu,
    norm_modulate,
    prenorm_modulate,
    rope_attention,
)

NORM_EPS = 1e-6
TIME_FEATURES = 256
TIME_SCALE = 1000.0
TIME_PERIOD = 10_000.0


def sinusoid(values: Tensor, features: int, scale: float = 1.0) -> Tensor:
    """Features (B, features) FP32 of `values` (B,): cosines, then sines, with periods up to 2 pi * 10000."""
    half = features // 2
    frequencies = torch.exp(
        -math.log(TIME_PERIOD) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    )
    angle = scale * (values.float()[:, None] * frequencies)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class VectorEmbedder(nn.Module):
    """Linear, SiLU, Linear from sinusoidal features, 256 for the vector that modulates the blocks."""

    def __init__(self, width: int, features: int = TIME_FEATURES) -> None:
        super().__init__()
        self.in_layer = nn.Linear(features, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, features) -> (B, C)."""
        return self.out_layer(F.silu(self.in_layer(features)))


class BlockInputs(NamedTuple):
    """What a block reads besides its tokens."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    """(B, C) of attention."""
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor
    """(B, C) of the MLP."""
    text_kv: Tensor
    """(S, 2, H, D) keys and values of the text."""
    cos: Tensor
    sin: Tensor
    """(positions, D / 2) rotations of RoPE."""
    positions: Tensor
    """(T,) rows of the tables."""
    cu_seqlens: Tensor
    """(B + 1,) int32, where the tokens of each sample begin."""
    max_seqlen: int
    cu_seqlens_text: Tensor
    """(B + 1,) int32, where the text of each sample begins."""
    max_seqlen_text: int


class Block(nn.Module):
    """Attention of image tokens over [image, text] keys, then a GeGLU MLP; both modulated and gated by time.

    Text keys and values and the modulation are computed outside, for all blocks at once.

        x ──norm_modulate──▶ qkv ──rope_attention──▶ attn_out ──(* gate)──▶ + x
          ──norm_modulate──▶ gate_up ──geglu──▶ down ──(* gate)──▶ + x
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        width, hidden, dim = config.width, config.mlp_width, config.head_dim
        self.heads, self.head_dim = config.heads, dim
        self.backend, self.geglu_backend = config.attention_backend, config.geglu_backend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(dim))
        self.key_norm = nn.Parameter(torch.ones(dim))
        self.text_key_norm = nn.Parameter(torch.ones(dim))
        self.attn_out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: Tensor, inputs: BlockInputs, tapped_heads: int = 0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """x (T, C) -> (T, C); K rows of it inside a routed span.

        With `tapped_heads` queries and keys (T, tapped_heads, D) of the image tokens come after the result.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, text_kv, cos, sin, positions, *offsets = inputs
        cu_seqlens, max_seqlen, cu_seqlens_text, max_seqlen_text = offsets
        x, y = prenorm_modulate(x, shift, scale, cu_seqlens, NORM_EPS, max_seqlen)
        qkv = self.qkv(y).unflatten(1, (3, self.heads, self.head_dim))
        attended = rope_attention(
            qkv,
            text_kv,
            self.query_norm,
            self.key_norm,
            self.text_key_norm,
            cos,
            sin,
            positions,
            cu_seqlens,
            cu_seqlens_text,
            max_seqlen,
            max_seqlen_text,
            eps=NORM_EPS,
            backend=self.backend,
        )
        if tapped_heads:
            norms = self.query_norm, self.key_norm
            tap = queries_and_keys(qkv, *norms, cos, sin, positions, tapped_heads, NORM_EPS)
        del qkv  # where nothing is recorded for backward, its memory is the MLP's
        x, y = gated_residual_norm_modulate(
            x,
            self.attn_out(attended.flatten(1)),
            gate,
            mlp_shift,
            mlp_scale,
            cu_seqlens,
            NORM_EPS,
            max_seqlen,
        )
        y = self.down(geglu(self.gate_up(y), self.geglu_backend))
        x = gated_residual(x, y, mlp_gate, cu_seqlens, max_seqlen)
        return (x, *tap) if tapped_heads else x


class FinalLayer(nn.Module):
    """Modulated norm and projection to patch features; both linear layers start at zero."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, vector: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x (T, C), vector (B, C) after SiLU -> (T, P)."""
        shift, scale = self.modulation(vector).chunk(2, dim=1)
        return self.linear(norm_modulate(x, shift, scale, cu_seqlens, NORM_EPS, max_seqlen))
