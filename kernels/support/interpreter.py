"""Numbers that NumPy has not, in Triton's interpreter: BF16 and the two FP8 formats, as a GPU computes them.

The interpreter holds them as integers. Left alone, it adds and multiplies those integers, in `tl.dot` too,
and its conversions truncate or lose the carry into the exponent. Here conversions round to nearest even, dots
see the values, and whatever else would compute with the integers is an error: kernels upcast before they
compute.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

FORMATS = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
"""PyTorch's names of the formats."""
_NARROW = {*FORMATS, tl.float8e5b16, tl.float8e4b8, tl.float8e4b15}


def _values(handle: TensorHandle) -> Tensor:
    """The numbers that a handle stands for."""
    held = torch.from_numpy(handle.data.copy(order="C"))
    dtype = FORMATS.get(handle.dtype.scalar)
    return held if dtype is None else held.view(dtype).float()


def _widened(handle: TensorHandle) -> TensorHandle:
    """The same numbers in FP32, if NumPy has no dtype for them."""
    narrow = handle.dtype.scalar in FORMATS
    return TensorHandle(_values(handle).numpy(), tl.float32) if narrow else handle


def _rounded(wide: Tensor, dtype: tl.dtype) -> TensorHandle:
    """The nearest numbers of a format, halves to even; FP8 saturates, as the instructions of a GPU do."""
    if dtype.is_fp8():
        most = torch.finfo(FORMATS[dtype]).max
        wide = wide.clamp(-most, most)
    small = wide.to(FORMATS[dtype])
    return TensorHandle(small.view(torch.uint16 if dtype.is_bf16() else torch.uint8).numpy(), dtype)


def _refuse(operation: str, *handles: TensorHandle) -> None:
    for handle in handles:
        dtype = handle.dtype.scalar
        if dtype in _NARROW:
            raise TypeError(f"{operation} of {dtype} in Triton's interpreter: a kernel upcasts to fp32 first")


class Builder(InterpreterBuilder):
    """The interpreter's operations, with conversions and dots of narrow formats and no other arithmetic."""

    def get_bf16(self, value: float) -> TensorHandle:
        return _rounded(torch.tensor([value], dtype=torch.float32), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if dst_type.scalar in FORMATS:
            return _rounded(_values(src), dst_type.scalar)
        src = _widened(src)
        _refuse("a cast", src)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise TypeError(
                f"a cast to {dst_type.scalar} rounds to nearest even here, not by {rounding_mode}"
            )
        return self.cast_impl(src, dst_type)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        _refuse("a sum", d)
        return super().create_dot(_widened(a), _widened(b), d, *options)

    def unary_op(self, arg: TensorHandle, op: Callable) -> TensorHandle:
        _refuse(op.__name__, arg)
        return super().unary_op(arg, op)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        _refuse(op.__name__, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def ternary_op(self, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Callable) -> TensorHandle:
        if op.__name__ != "where":  # a choice moves bits
            _refuse(op.__name__, a, b, c)
        return super().ternary_op(a, b, c, op)


def _refusing(base: Callable, operation: str) -> Callable:
    def refuse_or_run(self: Builder, *arguments: Any) -> Any:
        _refuse(operation, *(x for x in arguments if isinstance(x, TensorHandle) and not x.dtype.is_ptr()))
        return base(self, *arguments)

    return refuse_or_run


# What InterpreterBuilder does on its own, past the three methods above.
for _name in ("fma", "fabs", "erf", "rsqrt", "atomic_rmw", "histogram"):
    _base = getattr(InterpreterBuilder, f"create_{_name}")
    setattr(Builder, f"create_{_name}", _refusing(_base, _name))


def install() -> None:
    """For all kernels of this process. Reductions and scans are no operations of the builder."""
    check = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, inputs: tuple) -> None:
        check(self, inputs)
        _refuse("a reduction", *(x.handle for x in inputs))

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor
    interpreter.interpreter_builder.__class__ = Builder
