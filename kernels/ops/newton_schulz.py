"""Orthogonalisation of matrices by a Newton-Schulz iteration, as Muon needs it (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), for a stack of N equal shapes at once.

With X = U S V^T divided by its Frobenius norm, one step is

    A = X X^T,  B = b A + c A^2,  X <- a X + B X

so that every singular value s goes to p(s) = a s + b s^3 + c s^5 while U and V stay. The usual coefficients
are steep at 0 and do not converge: five steps send every singular value above 0.002 (of the norm) into
0.68 to 1.21, which is as good for Muon.

A and B are symmetric. The kernel computes the tiles on and below the diagonal and writes each of them twice,
which is nearly half of the work of two of the step's three products.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from millrace.kernels.support.checks import expect_shape
from millrace.kernels.support.compilation import Launch, meta
from millrace.kernels.support.packed import unit_stride
from millrace.kernels.support.registration import HAS_TRITON, register

if HAS_TRITON:
    import triton
    import triton.language as tl

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TILE, DEPTH, WARPS, STAGES = 128, 64, 8, 3
"""Rows and columns of an output tile, and columns of X loaded at a time. Three stages are 96 KB of shared
memory: two programs fit on a multiprocessor of an H100, and one multiplies while the other writes."""


def reference(
    stack: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
) -> Tensor:
    """The iteration in plain PyTorch, in the dtype of the stack."""
    a, b, c = coefficients
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


if HAS_TRITON:

    @triton.jit
    def newton_schulz_fwd_kernel(
        x,
        base,
        out,
        rows,
        columns,
        tiles,
        x_batch_stride,
        x_stride,
        alpha,
        beta,
        HAS_BASE: tl.constexpr,
        TILE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        batch = (tl.program_id(0) // tiles).to(tl.int64)
        number = tl.program_id(0) % tiles
        # Tile (i, j) with j <= i has number i (i+1) / 2 + j. The root may be one off by rounding.
        i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
        j = number - i * (i + 1) // 2

        # 64-bit offsets of the tiles, 32-bit ones within them: registers are what limits this kernel.
        place = tl.arange(0, TILE)
        column = tl.arange(0, DEPTH)
        within = place[:, None] * x_stride + column[None, :]
        left = x + batch * x_batch_stride + i.to(tl.int64) * TILE * x_stride + within
        right = x + batch * x_batch_stride + j.to(tl.int64) * TILE * x_stride + within
        left_rows = place < rows - i * TILE
        right_rows = place < rows - j * TILE
        total = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, columns, DEPTH):
            inside = (column < columns - start)[None, :]
            left_tile = tl.load(left + start, mask=left_rows[:, None] & inside, other=0.0)
            right_tile = tl.load(right + start, mask=right_rows[:, None] & inside, other=0.0)
            # ieee: without it FP32 operands would be rounded to TF32.
            total = tl.dot(left_tile, tl.trans(right_tile), total, input_precision="ieee")

        total *= alpha
        matrix = batch * rows * rows
        tile = matrix + i.to(tl.int64) * TILE * rows + j * TILE
        within = place[:, None] * rows + place[None, :]
        inside = left_rows[:, None] & right_rows[None, :]
        if HAS_BASE:
            total += beta * tl.load(base + tile + within, mask=inside, other=0.0).to(tl.float32)
        # The result is symmetric: half of the tiles are computed, and each is stored at both places.
        result = total.to(out.dtype.element_ty)
        tl.store(out + tile + within, result, mask=inside)
        if i != j:
            mirrored = matrix + j.to(tl.int64) * TILE * rows + i * TILE
            inside = right_rows[:, None] & left_rows[None, :]
            tl.store(out + mirrored + within, tl.trans(result), mask=inside)


def _symmetric_triton(x: Tensor, base: Tensor | None, alpha: float, beta: float) -> Tensor:
    count, rows, columns = x.shape
    if not count or rows <= TILE or (x.dtype == torch.float32 and x.is_cuda):
        # One tile has no mirror image, and FP32 has no matrix instructions here without losing digits.
        return _symmetric_eager(x, base, alpha, beta)
    x = unit_stride(x)
    base = None if base is None else base.contiguous()
    out = _symmetric_fake(x, base, alpha, beta)
    blocks = -(-rows // TILE)
    tiles = blocks * (blocks + 1) // 2
    newton_schulz_fwd_kernel[(count * tiles,)](
        x,
        base,
        out,
        rows,
        columns,
        tiles,
        x.stride(0),
        x.stride(1),
        alpha,
        beta,
        HAS_BASE=base is not None,
        TILE=TILE,
        DEPTH=DEPTH,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _symmetric_eager(x: Tensor, base: Tensor | None, alpha: float, beta: float) -> Tensor:
    if base is None:
        base, beta = x.new_zeros(()), 0.0
    return torch.baddbmm(base, x, x.mT, alpha=alpha, beta=beta)


def _symmetric_fake(x: Tensor, base: Tensor | None, alpha: float, beta: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


_symmetric_product = register(
    "symmetric_product(Tensor x, Tensor? base, float alpha, float beta) -> Tensor",
    eager=_symmetric_eager,
    triton=_symmetric_triton,
    fake=_symmetric_fake,
)


@register_flop_formula(torch.ops.millrace.symmetric_product)
def _symmetric_flops(x_shape: torch.Size, *_: object, **__: object) -> int:
    """Those of the whole product, not of the tiles computed: utilisation compares with a plain `bmm`."""
    count, rows, columns = x_shape
    return 2 * count * rows * rows * columns


def symmetric_product(x: Tensor, base: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha x x^T + beta base, computing only one triangle. No derivative.

    Args:
        x: (N, m, k).
        base: (N, m, m), each symmetric, in the dtype of x; or nothing to add.

    Returns:
        (N, m, m) in the dtype of x, accumulated in FP32.
    """
    expect_shape("x", x, "N", "m", "k")
    if base is not None:
        expect_shape("base", base, x.shape[0], x.shape[1], x.shape[1])
    return _symmetric_product(x, base, alpha, beta)


