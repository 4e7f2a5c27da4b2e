"""Choice of implementation: which one of an operation runs, where there is more than one.

`auto` takes the registered operator (Triton on CUDA, plain PyTorch on the CPU), unless `measured.json`,
which `python -m benchmarks kernels --record-choices` writes from measurements on a GPU, names a faster one
for that GPU.
"""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "triton", "cuda")
"""Plain differentiable PyTorch; the registered operator; the CUDA C++ library of csrc/."""

_TABLE = Path(__file__).with_name("measured.json")


@functools.cache
def measured_choices() -> dict[str, dict[str, str]]:
    """GPU name -> operation -> fastest implementation, as committed."""
    return json.loads(_TABLE.read_text())


def choose(operation: str, backend: str, tensor: Tensor) -> str:
    """Resolve `backend` for an operation on this tensor to one of IMPLEMENTATIONS, or raise ValueError."""
    if backend in IMPLEMENTATIONS:
        return backend
    if backend != "auto":
        raise ValueError(f"backend is {backend!r}, expected one of: auto, {', '.join(IMPLEMENTATIONS)}")
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return "triton"
    name = _device_name(tensor.get_device())
    return measured_choices().get(name, {}).get(operation, "triton")


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
