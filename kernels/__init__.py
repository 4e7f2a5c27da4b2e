"""Fused operations of a flow transformer: tensors in, tensors out; they know no model and no configuration.

T packed tokens, S packed text tokens, B samples, C width, F MLP width, H heads, D head_dim, P patch features.
"""

from millrace.kernels.add_noise import add_noise
from millrace.kernels.flow_loss import flow_loss
from millrace.kernels.fp8_linear import fp8_linear
from millrace.kernels.gated_residual import gated_residual
from millrace.kernels.gated_residual_norm_modulate import gated_residual_norm_modulate
from millrace.kernels.gather_fuse import gather_fuse
from millrace.kernels.geglu import geglu
from millrace.kernels.newton_schulz import newton_schulz
from millrace.kernels.norm_modulate import norm_modulate
from millrace.kernels.rope_attention import rope_attention
from millrace.kernels.routing import Route, gather_tokens, sample_route, scatter_tokens

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