def newton_schulz(
    stack: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace each matrix U S V^T by about U V^T.

    Args:
        stack: (N, m, n) floating point; zero matrices stay zero.
        steps: how often the polynomial is applied.
        coefficients: a, b, c of p(s) = a s + b s^3 + c s^5.
        eps: added to the Frobenius norm, which is taken in FP32 before rounding to `dtype`.
        dtype: of the products. Default: BF16 on CUDA; FP32 on the CPU, or FP64 for an FP64 stack.

    Returns:
        (N, m, n), contiguous, in the dtype of the stack.

    Raises:
        ValueError: wrong shape, or a derivative is asked for (there is none).
    """
    expect_shape("stack", stack, "N", "m", "n")
    if stack.requires_grad and torch.is_grad_enabled():
        raise ValueError("newton_schulz has no derivative: call it under torch.no_grad() or detach the stack")
    wide = torch.promote_types(stack.dtype, torch.float32)
    if dtype is None:
        dtype = torch.bfloat16 if stack.is_cuda else wide
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=wide)
    # The smaller side first: the products are then m x m.
    x = ((stack.mT if tall else stack) / (norm + eps)).to(dtype).contiguous()
    for _ in range(steps):
        gram = symmetric_product(x)
        polynomial = symmetric_product(gram, gram, alpha=c, beta=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(stack.dtype).contiguous()


def configurations() -> Iterator[Launch]:
    """A square projection at width 1792; every other matrix of PRX gives the same kernels."""
    wgmma = frozenset({"newton_schulz_fwd_kernel"})
    for dtype in (torch.bfloat16, torch.float16):
        x = meta(4, 1792, 1792, dtype=dtype)
        yield Launch(f"product {dtype}", _symmetric_triton, (x, None, 1.0, 1.0), wgmma)
        yield Launch(f"polynomial {dtype}", _symmetric_triton, (x, x, 2.0315, -4.775), wgmma)
