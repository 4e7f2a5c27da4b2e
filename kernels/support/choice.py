"""Choice of implementation: which one of an operation runs, where there is more than one.

`auto` takes the registered operator (Triton on CUDA, plain PyTorch on the CPU), unless `measured.json`,
which `python -m benchmarks kernels --record-choices` writes from measurements on a GPU, names a faster one
for that GPU. The machine that measured may have had what this one lacks, and shapes that an implementation
takes, so each operation says what stands in the way of one; then the table is not followed, and the log says
so once.
"""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "triton", "cuda")
"""Plain differentiable PyTorch; the registered operator; the CUDA C++ library of csrc/."""

Obstacle = Callable[[], str | None]
"""Why an implementation cannot run here and on these arguments, or None if it can."""

_TABLE = Path(__file__).with_name("measured.json")
_log = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()


@functools.cache
def measured_choices() -> dict[str, dict[str, str]]:
    """GPU name -> operation -> fastest implementation, as committed."""
    return json.loads(_TABLE.read_text())


def choose(operation: str, backend: str, tensor: Tensor, obstacles: Mapping[str, Obstacle]) -> str:
    """Resolve `backend` for an operation on this tensor, or raise ValueError.

    Args:
        operation: key of `measured.json`.
        backend: "auto" or one of IMPLEMENTATIONS, which is taken as it is.
        tensor: what the operation runs on.
        obstacles: of each implementation that `auto` may take besides "reference" and "triton".

    Returns:
        One of IMPLEMENTATIONS or of `obstacles`.
    """
    if backend in IMPLEMENTATIONS:
        return backend
    if backend != "auto":
        raise ValueError(f"backend is {backend!r}, expected one of: auto, {', '.join(IMPLEMENTATIONS)}")
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return "triton"
    always = dict.fromkeys(("reference", "triton"), _none)
    return measured_choice(operation, tensor.get_device(), always | dict(obstacles)) or "triton"


def measured_choice(operation: str, device: int, obstacles: Mapping[str, Obstacle]) -> str | None:
    """The fastest of `obstacles` by measurement on this CUDA device's GPU; None if unmeasured or unusable."""
    found = measured_choices().get(_device_name(device), {}).get(operation)
    if found is None:
        return None
    obstacle = obstacles[found]() if found in obstacles else "no implementation of this name exists"
    if obstacle is None:
        return found
    warn_unusable(operation, device, found, obstacle)
    return None


def warn_unusable(operation: str, device: int, implementation: str, obstacle: str) -> None:
    """Log, once for each choice of a kind of GPU, that what was measured to be the fastest is not taken."""
    choice = _device_name(device), operation, implementation
    if choice not in _told:
        _told.add(choice)
        _log.warning(
            "%s: measured.json names %r for %s, which is not taken here: %s; the default is",
            operation,
            implementation,
            choice[0],
            obstacle,
        )


def _none() -> None:
    return None


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
