"""fp8_linear against float64, within what the rounding of its operands to eight bits can do."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.kernels import fp8_linear
from millrace.kernels.ops.fp8_linear import GRADIENTS, VALUES, missing, padded_rows, reference, rounded

SHAPES = [(1, 16, 16), (16, 32, 48), (7, 64, 32), (129, 144, 272), (257, 16, 160)]
"""T, K, N: rows that no tile divides, and columns of more than one tile."""
NEAREST = {VALUES: 2.0**-4, GRADIENTS: 2.0**-3}
"""Half a step, as a share of the value."""
HALF_SMALLEST = {VALUES: 2.0**-10, GRADIENTS: 2.0**-17}


def unit(x, dtype):
    """Smallest power of two p such that the largest |x| / p is at most the format's largest number."""
    largest = x.abs().max().item()
    p = 2.0 ** math.ceil(math.log2(largest / torch.finfo(dtype).max))
    assert largest / p <= torch.finfo(dtype).max < 2 * largest / p
    return p


def operand_error(x, dtype):
    """How far each element may be from what the product sees."""
    return (x.abs() * NEAREST[dtype]).clamp(min=unit(x, dtype) * HALF_SMALLEST[dtype])


def assert_within(got, a, b, a_dtype, b_dtype):
    """`got` is a b, up to the rounding of a and b, of the sum in FP32, and of the result."""
    a, b = a.double().cpu(), b.double().cpu()
    da, db = operand_error(a, a_dtype), operand_error(b, b_dtype)
    exact, size = a @ b, a.abs() @ b.abs()
    allowed = da @ b.abs() + a.abs() @ db + da @ db
    allowed += size * a.shape[1] * 2.0**-22 + (exact.abs() + allowed) * torch.finfo(got.dtype).eps
    assert got.shape == exact.shape
    assert ((got.double().cpu() - exact).abs() <= allowed).all()


def with_gradients(x, weight, grad, **options):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = fp8_linear(x, weight, **options)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))


@pytest.mark.parametrize(("tokens", "inner", "outer"), SHAPES)
def test_products_are_as_exact_as_their_operands(tokens, inner, outer, device, dtype):
    x, weight = torch.randn(tokens, inner), torch.randn(outer, inner) * 0.02
    grad = torch.randn(tokens, outer) * 1e-3
    x, weight, grad = (value.to(device, dtype) for value in (x, weight, grad))
    y, grad_x, grad_weight = with_gradients(x, weight, grad)
    assert {y.dtype, grad_x.dtype, grad_weight.dtype} == {dtype}
    assert_within(y, x, weight.T, VALUES, VALUES)
    assert_within(grad_x, grad, weight, GRADIENTS, VALUES)
    assert_within(grad_weight, grad.T, x, GRADIENTS, VALUES)


@pytest.mark.parametrize("format_", [VALUES, GRADIENTS], ids=["e4m3", "e5m2"])
def test_operands_are_the_nearest_numbers_of_the_format(format_):
    """Found in the list of all its numbers, over magnitudes from the largest to those that become zero."""
    numbers = torch.arange(256, dtype=torch.uint8).view(format_).double()
    numbers = numbers[numbers.isfinite()]
    x = torch.randn(999) * 2.0 ** torch.empty(999).uniform_(-40, 0)
    scaled = x.double() / unit(x, format_)
    distance = (scaled[:, None] - numbers).abs().amin(1)
    got = rounded(x, format_).double() / unit(x, format_)
    assert torch.equal((got - scaled).abs(), distance)
    assert 0 < (got == 0).sum() < 999


