"""newton_schulz against its polynomial applied to the singular values in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.kernels import newton_schulz
from millrace.kernels.ops.newton_schulz import COEFFICIENTS, reference, symmetric_product

SHAPES = [(3, 6, 9), (1, 9, 6), (2, 7, 7), (1, 1, 5), (2, 140, 150)]


def polynomial(values, steps=5, coefficients=COEFFICIENTS):
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def formula(stack, eps=1e-7, **options):
    u, s, vh = torch.linalg.svd(stack.cpu().double(), full_matrices=False)
    return u * polynomial(s / (s.square().sum(1, keepdim=True).sqrt() + eps), **options)[:, None] @ vh


def rms(error):
    return error.cpu().double().square().mean().sqrt()


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_singular_values_in_float64(shape, device):
    stack = torch.randn(shape, dtype=torch.float64, device=device)
    got = newton_schulz(stack, dtype=torch.float64)
    torch.testing.assert_close(got.cpu(), formula(stack), rtol=0, atol=1e-11)
    torch.testing.assert_close(reference(stack).cpu(), formula(stack), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_plain_pytorch(shape, device, dtype):
    stack = torch.randn(shape, device=device)
    exact = formula(stack)
    error = rms(newton_schulz(stack, dtype=dtype).cpu() - exact)
    assert error <= 2 * rms(reference(stack.to(dtype)).cpu() - exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 1}, {"steps": 7, "coefficients": (1.5, -0.5, 0.0)}]
)
def test_steps_and_coefficients(options):
    stack = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(stack, **options), formula(stack, **options))


def test_five_steps_bring_singular_values_near_one(device):
    """Directions down to 0.002 of the norm; a random matrix of this size is well inside."""
    values = torch.logspace(0, -2.5, 12, dtype=torch.float64)
    assert 0.002 < values[-1] / values.norm() < 0.003
    left, right = (torch.linalg.qr(torch.randn(1, n, 12, dtype=torch.float64))[0] for n in (12, 20))
    for stack in (left * values @ right.mT, torch.randn(3, 64, 48)):
        got = torch.linalg.svdvals(newton_schulz(stack.to(device)).cpu().double())
        assert got.min() > 0.65
        assert got.max() < 1.25


def test_default_dtypes(device):
    """BF16 products on CUDA, FP32 or better on the CPU; the result has the dtype of the stack."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stack = torch.randn(1, 8, 8, device=device).to(dtype)
        used = torch.bfloat16 if device == "cuda" else torch.promote_types(dtype, torch.float32)
        got = newton_schulz(stack)
        assert got.dtype == dtype
        assert torch.equal(got, newton_schulz(stack, dtype=used))


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 6, 4)])
def test_zeros_stay_zero_and_scale_does_not_matter(shape, device):
    assert newton_schulz(torch.zeros(shape, device=device)).abs().max() == 0
    stack = torch.randn(shape, device=device)
    for factor in (2.0**-40, 2.0**40):
        torch.testing.assert_close(newton_schulz(stack * factor, eps=0.0), newton_schulz(stack, eps=0.0))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(shape):
    assert newton_schulz(torch.zeros(shape)).shape == shape


def test_result_is_contiguous_and_the_stack_unchanged(device):
    stack = torch.randn(2, 9, 4, device=device).mT
    before = stack.clone()
    assert newton_schulz(stack).is_contiguous()
    assert torch.equal(stack, before)


@pytest.mark.parametrize("added", [False, True], ids=["product", "sum"])
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 130, 70), (1, 257, 37), (1, 300, 130)])
def test_symmetric_product_matches_bmm(shape, added, device, dtype):
    """From 129 rows on there are tiles off the diagonal, which are written twice."""
    x = torch.randn(shape).to(device, dtype)
    base = torch.randn(shape[0], shape[1], shape[1])
    base = (base + base.mT).to(device, dtype) if added else None
    got = symmetric_product(x, base, alpha=1.5, beta=-0.25)
    plain, exact = (1.5 * torch.bmm(wide, wide.mT) for wide in (x, x.double()))
    if added:
        plain, exact = plain - 0.25 * base, exact - 0.25 * base.double()
    assert got.dtype == dtype
    largest = torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + largest
    assert rms(got - exact) <= 2 * rms(plain - exact) + torch.finfo(dtype).eps


def test_symmetric_product_of_strided_rows(device):
    x = torch.randn(2, 131, 90, device=device)[:, :, 7:50]
    torch.testing.assert_close(symmetric_product(x), x @ x.mT, rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 43, 131, device=device).mT
    torch.testing.assert_close(symmetric_product(x), x @ x.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 130])
def test_is_well_registered(rows, device):
    x, base = torch.randn(2, rows, 6, device=device), torch.randn(2, rows, rows, device=device)
    operator = torch.ops.millrace.symmetric_product.default
    torch.library.opcheck(operator, (x, None, 1.0, 1.0))
    torch.library.opcheck(operator, (x, base + base.mT, 0.5, 2.0))


def test_compiles_as_one_graph(device):
    stack = torch.randn(2, 4, 6, device=device)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(stack), newton_schulz(stack))


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4)])
def test_flops_are_those_of_three_whole_products_a_step(shape):
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(shape), steps=3)
    assert counter.get_total_flops() == 3 * 2 * 2 * (4 * 4 * 6 + 4 * 4 * 4 + 4 * 4 * 6)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"stack has shape \(3, 4\), expected \(N, m, n\)"):
        newton_schulz(torch.zeros(3, 4))
    with pytest.raises(
        ValueError, match=r"newton_schulz has no derivative: call it under torch\.no_grad\(\)"
    ):
        newton_schulz(torch.zeros(1, 3, 4, requires_grad=True))
    with torch.no_grad():
        newton_schulz(torch.zeros(1, 3, 4, requires_grad=True))
    with pytest.raises(ValueError, match=r"base has shape \(1, 3, 4\), expected \(1, 3, 3\)"):
        symmetric_product(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
