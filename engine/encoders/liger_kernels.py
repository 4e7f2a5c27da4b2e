"""liger-kernel in a text encoder of transformers: its RMSNorm, RoPE and gated MLP serve one frozen network.

Only modules of that network change. liger-kernel's own `apply_liger_kernel_to_*` exchanges classes and
functions inside transformers, for every network of the process, and knows no T5Gemma. The kernels compute
what the modules compute, with FP32 sums where those have them; rows differ by rounding alone.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from millrace.engine.util.errors import UserError
from millrace.kernels.support.packages import is_importable
from millrace.kernels.support.registration import INTERPRETING

_KEY = "conditioning.text.kernels"
_ROTATION = "apply_rotary_pos_emb"
"""Function in a module of transformers that the attention calls by name."""
_GATES = {"gelu_pytorch_tanh": ("GeGLU", "LigerGELUMulFunction"), "silu": ("SwiGLU", "LigerSiLUMulFunction")}
"""Name of the MLP and liger-kernel's function, by the activation's name in transformers."""


class Served(NamedTuple):
    """Classes of a network of transformers that liger-kernel can serve, and how they compute."""

    norm: str
    offset: float
    """Added to the weight of the norm."""
    casting: Literal["llama", "gemma"]
    """`llama` rounds the normalised row before it is multiplied by the weight, `gemma` rounds the product."""
    attention: str
    mlp: str


def serve(network: nn.Module, served: Served, wanted: str, device: torch.device) -> str:
    """Let liger-kernel serve the modules of a frozen `network` that it can, and say which kernels run.

    Args:
        wanted: `conditioning.text.kernels`: `hf` changes nothing, `auto` what it can on CUDA.
        device: of the network.

    Raises UserError for `liger` where it cannot run.
    """
    own = "transformers"
    if wanted == "hf" or (wanted == "auto" and device.type != "cuda"):
        return own
    if device.type != "cuda" and not INTERPRETING:
        raise UserError(
            f"{_KEY} liger needs a CUDA device, the text encoder is on {device.type}; set it to auto"
        )
    try:
        ops = importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        there = is_importable("liger_kernel")
        problem = f"does not load here: {error}" if there else "is not installed here"
        line = "pip install 'liger-kernel>=0.8.5' (the extra `encoders` has it)"
        if wanted == "liger":
            raise UserError(f"{_KEY} liger: liger-kernel {problem}; {line}, or set it to hf") from None
        return f"{own}: liger-kernel {problem}; {line}"
    names = [*_norms(network, served, ops), *_rotations(network, served, ops), *_mlps(network, served, ops)]
    return f"liger-kernel {importlib.metadata.version('liger-kernel')} ({', '.join(names)})"


def _of_class(network: nn.Module, name: str) -> list[nn.Module]:
    return [module for module in network.modules() if type(module).__name__ == name]


def _bind(modules: list[nn.Module], forward: Callable[..., Any]) -> None:
    for module in modules:
        module.forward = MethodType(forward, module)


def _norms(network: nn.Module, served: Served, ops: ModuleType) -> list[str]:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return ops.LigerRMSNormFunction.apply(x, module.weight, eps, served.offset, served.casting, False)

    found = _of_class(network, served.norm)
    _bind(found, forward)
    return ["RMSNorm"] if found else []


def _rotations(network: nn.Module, served: Served, ops: ModuleType) -> list[str]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, L, D) and k (B, H_kv, L, D), of (B, L, ...) in memory; cos and sin (B or 1, L, D)."""
        # The kernel is compiled anew for every number of rows B, which differs from batch to batch. So all
        # positions are those of one row.
        batch, length = q.shape[0], q.shape[2]
        one = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (q, k)]
        tables = [x.expand(batch, -1, -1).flatten(0, 1)[None] for x in (cos, sin)]
        rotated = ops.LigerRopeFunction.apply(*one, *tables)
        q, k = (x.transpose(1, 2)[0].unflatten(0, (batch, length)).transpose(1, 2) for x in rotated)
        return q, k

    found = _of_class(network, served.attention)
    if not found:
        return []
    # The attention's own code, with another function under the name that it looks up: what it does else stays
    # that of the installed transformers, and the module that it comes from stays as it is.
    code = inspect.unwrap(type(found[0]).forward)
    if _ROTATION not in code.__code__.co_names:
        return []
    names = code.__globals__ | {_ROTATION: rotate}
    forward = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    forward.__kwdefaults__ = code.__kwdefaults__
    _bind(found, forward)
    return ["RoPE"]


def _mlps(network: nn.Module, served: Served, ops: ModuleType) -> list[str]:
    found = _of_class(network, served.mlp)
    if not found:
        return []
    config = found[0].config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _GATES:
        return []
    name, function = _GATES[activation]
    gated = getattr(ops, function).apply

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))

    _bind(found, forward)
    return [name]
