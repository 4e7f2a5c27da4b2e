"""y = GELU_tanh(gate) * up, the GeGLU activation (Shazeer, arXiv 2002.05202) of one fused projection.

gate_up is (T, 2F): gate in the first F columns, up in the rest. GELU is its tanh approximation, which is a
sigmoid in other words, because 1 + tanh(z) = 2 sigmoid(2 z):

    GELU(g) = 0.5 g (1 + tanh(z)) = g s,  z = sqrt(2/pi) (g + 0.044715 g^3),  s = sigmoid(2 z)
    GELU'(g) = s + g s (1 - s) 2 sqrt(2/pi) (1 + 3 * 0.044715 g^2)

Forward reads 2F and writes F values a row; backward saves nothing but gate_up, reads 3F and writes 2F.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from millrace.kernels.support.choice import choose
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packages import is_importable
from millrace.kernels.support.packed import unit_stride, widen
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING, register

if HAS_TRITON:
    import triton
    import triton.language as tl

BACKENDS = ("auto", "reference", "triton", "liger")
BLOCK, WARPS = 1024, 4
"""Columns and warps of a program: in BF16 a thread moves one 16-byte word of each operand."""


def reference(gate_up: Tensor) -> Tensor:
    """The equation in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.gelu(gate, approximate="tanh") * up


