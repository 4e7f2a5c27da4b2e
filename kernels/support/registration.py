"""Registration of the operations with PyTorch, and the choice between plain PyTorch and Triton.

Every operation is a `torch.library` operator of the namespace `millrace`: torch.compile sees one node and no
graph break, FLOP and byte counters see it, and it runs on meta tensors. Its derivative is a second operator,
joined to the first by a once-differentiable `autograd.Function` in the operation's file; that costs a call
half of what `register_autograd` does.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides when a kernel is defined, so this is read once."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels on floating point numbers take: FP64 is left to plain PyTorch."""

_library = torch.library.Library("millrace", "DEF")


def register(
    schema: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Callable[..., Any]:
    """Define an operator and return it.

    Args:
        schema: `name(Tensor x, ...) -> ...`; the first argument's device and dtype choose the implementation.
        eager: plain PyTorch, used on the CPU, for other dtypes, and where Triton is not installed.
        fake: shapes, dtypes and strides of the results, without data.
        triton: the kernels' launcher, used on CUDA, and on the CPU under `TRITON_INTERPRET=1`.
        dtypes: of the first argument, which `triton` takes; an operator on integers has to name them.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, eager if triton is None else _choose(eager, triton, dtypes), key)
    torch.library.register_fake(f"millrace::{name}", fake, lib=_library)
    return getattr(torch.ops.millrace, name).default


def _choose(
    eager: Callable[..., Any], triton: Callable[..., Any], dtypes: tuple[torch.dtype, ...]
) -> Callable[..., Any]:
    @functools.wraps(eager)
    def run(first: Tensor, *rest: Any) -> Any:
        if not uses_triton(first, dtypes):
            return eager(first, *rest)
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return triton(first, *rest)
        # Triton launches on the current device, wherever the pointers that it is given lead.
        with torch.cuda.device(first.get_device()):
            return triton(first, *rest)

    return run


def uses_triton(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """Whether operations on this tensor run their Triton kernels, which take `dtypes`.

    The interpreter computes BF16 wrongly and in silence, so BF16 on the CPU is plain PyTorch even there.
    """
    if tensor.dtype not in dtypes:
        return False
    return HAS_TRITON if tensor.is_cuda else INTERPRETING and tensor.dtype != torch.bfloat16
