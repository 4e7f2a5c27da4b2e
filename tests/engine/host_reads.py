"""Which functions of a training step make the host wait for the device, found by running the step.

On CUDA the host waits when it reads a value of the device (`item`, `float`, `if tensor`), or when the size of
a result depends on one (a boolean index, `nonzero`). A CPU carries out the same operators and waits for
nothing, so they are noted as they are called.
"""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense,
    _aten._unique,
    _aten._unique2,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
"""Operators whose result is on the host, or has a size that only the device knows."""


class HostReads(TorchDispatchMode):
    """While active, adds (file, function) of the project to `found` for every operator that would wait.

    What an operator of `millrace.kernels` does inside is not seen: on a CPU it is another implementation. Nor
    is what DeepSpeed reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        counts = func.overloadpacket is _aten.repeat_interleave and kwargs.get("output_size") is None
        if func.overloadpacket in _READS or counts or _indexes_with_a_mask(func, args):
            self.found |= _caller()
        return func(*args, **kwargs)


def _indexes_with_a_mask(func, args) -> bool:
    if func.overloadpacket not in (_aten.index, _aten.index_put, _aten.index_put_):
        return False
    # One value for all that a mask selects is written without counting them.
    if func.overloadpacket is not _aten.index and args[2].numel() == 1:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _caller() -> set[tuple[str, str]]:
    """The innermost function of the project on the stack, unless DeepSpeed lies above it."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            return set()
        for folder in ("engine", "kernels"):
            if (ROOT / folder) in path.resolve().parents:
                return {(str(path.resolve().relative_to(ROOT)), frame.f_code.co_name)}
        frame = frame.f_back
    return set()