@pytest.mark.parametrize(("tokens", "inner", "outer"), SHAPES)
def test_every_path_multiplies_the_same_numbers(tokens, inner, outer, device):
    """Up to the order of the sum; with Triton's interpreter and on CUDA the kernels have cast them."""
    x, weight = torch.randn(tokens, inner), torch.randn(outer, inner)
    x = x * 2.0 ** torch.randint(-24, 1, (tokens, 1))  # many elements where the format's steps are equal
    grad = torch.randn(tokens, outer)
    grad = grad * 2.0 ** torch.randint(-40, 1, (tokens, 1))
    results = with_gradients(*(value.to(device) for value in (x, weight, grad)))
    small_x, small_weight, small_grad = (
        rounded(value, format_).double()
        for value, format_ in ((x, VALUES), (weight, VALUES), (grad, GRADIENTS))
    )
    wanted = small_x @ small_weight.T, small_grad @ small_weight, small_grad.T @ small_x
    for got, want in zip(results, wanted, strict=True):
        scale = want.abs().max()
        # Hopper's fast accumulation keeps about 14 bits of partial sums.
        torch.testing.assert_close(
            got.double().cpu() / scale, want / scale, rtol=0, atol=1e-6 if device == "cpu" else 1e-3
        )
    torch.testing.assert_close(reference(x, weight), wanted[0].float(), rtol=1e-5, atol=1e-5)


def test_agrees_with_the_product_of_pytorch():
    """`torch._scaled_mm`, which CUDA uses, exists on the CPU too."""
    x, weight = torch.randn(33, 64), torch.randn(48, 64)
    scales = torch.tensor(unit(x, VALUES)), torch.tensor(unit(weight, VALUES))
    small = [(value / scale).to(VALUES) for value, scale in zip((x, weight), scales, strict=True)]
    theirs = torch._scaled_mm(
        small[0], small[1].T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.float32
    )
    torch.testing.assert_close(fp8_linear(x, weight), theirs)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-30, 1e4, 3e38])
def test_any_magnitude(largest, device):
    """Nothing overflows or vanishes for its size alone; zeros stay zeros."""
    x = torch.randn(5, 32, device=device)
    x *= 0 if largest == 0 else largest / x.abs().max()
    weight = torch.eye(32, device=device)
    y, grad_x, grad_weight = with_gradients(x, weight, torch.ones(5, 32, device=device))
    for value in (y, grad_x, grad_weight):
        assert not value.isnan().any()
    if largest < 2.0**-126:
        assert (y - x).abs().max() <= max(largest, 2.0**-136)
    else:
        assert_within(y, x, weight, VALUES, VALUES)
    assert torch.equal(grad_x, torch.ones_like(grad_x))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad, device, dtype):
    """A saturated infinity would pass the check of the loss; here nothing of the product is a number."""
    x, weight = (
        torch.randn(5, 32, device=device, dtype=dtype),
        torch.randn(16, 32, device=device, dtype=dtype),
    )
    grad = torch.randn(5, 16, device=device, dtype=dtype)
    spoiled = x.clone()
    spoiled[2, 3] = bad
    y, grad_x, grad_weight = with_gradients(spoiled, weight, grad)
    assert y.isnan().all()
    assert grad_x.isfinite().all()
    assert grad_weight.isnan().all()
    grad[1, 1] = bad
    y, grad_x, grad_weight = with_gradients(x, weight, grad)
    assert y.isfinite().all()
    assert grad_x.isnan().all()
    assert grad_weight.isnan().all()


def test_no_rows(device):
    x, weight = torch.randn(0, 32, device=device), torch.randn(16, 32, device=device)
    y, grad_x, grad_weight = with_gradients(x, weight, torch.zeros(0, 16, device=device))
    assert y.shape == (0, 16)
    assert grad_x.shape == (0, 32)
    assert torch.equal(grad_weight, torch.zeros(16, 32, device=device))


