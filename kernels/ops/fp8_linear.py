"""y = x W^T of a linear layer with its three matrix products in FP8 and everything else as it was.

x is (T, K), weight (N, K), both of any wider dtype. Each operand of a product is divided by one number, its
unit, and rounded to eight bits (Micikevicius et al., arXiv 2209.05433): E4M3 for values, E5M2 for gradients.

    y        (T, N) = [x]_E4M3 [W]_E4M3^T            x ~ [x] u_x, and so on; the product is multiplied
    grad x   (T, K) = [g]_E5M2 [W]_E4M3              by the two units, accumulated in FP32
    grad W   (N, K) = [g]_E5M2^T [x]_E4M3            and rounded once, to the dtype that is wanted

Scaling is dynamic and per tensor: the unit is the smallest power of two with which the largest magnitude of
this very tensor fits the format, so nothing saturates, scaling itself rounds nothing, and there is no state.
Rounding changes a value by at most 2^-4 (E4M3) or 2^-3 (E5M2) of it; values below about 2^-14 (2^-30) of the
largest by at most half the format's smallest step. A value that is not finite makes the whole product NaN.

Bytes, with values of b bytes and weights of w: forward reads x twice (its largest magnitude, then the cast)
and writes it twice, once transposed for grad W; it reads the weight twice and writes it once. Backward treats
g as x, and reads the weight a third time to write it transposed, for which the largest magnitude is known.
Beside the products that is (2b + 2) K T + (2b + 2) N T + (3w + 2) K N. Kept for backward is x in FP8, not x.

On the CPU the products are emulated: FP8 values widened to FP32 and multiplied there, which is the same up to
the order of the sum. On CUDA they are cuBLASLt's, through `torch._scaled_mm`, from compute capability 8.9 on.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from millrace.kernels.support.autocast import autocast_dtype
from millrace.kernels.support.checks import expect_shape
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import unit_stride
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING, register

if HAS_TRITON:
    import triton
    import triton.language as tl

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What K and N are multiples of, and what rows are padded to where a product sums over them."""
CAPABILITY = (8, 9)
"""First compute capability with FP8 matrix instructions."""
TILE, WARPS = 128, 8
"""Rows and columns of a program: a transposed row of the tile is one memory transaction of 128 bytes."""

_TOP = {VALUES: 135, GRADIENTS: 142}
"""Both formats end at 1.75 x 2^n, n = 8 and 15. A magnitude 1.f x 2^(e - 127) is multiplied by 2^k with the
largest k that keeps it at or below that: k = n + 127 - e, one less if 1.f > 1.75."""
_MOST = 126
"""Largest k: 2^-k is the unit and stays a normal number."""
_GRID = {VALUES: (2.0**-3, 2.0**-9), GRADIENTS: (2.0**-2, 2.0**-16)}
"""Steps of both formats: a share of the power of two below a magnitude, and the smallest."""


