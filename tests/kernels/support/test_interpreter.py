"""The interpreter's BF16 and FP8 against PyTorch's conversions, and against a definition of rounding."""

import pytest
import torch

from millrace.kernels.support.registration import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")

if INTERPRETING:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def _convert(source, target, size, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(
            target + at, tl.load(source + at, mask=at < size).to(target.dtype.element_ty), mask=at < size
        )

    @triton.jit
    def _truncate(source, target, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        value = tl.load(source + at).to(target.dtype.element_ty, fp_downcast_rounding="rtz")
        tl.store(target + at, value)

    @triton.jit
    def _multiply(a, b, c, out, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        total = tl.dot(tl.load(a + at), tl.load(b + at), tl.load(c + at), input_precision="ieee")
        tl.store(out + at, total)

    @triton.jit
    def _compute(x, out, WHICH: tl.constexpr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        value = tl.load(x + at)
        if WHICH == "sum":
            value = value + value
        elif WHICH == "half more":
            value = value + 0.5
        elif WHICH == "less":
            value = tl.where(value < value, value, value)
        elif WHICH == "minus":
            value = -value
        elif WHICH == "magnitude":
            value = tl.abs(value)
        elif WHICH == "fma":
            value = tl.fma(value, value, value)
        elif WHICH == "total":
            value = tl.sum(value, 0)
        elif WHICH == "atomic":
            tl.atomic_add(out + at, value)
        tl.store(out + at, value)

    @triton.jit
    def _move(x, out, SIZE: tl.constexpr):
        """Everything that only moves a value: it stays what it is."""
        at = tl.arange(0, SIZE)
        even, odd = tl.split(tl.reshape(tl.load(x + at, mask=at > 0, other=1.0), (SIZE // 2, 2)))
        value = tl.reshape(tl.join(even, odd), (SIZE,))
        value = tl.where(at < 3, value, tl.full((SIZE,), -1.5, x.dtype.element_ty))
        tl.store(out + at, tl.trans(value[None, :])[:, 0] if SIZE == 1 else value)


NARROW = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
"""With integers of the same size."""
formats = pytest.mark.parametrize("narrow", NARROW, ids=["bf16", "e4m3", "e5m2"])


def convert(source, dtype):
    target = torch.empty(len(source), dtype=dtype)
    _convert[(1,)](source, target, len(source), BLOCK=triton.next_power_of_2(len(source)))
    return target


def patterns(narrow):
    """All patterns of bits of a format."""
    return torch.arange(2 ** (8 * narrow.itemsize), dtype=torch.int32).to(NARROW[narrow]).view(narrow)


def numbers(narrow):
    """Every finite number of a format, ascending, in float64."""
    every = patterns(narrow).double()
    return every[every.isfinite()].unique()


def hard_to_round(narrow):
    """FP32: a format's numbers, halves between neighbours, what FP32 has to either side of those; infinities,
    NaN, zeros and subnormals of FP32."""
    every = numbers(narrow)
    middle = ((every[1:] + every[:-1]) / 2).float()
    infinity = torch.tensor(torch.inf)
    sides = [torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)]
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e-45, 1e-39])
    return torch.cat((every.float(), middle, *sides, special))


@formats
def test_rounds_to_the_nearest_number_halves_to_even(narrow):
    """By float64 distances to the numbers of the format, and its integer for which is even."""
    every = numbers(narrow)
    x = hard_to_round(narrow)
    x = x[x.isfinite() & (x.abs() <= every[-1])]
    got = convert(x, narrow)
    place = torch.searchsorted(every, x.double()).clamp(1, len(every) - 1)
    below, above = every[place - 1], every[place]
    to_below, to_above = (x.double() - below).abs(), (above - x.double()).abs()
    assert torch.equal((got.double() - x.double()).abs(), torch.minimum(to_below, to_above))
    halves = to_below == to_above
    assert halves.sum() > len(every) // 2
    assert not (got.view(NARROW[narrow])[halves].int() & 1).any()
    assert torch.equal(got.double().signbit(), x.signbit())


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64])
def test_bf16_is_that_of_pytorch(source):
    x = hard_to_round(torch.bfloat16).to(source)
    assert x.isnan().any()
    assert x.isinf().any()
    torch.testing.assert_close(convert(x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_fp8_is_that_of_pytorch_and_saturates(narrow):
    """`cvt.rn.satfinite` of a GPU: what is too large becomes the largest number, NaN stays."""
    x, most = hard_to_round(narrow), torch.finfo(narrow).max
    got = convert(torch.cat((x, x * 1e6)), narrow)
    want = torch.cat((x, x * 1e6)).clamp(-most, most).to(narrow)
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=0, equal_nan=True)
    assert got.isnan().sum() == 2


@formats
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64])
def test_widening_keeps_the_number(narrow, target):
    every = patterns(narrow)
    torch.testing.assert_close(convert(every, target), every.to(target), rtol=0, atol=0, equal_nan=True)


def test_integers_become_bf16_and_back():
    x = torch.arange(-512, 512, dtype=torch.int32)
    got = convert(x, torch.bfloat16)
    assert torch.equal(got, x.bfloat16())
    assert torch.equal(convert(got, torch.int32), x.bfloat16().int())


@formats
def test_dots_see_the_numbers_and_add_in_fp32(narrow):
    a, b = (torch.randn(16, 16).to(narrow) for _ in range(2))
    c, out = torch.randn(16, 16), torch.empty(16, 16)
    _multiply[(1,)](a, b, c, out, SIZE=16)
    exact = a.double() @ b.double() + c.double()
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    assert ((out - exact).abs() <= 17 * 2.0**-24 * size).all()


def test_moving_values_keeps_them():
    x, out = torch.randn(8).bfloat16(), torch.empty(8, dtype=torch.bfloat16)
    _move[(1,)](x, out, SIZE=8)
    assert out.tolist() == [1.0, *x[1:3].tolist(), *[-1.5] * 5]


@pytest.mark.parametrize(
    ("which", "named"),
    {
        "sum": "add",
        "half more": "add",
        "less": "less",
        "minus": "subtract",
        "magnitude": "fabs",
        "fma": "fma",
        "total": "a reduction",
        "atomic": "atomic_rmw",
    }.items(),
)
def test_computing_with_bf16_is_an_error(which, named):
    x = torch.ones(4, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    with pytest.raises(InterpreterError, match=rf"({named}) of bf16 .* a kernel upcasts to fp32 first"):
        _compute[(1,)](x, out, WHICH=which, SIZE=4)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_another_rounding_is_refused(narrow):
    """No kernel asks for one; an interpreter that rounded to nearest all the same would hide that it did."""
    with pytest.raises(InterpreterError, match=r"rounds to nearest even here, not by .*RTZ"):
        _truncate[(1,)](torch.ones(4), torch.empty(4, dtype=narrow), BLOCK=4)
