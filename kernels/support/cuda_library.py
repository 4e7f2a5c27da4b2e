"""The operations of csrc/ on CUDA tensors: finds the built library, loads it once, and calls it.

The library (docs/csrc.md) holds operators `millrace_cuda::...` on PyTorch's stable ABI. The functions here
take and return what the operators `millrace::...` of the same purpose do, so that an operation's file can use
either; they put right what the library would refuse (strides, alignment, mixed dtypes) and say what cannot be
put right. They have no derivative of their own and are not for tracing by torch.compile.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = "libmillrace_cuda.so"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WORD = 16
"""Bytes of one access of the kernels."""
WIDEST = 4096
"""Features of a row that a block of gated_residual_norm_modulate holds."""


def library_path() -> Path | None:
    """The library: what MILLRACE_LIBRARY names, else in the package `kernels`, else in build/ of the sources.

    Raises:
        RuntimeError: MILLRACE_LIBRARY names no file.
    """
    named = os.environ.get("MILLRACE_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise RuntimeError(f"MILLRACE_LIBRARY is {named}, which is no file")
        return Path(named)
    here = Path(__file__).resolve().parents[1]
    places = (here / LIBRARY, here.parent / "build" / LIBRARY)
    return next((place for place in places if place.is_file()), None)


@functools.cache
def available() -> bool:
    """Whether the library has been built and can be loaded into this PyTorch; asked once a process."""
    try:
        _operators()
    except RuntimeError:
        return False
    return True


def obstacle() -> str | None:
    """Why no function of the library can be called, or None if it can."""
    return None if available() else f"{LIBRARY} has not been built or cannot be loaded"


def rows_obstacle(*rows: Tensor, widest: int | None = None) -> str | None:
    """Why the operations on rows (T, C) cannot take these, all of one shape, or None if they can."""
    dtypes = {tensor.dtype for tensor in rows}
    mixed = f"has rows of {', '.join(sorted(map(str, dtypes)))}" if len(dtypes) > 1 else None
    return obstacle() or mixed or _rows_problem(rows[0], widest)


@functools.cache
def _operators() -> Any:
    """The namespace `torch.ops.millrace_cuda`, loaded once; RuntimeError says what is missing."""
    path = library_path()
    if path is None:
        raise RuntimeError(
            f'backend "cuda" needs {LIBRARY}; build it in the repository with'
            " `cmake -S . -B build && cmake --build build`, or name a built one in MILLRACE_LIBRARY"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded into PyTorch {torch.__version__}: {error}") from error
    operators = torch.ops.millrace_cuda
    if not hasattr(operators, "gated_residual_norm_modulate"):
        raise RuntimeError(f"{path} was built without PyTorch: build it again where python3 can import torch")
    return operators


def gated_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' = x + gate_b * branch, rounded once, and y = (1 + scale_b) * LayerNorm(x') + shift_b.

    Args:
        x, branch: (T, C) in one dtype of FP32, BF16, FP16; C a multiple of 16 bytes and at most 4096.
        gate, shift, scale: (B, C); of the dtype of x or all FP32, else they are converted to FP32.
        cu_seqlens: (B+1,) int32.
        max_seqlen: not needed, the launch follows cu_seqlens; here for the operators' common signature.

    Returns:
        x' (T, C), y (T, C), and the mean and 1 / standard deviation of each row of x', (T,) FP32.

    Raises:
        ValueError: a dtype or width that the kernels do not have, or a tensor that is not on a CUDA device.
        RuntimeError: the library has not been built.
    """
    _expect_rows("x", x, WIDEST)
    gate, shift, scale = _vectors(x.dtype, gate, shift, scale)
    operator = _operators().gated_residual_norm_modulate
    return operator(_rows(x), _rows(branch), gate, shift, scale, cu_seqlens, eps)


