"""Fused operations of a flow transformer: tensors in, tensors out; they know no model and no configuration.

T packed tokens, S packed text tokens, B samples, C width, F MLP width, H heads, D head_dim, P patch features.
"""

from importlib import import_module
from typing import Any

OPERATIONS = {
    "rope_attention": "attention.rope_attention",
    "add_noise": "ops.add_noise",
    "flow_loss": "ops.flow_loss",
    "fp8_linear": "ops.fp8_linear",
    "gated_residual": "ops.gated_residual",
    "gated_residual_norm_modulate": "ops.gated_residual_norm_modulate",
    "gather_fuse": "ops.gather_fuse",
    "geglu": "ops.geglu",
    "newton_schulz": "ops.newton_schulz",
    "norm_modulate": "ops.norm_modulate",
    "prenorm_modulate": "ops.norm_modulate",
    "gather_tokens": "ops.routing",
    "scatter_tokens": "ops.routing",
    "sample_route": "ops.sample_route",
}
"""Public functions and the modules below this one that hold them."""

_PUBLIC = OPERATIONS | {"Route": "ops.routing"}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import an operation when it is first asked for.

    `support.keys` serves programs that never touch a tensor; torch, Triton and dynamo take them seconds.
    """
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