def reference(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The forward product in plain PyTorch: (T, N) in `dtype`, default that of x. It rounds, so it has no
    derivative; `fp8_linear` has the one that the equations above say."""
    product = rounded(x.detach(), VALUES) @ rounded(weight.detach(), VALUES).T
    return product.to(dtype or x.dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What an operand is in a product: `x` as `dtype` (VALUES or GRADIENTS) holds it, in FP32, same shape."""
    scale, unit = _scale(x.detach().abs().float().amax(), dtype)
    return (x.detach().float() * scale).to(dtype).float() * unit


def _scale(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """2^k and the unit 2^-k () FP32 for a largest magnitude () FP32; NaN where that is not finite."""
    bits = amax.view(torch.int32)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    k = (_TOP[dtype] - exponent - (fraction > 0x600000).int()).clamp(max=_MOST)
    scale, unit = ((127 + k) << 23).view(torch.float32), ((127 - k) << 23).view(torch.float32)
    finite = exponent < 255
    return scale.where(finite, math.nan), unit.where(finite, math.nan)


if HAS_TRITON:

    @triton.jit
    def _tile(rows, columns, stride, TILE: tl.constexpr):
        """Row numbers and column numbers of this program's tile, and where its values lie."""
        across = (columns + TILE - 1) // TILE
        row = (tl.program_id(0) // across).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        return row, column, row[:, None] * stride + column[None, :], inside

    @triton.jit
    def _round(value, RELATIVE: tl.constexpr, SMALLEST: tl.constexpr):
        """To the nearest multiple of the step at that magnitude, halves to even: FP32 has 24 bits, so of a
        sum with 1.5 x 2^23 steps whole steps remain."""
        power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        steps = tl.maximum(power * RELATIVE, SMALLEST) * 12582912.0
        return (value + steps) - steps

    @triton.jit
    def fp8_linear_amax_kernel(x, amax, rows, columns, stride, TILE: tl.constexpr):
        _, _, at, inside = _tile(rows, columns, stride, TILE)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        # Bits of magnitudes are ordered as the magnitudes, NaN above all: a comparison of floats would lose
        # it. The largest does not depend on the order of the programs.
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(amax, tl.max(tl.max(bits, 1), 0))

    @triton.jit
    def fp8_linear_cast_kernel(
        x,
        amax,
        unit,
        straight,
        turned,
        rows,
        columns,
        padded,
        stride,
        TOP: tl.constexpr,
        MOST: tl.constexpr,
        RELATIVE: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROUND: tl.constexpr,
        STRAIGHT: tl.constexpr,
        TURNED: tl.constexpr,
        TILE: tl.constexpr,
    ):
        bits = tl.load(amax).to(tl.int32, bitcast=True)
        exponent = bits >> 23
        k = tl.minimum(TOP - exponent - ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), MOST)
        scale = ((127 + k) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(exponent < 255, scale, float("nan"))
        if tl.program_id(0) == 0:
            tl.store(unit, tl.where(exponent < 255, ((127 - k) << 23).to(tl.float32, bitcast=True), scale))
        row, column, at, inside = _tile(rows, columns, stride, TILE)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        if ROUND:
            value = _round(value, RELATIVE, SMALLEST)
        if STRAIGHT:
            place = row[:, None] * columns + column[None, :]
            tl.store(straight + place, value.to(straight.dtype.element_ty), mask=inside)
        if TURNED:
            # Rows between `rows` and `padded` are zero; they add nothing to the sum over rows.
            place = column.to(tl.int64)[:, None] * padded + row[None, :]
            wanted = (column < columns)[:, None] & (row < padded)[None, :]
            zero = tl.where((row < rows)[:, None], value, 0.0)
            tl.store(turned + place, tl.trans(zero.to(turned.dtype.element_ty)), mask=wanted)


def _amax_triton(x: Tensor) -> Tensor:
    x = unit_stride(x)
    rows, columns = x.shape
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        grid = (_tiles(rows) * _tiles(columns),)
        fp8_linear_amax_kernel[grid](x, bits, rows, columns, x.stride(0), TILE=TILE, num_warps=WARPS)
    return bits.view(torch.float32)


def _cast_triton(
    x: Tensor, amax: Tensor, gradient: bool, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = unit_stride(x)
    rows, columns = x.shape
    outputs = _cast_fake(x, amax, gradient, straight, turned)
    if not x.numel():
        return _cast_eager(x, amax, gradient, straight, turned)
    relative, smallest = _GRID[_format(gradient)]
    fp8_linear_cast_kernel[(_tiles(rows) * _tiles(columns),)](
        x,
        amax,
        outputs[2],
        *outputs[:2],
        rows,
        columns,
        padded_rows(rows),
        x.stride(0),
        TOP=_TOP[_format(gradient)],
        MOST=_MOST,
        RELATIVE=relative,
        SMALLEST=smallest,
        # Hardware rounds in the cast. Triton's interpreter loses the carry into the exponent there.
        ROUND=INTERPRETING,
        STRAIGHT=straight,
        TURNED=turned,
        TILE=TILE,
        num_warps=WARPS,
    )
    return outputs


def _tiles(size: int) -> int:
    return -(-size // TILE)


def padded_rows(rows: int) -> int:
    """`rows`, rounded up to what a product can sum over."""
    return -(-rows // MULTIPLE) * MULTIPLE


def _format(gradient: bool) -> torch.dtype:
    return GRADIENTS if gradient else VALUES


def _amax_eager(x: Tensor) -> Tensor:
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def _cast_eager(
    x: Tensor, amax: Tensor, gradient: bool, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _format(gradient)
    scale, unit = _scale(amax, dtype)
    small = (x.float() * scale).to(dtype)
    nothing = small.new_empty(0)
    across = nothing
    if turned:
        rows, columns = x.shape
        across = small.new_zeros(columns, padded_rows(rows))
        across[:, :rows] = small.T
    return (small.contiguous() if straight else nothing), across, unit


def _product_eager(
    a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    if not a.numel() or not b.numel():
        return torch.zeros(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, scale_a=unit_a, scale_b=unit_b, out_dtype=dtype, use_fast_accum=fast)
    with torch.autocast("cpu", enabled=False):
        return ((_widened(a) @ _widened(b).T) * (unit_a * unit_b)).to(dtype)


_ALL = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in (VALUES, GRADIENTS)}
"""What each byte stands for."""


def _widened(small: Tensor) -> Tensor:
    """`small.float()` on the CPU, for which PyTorch takes five times as long."""
    return _ALL[small.dtype].index_select(0, small.view(torch.uint8).flatten().int()).view(small.shape)


def _amax_fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _cast_fake(
    x: Tensor, amax: Tensor, gradient: bool, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    dtype = _format(gradient)
    shapes = (rows, columns) if straight else (0,), (columns, padded_rows(rows)) if turned else (0,)
    return *(x.new_empty(shape, dtype=dtype) for shape in shapes), torch.empty_like(amax)


def _product_fake(
    a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


_amax = register("fp8_amax(Tensor x) -> Tensor", eager=_amax_eager, triton=_amax_triton, fake=_amax_fake)
_cast = register(
    "fp8_cast(Tensor x, Tensor amax, bool gradient, bool straight, bool turned) -> (Tensor, Tensor, Tensor)",
    eager=_cast_eager,
    triton=_cast_triton,
    fake=_cast_fake,
)
_product = register(
    "fp8_product(Tensor a, Tensor b, Tensor unit_a, Tensor unit_b, ScalarType dtype, bool fast) -> Tensor",
    eager=_product_eager,
    fake=_product_fake,
)


@register_flop_formula(torch.ops.millrace.fp8_product)
def _product_flops(a: torch.Size, b: torch.Size, *_rest: Any, **_keywords: Any) -> int:
    return 2 * a[0] * a[1] * b[0]


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
        amax = _amax(weight)
        x_straight, x_turned, x_unit = _cast(x, _amax(x), False, True, keep)
        w_straight, _, w_unit = _cast(weight, amax, False, True, False)
        # The weight itself is kept, not its FP8 form: ZeRO-3 gathers it again, and others hold it anyway.
        ctx.save_for_backward(x_turned, x_unit, weight, amax)
        ctx.x_dtype = x.dtype
        return _product(x_straight, w_straight, x_unit, w_unit, dtype, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_turned, x_unit, weight, amax = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        straight, turned, unit = _cast(grad, _amax(grad), True, to_x, to_weight)
        grad_x = grad_weight = None
        # Fast accumulation rounds partial sums to 14 bits or so; gradients do without it.
        if to_x:
            _, w_turned, w_unit = _cast(weight, amax, False, False, True)
            grad_x = _product(straight, w_turned, unit, w_unit, ctx.x_dtype, False)
        if to_weight:
            grad_weight = _product(turned, x_turned, unit, x_unit, weight.dtype, False)
        return grad_x, grad_weight, None, None


def missing(device: torch.device) -> str | None:
    """Why `fp8_linear` cannot run on a device, or None if it can."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= CAPABILITY:
        return None
    have, want = (".".join(map(str, version)) for version in (found, CAPABILITY))
    name = torch.cuda.get_device_name(device)
    return f"FP8 products need compute capability {want}, {name} has {have}"


def fp8_linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x weight^T with FP8 operands, forward and backward.

    Args:
        x: (T, K) floating point, any strides, any T.
        weight: (N, K); K and N are multiples of 16. Its gradient comes out of the product in its own dtype.
        dtype: of the result; default autocast's where that is on, else that of x.

    Returns:
        (T, N).

    Raises:
        ValueError: wrong shapes.
        RuntimeError: from PyTorch, on a GPU without FP8 products (see `missing`).
    """
    expect_shape("x", x, "T", "K")
    expect_shape("weight", weight, "N", x.shape[1])
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, FP8 products take multiples of {MULTIPLE}")
    if dtype is None:
        dtype = autocast_dtype(x.device.type) or x.dtype
    return _Fp8Linear.apply(x, weight, dtype, torch.is_grad_enabled() and weight.requires_grad)


def configurations() -> Iterator[Launch]:
    """Activations and gradients at width 1792 in BF16, weights in FP32; both transposed and not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, amax = meta(32 * 1024, 1792, dtype=dtype), meta(dtype=torch.float32)
        yield Launch(f"amax {dtype}", _amax_triton, (x,))
        for gradient, straight, turned in ((False, True, True), (False, True, False), (True, True, True)):
            name = f"cast {dtype} to {_format(gradient)} straight={straight} turned={turned}"
            yield Launch(name, _cast_triton, (x, amax, gradient, straight, turned), needs=90)
    weight = meta(12_544, 1792, dtype=torch.float32)
    yield Launch("cast of a weight, transposed", _cast_triton, (weight, amax, False, False, True), needs=90)