def gated_residual_norm_modulate_backward(
    grad_out: Tensor,
    grad_y: Tensor,
    out: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivative, deterministic.

    Args:
        grad_out, grad_y: gradients of x' and y, (T, C) in the dtype of x.
        out, mean, rstd: what forward returned as x', mean and rstd.
        branch, gate, scale, cu_seqlens, max_seqlen: as given to forward.

    Returns:
        Gradients of x and branch (T, C), and of gate, shift and scale (B, C) FP32.

    Raises:
        ValueError, RuntimeError: as forward does.
    """
    _expect_rows("out", out, WIDEST)
    gate, scale = _vectors(out.dtype, gate, scale)
    rows = (_rows(tensor) for tensor in (grad_out, grad_y, out, branch))
    operator = _operators().gated_residual_norm_modulate_backward
    grad_x, grad_branch, grad_vectors = operator(*rows, gate, scale, cu_seqlens, mean, rstd)
    return grad_x, grad_branch, *grad_vectors.unbind(0)


def flow_loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    negative: Tensor | None,
    contrastive_weight: float,
    predicts_sample: bool,
    t_min: float,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of `millrace.kernels.flow_loss` and what its gradient needs, in one pass; deterministic.

    Args:
        prediction: (T, P) FP32, BF16 or FP16; P a multiple of 16 bytes.
        clean, noise: (T, P); of the dtype of prediction or both FP32, else they are converted to FP32.
        t: (B,).
        cu_seqlens: (B+1,) int32.
        negative: (B,) integers below B; below 0 for none; None for (i - 1) mod B.
        max_seqlen: not needed, as above.

    Returns:
        loss () FP32, per_sample (B,) FP32, and residual (T, P) in the dtype of prediction:
        `(v_pred - v_target) - contrastive_weight * (v_pred - v_target[negative])`.

    Raises:
        ValueError, RuntimeError: as above.
    """
    _expect_rows("prediction", prediction)
    data = (clean, noise)
    if any(tensor.dtype != prediction.dtype for tensor in data):
        data = (clean.float(), noise.float())
    return _operators().flow_loss(
        _rows(prediction),
        *map(_rows, data),
        t.float().contiguous(),
        cu_seqlens,
        None if negative is None else negative.long().contiguous(),
        contrastive_weight,
        predicts_sample,
        t_min,
    )


def flow_loss_backward(
    residual: Tensor,
    grad_loss: Tensor,
    grad_per_sample: Tensor,
    t: Tensor,
    cu_seqlens: Tensor,
    predicts_sample: bool,
    t_min: float,
    max_seqlen: int | None = None,
) -> Tensor:
    """Gradient of the prediction (T, P): each row of the residual times one number.

    That is one read and one write of (T, P), for which `millrace::flow_loss_backward` has a kernel already.
    """
    return torch.ops.millrace.flow_loss_backward(
        residual, grad_loss, grad_per_sample, t, cu_seqlens, predicts_sample, t_min, max_seqlen
    )


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]: (T, C), (K,) int32 or int64 -> (K, C). An index out of range is undefined behaviour."""
    _expect_cuda("x", x)
    return _operators().gather_rows(x.contiguous(), index.contiguous())


def scatter_rows(base: Tensor, update: Tensor, index: Tensor) -> None:
    """base[index] = update, in place: (T, C), (K, C), (K,) int32 or int64 without a repeat.

    Raises:
        ValueError: base is not contiguous.
    """
    _expect_cuda("base", base)
    if not base.is_contiguous():
        raise ValueError("base is not contiguous, and scatter_rows writes to it in place")
    _operators().scatter_rows(base, update.contiguous(), index.contiguous())


def _expect_cuda(name: str, tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise ValueError(f'{name} is on {tensor.device}, and backend "cuda" takes CUDA tensors')


def _expect_rows(name: str, tensor: Tensor, widest: int | None = None) -> None:
    problem = _rows_problem(tensor, widest)
    if problem is not None:
        raise ValueError(f"{name} {problem}")
    _expect_cuda(name, tensor)


def _rows_problem(tensor: Tensor, widest: int | None) -> str | None:
    if tensor.dtype not in _DTYPES:
        return f'is {tensor.dtype}, and backend "cuda" takes float32, bfloat16 or float16'
    multiple, width = _WORD // tensor.element_size(), tensor.shape[1]
    if width % multiple or (widest is not None and width > widest):
        limit = "" if widest is None else f" and at most {widest}"
        return f'has rows of {width} {tensor.dtype}, backend "cuda" takes multiples of {multiple}{limit}'
    return None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: contiguous and aligned. New memory always is."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _WORD == 0 else tensor.clone()


def _vectors(dtype: torch.dtype, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Slices of a larger (B, ...) matrix stay where they are, if each sample's is contiguous and aligned."""
    if any(vector.dtype != dtype for vector in vectors):
        vectors = tuple(vector.float() for vector in vectors)
    return tuple(vector if _is_strided_vectors(vector) else _rows(vector) for vector in vectors)


def _is_strided_vectors(vectors: Tensor) -> bool:
    unit = vectors.stride(1) == 1 or vectors.shape[1] == 1
    return unit and (vectors.stride(0) * vectors.element_size()) % _WORD == vectors.data_ptr() % _WORD == 0