if HAS_TRITON:

    @triton.jit
    def _gelu(gate):
        """GELU(gate) and its derivative; 1.59576... is 2 sqrt(2/pi)."""
        square = gate * gate
        argument = 1.5957691216057308 * gate * (1.0 + 0.044715 * square)
        opening, rest = tl.sigmoid(argument), tl.sigmoid(-argument)  # 1 - opening would lose its digits
        steepness = 1.5957691216057308 * gate * (1.0 + 3.0 * 0.044715 * square)
        return gate * opening, opening + opening * rest * steepness

    @triton.jit
    def _block_of_row(HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
        """Row and columns of this program; neighbouring programs share a row."""
        # One grid axis for both: tokens on a second axis would end at 65,535.
        blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
        row = (tl.program_id(0) // blocks).to(tl.int64)
        return row, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)

    @triton.jit
    def geglu_fwd_kernel(gate_up, y, stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
        row, column = _block_of_row(HIDDEN, BLOCK)
        inside = column < HIDDEN
        at = gate_up + row * stride + column
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + HIDDEN, mask=inside, other=0.0).to(tl.float32)
        activation, _ = _gelu(gate)
        tl.store(y + row * HIDDEN + column, activation * up, mask=inside)

    @triton.jit
    def geglu_bwd_kernel(
        grad_y, gate_up, grad_gate_up, grad_stride, stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
    ):
        row, column = _block_of_row(HIDDEN, BLOCK)
        inside = column < HIDDEN
        at = gate_up + row * stride + column
        gradient = tl.load(grad_y + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + HIDDEN, mask=inside, other=0.0).to(tl.float32)
        # The activation is computed again: keeping it would write and read F numbers a token.
        activation, derivative = _gelu(gate)
        to = grad_gate_up + row * (2 * HIDDEN) + column
        tl.store(to, gradient * up * derivative, mask=inside)
        tl.store(to + HIDDEN, gradient * activation, mask=inside)


def _forward_triton(gate_up: Tensor) -> Tensor:
    gate_up = unit_stride(gate_up)
    y = _forward_fake(gate_up)
    tokens, hidden = y.shape
    if y.numel():
        grid = (tokens * -(-hidden // BLOCK),)
        geglu_fwd_kernel[grid](gate_up, y, gate_up.stride(0), HIDDEN=hidden, BLOCK=BLOCK, num_warps=WARPS)
    return y


def _backward_triton(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    grad_y, gate_up = unit_stride(grad_y), unit_stride(gate_up)
    grad_gate_up = _backward_fake(grad_y, gate_up)
    tokens, hidden = grad_y.shape
    if grad_y.numel():
        geglu_bwd_kernel[(tokens * -(-hidden // BLOCK),)](
            grad_y,
            gate_up,
            grad_gate_up,
            grad_y.stride(0),
            gate_up.stride(0),
            HIDDEN=hidden,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return grad_gate_up


def _forward_eager(gate_up: Tensor) -> Tensor:
    y = _forward_fake(gate_up)
    for (gate, up), out in zip(_blocks(gate_up), y.split(_rows(y)), strict=True):
        gate = widen(gate)
        work = out if out.dtype == gate.dtype else torch.empty_like(gate)
        _argument(torch.mul(gate, gate, out=work), gate, work).sigmoid_().mul_(gate)
        torch.mul(work, up, out=out)
    return y


def _backward_eager(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    grad_gate_up = _backward_fake(grad_y, gate_up)
    parts = _blocks(gate_up), _blocks(grad_gate_up), grad_y.split(_rows(grad_y))
    for (gate, up), (grad_gate, grad_up), gradient in zip(*parts, strict=True):
        gate = widen(gate)
        square = gate * gate
        opening = _argument(square, gate)
        rest = torch.neg(opening).sigmoid_()  # 1 - opening would lose its digits
        activation = opening.sigmoid_() * gate
        steepness = torch.add(_LINEAR, square, alpha=3 * _CUBIC, out=square)
        derivative = steepness.mul_(activation).mul_(rest).add_(opening)
        torch.mul(derivative.mul_(up), gradient, out=grad_gate)
        torch.mul(activation, gradient, out=grad_up)
    return grad_gate_up


# Plain PyTorch computes the same sigmoid form as the kernels, several times as fast as tanh on a CPU, a few
# rows at a time, so that what one step writes is still in the cache when the next reads it.
_CUBIC = 0.044715 * 2 * math.sqrt(2 / math.pi)
_LINEAR = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=torch.float64)
"""Without dimensions, so it takes the dtype of what it meets."""
_CACHED = 1 << 17
"""Elements of a block."""


def _rows(x: Tensor) -> int:
    return max(_CACHED // max(x.shape[1], 1), 1)


def _blocks(gate_up: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Gate and up of a few rows at a time."""
    gate, up = gate_up.chunk(2, dim=1)
    return zip(gate.split(_rows(gate)), up.split(_rows(up)), strict=True)


def _argument(square: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """2 sqrt(2/pi) (gate + 0.044715 gate^3)."""
    return torch.add(_LINEAR, square, alpha=_CUBIC, out=out).mul_(gate)


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _backward_fake(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_forward = register(
    "geglu(Tensor gate_up) -> Tensor", eager=_forward_eager, triton=_forward_triton, fake=_forward_fake
)
_backward = register(
    "geglu_backward(Tensor grad_y, Tensor gate_up) -> Tensor",
    eager=_backward_eager,
    triton=_backward_triton,
    fake=_backward_fake,
)


def _refuse_liger(gate_up: Tensor, *_others: Tensor) -> Tensor:
    raise ValueError(f"backend 'liger' takes no {gate_up.dtype} on {gate_up.device}")


def _forward_liger(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import geglu_forward

    *_, y = geglu_forward(*(half.contiguous() for half in gate_up.chunk(2, dim=1)))
    return y


def _backward_liger(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import geglu_backward

    # It writes the gradients over the halves.
    halves = (half.clone(memory_format=torch.contiguous_format) for half in gate_up.chunk(2, dim=1))
    return torch.cat(geglu_backward(*halves, grad_y.contiguous()), 1)


# Operators as ours are, because its own autograd function breaks torch.compile's graph and keeps two copies.
_liger_forward = register(
    "geglu_liger(Tensor gate_up) -> Tensor", eager=_refuse_liger, triton=_forward_liger, fake=_forward_fake
)
_liger_backward = register(
    "geglu_liger_backward(Tensor grad_y, Tensor gate_up) -> Tensor",
    eager=_refuse_liger,
    triton=_backward_liger,
    fake=_backward_fake,
)


class _GeGLU(torch.autograd.Function):
    """By our operators, or by liger-kernel's."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, liger: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.liger = liger
        return (_liger_forward if liger else _forward)(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return (_liger_backward if ctx.liger else _backward)(grad_y, *ctx.saved_tensors), None


def geglu(gate_up: Tensor, backend: str = "auto") -> Tensor:
    """Apply the gate to the other half of the columns.

    Args:
        gate_up: (T, 2F) floating point, any strides.
        backend: `reference` is differentiable plain PyTorch; `triton` the operator above, which runs the
            kernels on CUDA; `liger` an operator of liger-kernel's kernels, which copies both halves first.
            `auto` is `triton`, unless another was measured to be faster (`kernels/support/choice.py`).

    Returns:
        (T, F) in the dtype of gate_up.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected (T, 2F)")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = choose("geglu", backend, gate_up, {"liger": _liger_missing})
    if backend == "reference":
        return reference(gate_up)
    # A graph takes it as it is: whether a package is there is no question for torch.compile.
    if backend == "liger" and not torch.compiler.is_compiling():
        obstacle = liger_obstacle(gate_up.device)
        if obstacle is not None:
            raise ValueError(f"backend 'liger' cannot run: {obstacle}")
    return _GeGLU.apply(gate_up, backend == "liger")


def liger_obstacle(device: torch.device) -> str | None:
    """Why the backend `liger` cannot run on a device; None if it can."""
    if device.type != "cuda" and not INTERPRETING:
        return f"its kernels run on CUDA, not on {device.type}"
    return _liger_missing()


def _liger_missing() -> str | None:
    return None if is_importable("liger_kernel.ops.geglu") else "liger-kernel is not installed"


def configurations() -> Iterator[Launch]:
    """MLP widths of PRX, 3.5 times 1792 and 3584, and of the FP32 model that is made for a CPU."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden in (6272, 12_544, *((560,) if dtype == torch.float32 else ())):
            gate_up, y = meta(4096, 2 * hidden, dtype=dtype), meta(4096, hidden, dtype=dtype)
            yield Launch(f"forward F={hidden} {dtype}", _forward_triton, (gate_up,))
            yield Launch(f"backward F={hidden} {dtype}", _backward_triton, (y, gate_up))
