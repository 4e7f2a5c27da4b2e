"""Fused operations of a flow transformer: tensors in, tensors out; they know no model and no configuration.

T packed tokens, S packed text tokens, B samples, C width, F MLP width, H heads, D head_dim, P patch features.
"""

from millrace.kernels.attention.rope_attention import rope_attention
from millrace.kernels.ops.add_noise import add_noise
from millrace.kernels.ops.flow_loss import flow_loss
from millrace.kernels.ops.fp8_linear import fp8_linear
from millrace.kernels.ops.gated_residual import gated_residual
from millrace.kernels.ops.gated_residual_norm_modulate import gated_residual_norm_modulate
from millrace.kernels.ops.gather_fuse import gather_fuse
from millrace.kernels.ops.geglu import geglu
from millrace.kernels.ops.newton_schulz import newton_schulz
from millrace.kernels.ops.norm_modulate import norm_modulate
from millrace.kernels.ops.routing import (
    Route,
    gather_tokens,
    sample_route,
    scatter_tokens,
)

__all__ = [
    "Route",
    "add_noise",
    "flow_loss",
    "fp8_linear",
    "gated_residual",
    "gated_residual_norm_modulate",
    "gather_fuse",
    "gather_tokens",
    "geglu",
    "newton_schulz",
    "norm_modulate",
    "rope_attention",
    "sample_route",
    "scatter_tokens",
]