def test_strided_tensors(device):
    """Slices, transposed and expanded ones give what their copies give."""
    wide, tall = torch.randn(9, 80, device=device), torch.randn(32, 48, device=device)
    grad = torch.randn(48, device=device).expand(9, 48)
    strided = with_gradients(wide[:, 8:40], tall.T, grad)
    copied = with_gradients(wide[:, 8:40].contiguous(), tall.T.contiguous(), grad.contiguous())
    turned = with_gradients(wide[:, 8:40].T.contiguous().T, tall.T, grad)
    for got, again, want in zip(strided, turned, copied, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(again, want)


def test_large(device, many):
    x, weight = torch.randn(many, 48, device=device), torch.randn(32, 48, device=device)
    assert_within(fp8_linear(x, weight), x, weight.T, VALUES, VALUES)


def test_autocast_decides_the_dtype_of_the_result(device):
    """Of the result alone: gradients keep the dtypes of what they belong to, so that of an FP32 weight is not
    rounded to BF16 on its way."""
    x, weight = torch.randn(5, 32, device=device), torch.randn(16, 32, device=device)
    grad = torch.randn(5, 16, device=device)
    plain = with_gradients(x, weight, grad.bfloat16().float())
    with torch.autocast(device, torch.bfloat16):
        y, grad_x, grad_weight = with_gradients(x, weight, grad)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(y, plain[0].bfloat16())
    assert torch.equal(grad_x, plain[1])
    assert torch.equal(grad_weight, plain[2])
    mixed = fp8_linear(x.bfloat16(), weight)
    assert mixed.dtype == torch.bfloat16
    assert fp8_linear(x.bfloat16(), weight, dtype=torch.float32).dtype == torch.float32


def test_only_the_gradients_that_are_asked_for(device):
    x, weight = torch.randn(5, 32, device=device), torch.randn(16, 32, device=device)
    grad = torch.randn(5, 16, device=device)
    _, *both = with_gradients(x, weight, grad)
    for i, name in enumerate(("x", "weight")):
        leaves = {"x": x.detach().clone(), "weight": weight.detach().clone()}
        leaves[name].requires_grad_()
        (got,) = torch.autograd.grad(fp8_linear(**leaves), leaves[name], grad)
        assert torch.equal(got, both[i])


def test_keeps_one_byte_of_a_value_for_backward():
    """Of x, in FP8 and with its rows padded; the weight is the parameter itself."""
    x, weight = torch.randn(40, 64), torch.randn(32, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, weight)
    assert any(t is weight for t in kept)
    others = [t for t in kept if t is not weight]
    assert sum(t.numel() * t.element_size() for t in others if t.dim()) == padded_rows(40) * 64
    assert padded_rows(40) == 48


def test_counts_its_products(device):
    x, weight = torch.randn(32, 64, device=device), torch.randn(48, 64, device=device)
    with FlopCounterMode(display=False) as counter:
        with_gradients(x, weight, torch.randn(32, 48, device=device))
    assert counter.get_total_flops() == 3 * 2 * 32 * 64 * 48


def test_is_well_registered(device, assert_well_registered):
    x = torch.randn(5, 32, device=device, requires_grad=True)
    weight = torch.randn(16, 32, device=device, requires_grad=True)
    assert_well_registered(fp8_linear, x, weight)


@pytest.mark.cuda
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(8192, 1792, 5376), (1000, 6272, 1792)])
def test_cuda_agrees_with_the_emulation(tokens, inner, outer):
    """At the sizes of a block, in the dtypes of training: BF16 rows, FP32 weights."""
    if reason := missing(torch.device("cuda")):
        pytest.skip(reason)
    x, weight = torch.randn(tokens, inner).bfloat16(), torch.randn(outer, inner) * inner**-0.5
    grad = (torch.randn(tokens, outer) / tokens).bfloat16()
    emulated = with_gradients(x, weight, grad)
    got = with_gradients(x.cuda(), weight.cuda(), grad.cuda())
    for mine, want in zip(got, emulated, strict=True):
        assert mine.dtype == want.dtype
        error = (mine.double().cpu() - want.double()).abs().max() / want.double().abs().max()
        assert error <= 4e-3  # one rounding to BF16, and Hopper's accumulation


def test_says_which_argument_is_wrong():
    weight = torch.zeros(16, 32)
    with pytest.raises(ValueError, match=r"x has shape \(32,\), expected \(T, K\)"):
        fp8_linear(torch.zeros(32), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(16, 32\), expected \(N, 48\)"):
        fp8_linear(torch.zeros(4, 48), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(24, 32\), FP8 products take multiples of 16"):
        fp8_linear(torch.zeros(4, 32), torch.zeros(24, 32))


def test_says_what_the_device_lacks(monkeypatch):
    assert missing(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert missing(torch.device("cuda")) == "FP8 products need compute capability 8.9, NVIDIA A100 has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert missing(torch.device("cuda")) is None
