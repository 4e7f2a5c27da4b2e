"""The rule of accuracy: right results pass always, wrong ones never, over many seeds.

Right ones are the same sums in another order. Wrong ones are small on purpose: what a kernel with one fault
computes, not noise.
"""

import math

import pytest
import torch

from millrace.kernels.support.accuracy import allowed_errors, errors, longest_sum

SEEDS = 200
ROWS, WIDTH = 96, 256


def ratio(got, exact, plain, dtype, terms):
    """Error over what is allowed, the worse of largest and RMS: right up to 1."""
    found, allowed = errors(got, exact), allowed_errors(exact, plain, dtype, terms)
    return max(found[which] / allowed[which] for which in found)


def attend(q, k, v):
    """Attention of rows (N, D): softmax(q k^T / sqrt(D)) v, written out."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    odds = torch.exp(logits - logits.amax(1, keepdim=True))
    return odds @ v / odds.sum(1, keepdim=True)


def online(q, k, v, tile=16):
    """The same as kernels do it: a running maximum, sum and result, a tile of keys at a time."""
    top = q.new_full((len(q), 1), -math.inf)
    total, out = q.new_zeros(len(q), 1), torch.zeros_like(q)
    for keys, values in zip(k.split(tile), v.split(tile), strict=True):
        logits = q @ keys.T * (1 / math.sqrt(q.shape[1]))
        new = torch.maximum(top, logits.amax(1, keepdim=True))
        odds, fade = torch.exp(logits - new), torch.exp(top - new)
        top, total, out = new, total * fade + odds.sum(1, keepdim=True), out * fade + odds @ values
    return out / total


def column_sums(x):
    return x.sum(0)


def one_by_one(x):
    """The order that errs the most."""
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


def normalise(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)


def normalise_by_moments(x):
    mean = x.mean(1, keepdim=True)
    return (x - mean) * torch.rsqrt((x * x).mean(1, keepdim=True) - mean * mean + 1e-6)


RIGHT = {
    "attention, online": (attend, online, 3),
    "attention, keys turned": (attend, lambda q, k, v: attend(q, k.flip(0), v.flip(0)), 3),
    "sums, one by one": (column_sums, one_by_one, 1),
    "sums, turned": (column_sums, lambda x: one_by_one(x.flip(0)), 1),
    "sums, two halves": (column_sums, lambda x: one_by_one(x[::2]) + one_by_one(x[1::2]), 1),
    "a loss": (
        lambda x: x.square().mean()[None],
        lambda x: (one_by_one(x.square().T).sum() / x.numel())[None],
        1,
    ),
    "products": (
        lambda x, y: x @ y.T,
        lambda x, y: sum(a @ b.T for a, b in zip(x.split(8, 1), y.split(8, 1), strict=True)),
        2,
    ),
    "norm": (normalise, normalise_by_moments, 1),
}


def shifted(x):
    return torch.cat((x[1:], x[:1]))


def bf16(x):
    return x.bfloat16().to(x.dtype)


def tf32(x):
    """Rounded to 10 bits of mantissa, as matrix instructions do unless told not to."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


WRONG = {
    "attention without its last key": (attend, lambda q, k, v: attend(q, k[:-1], v[:-1]), 3),
    "attention, values off by one": (attend, lambda q, k, v: attend(q, k, shifted(v)), 3),
    "attention, one query off by one": (
        attend,
        lambda q, k, v: attend(torch.cat((q[:-1], q[-2:-1])), k, v),
        3,
    ),
    "attention, logits in BF16": (attend, lambda q, k, v: attend(bf16(q), bf16(k), v), 3),
    "attention, values in BF16": (attend, lambda q, k, v: attend(q, k, bf16(v)), 3),
    "attention, TF32": (attend, lambda q, k, v: attend(tf32(q), tf32(k), tf32(v)), 3),
    "sums without the last row": (column_sums, lambda x: column_sums(x[:-1]), 1),
    "sums with a row twice": (column_sums, lambda x: column_sums(x) + x[-1], 1),
    "sums of a neighbour's row": (column_sums, lambda x: column_sums(x) - x[0] + x[0].roll(1), 1),
    "sums in BF16": (column_sums, lambda x: column_sums(bf16(x)), 1),
    "products in TF32": (lambda x, y: x @ y.T, lambda x, y: tf32(x) @ tf32(y).T, 2),
    "products without a column": (lambda x, y: x @ y.T, lambda x, y: x[:, :-1] @ y[:, :-1].T, 2),
    "norm, variance of n - 1": (normalise, lambda x: normalise(x) * math.sqrt(1 - 1 / WIDTH), 1),
    "norm, 1e-4 too large": (normalise, lambda x: normalise(x) * (1 + 1e-4), 1),
    "norm in BF16": (normalise, lambda x: normalise(bf16(x)), 1),
}


def ratios(formula, implementation, arguments, dtype=torch.float32):
    found = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(arguments)]
        exact = formula(*(x.double() for x in inputs))
        terms = longest_sum(exact, inputs)
        found.append(ratio(implementation(*inputs), exact, formula(*inputs), dtype, terms))
    return found


@pytest.mark.parametrize(("formula", "implementation", "arguments"), RIGHT.values(), ids=RIGHT)
def test_right_results_pass(formula, implementation, arguments):
    """With room: a GPU's approximate exponentials and roots are a few roundings worse than those here."""
    assert max(ratios(formula, implementation, arguments)) < 0.5


@pytest.mark.parametrize(("formula", "implementation", "arguments"), WRONG.values(), ids=WRONG)
def test_wrong_results_fail(formula, implementation, arguments):
    assert min(ratios(formula, implementation, arguments)) > 2


@pytest.mark.parametrize("rows", [100, 8191])
def test_one_row_of_many_is_missed(rows):
    """A sum over thousands of rows, of which a kernel has left out the last."""
    for seed in range(20):
        x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
        exact, terms = x.double().sum(0), longest_sum(x[0], [x])
        assert terms == rows
        assert ratio(one_by_one(x), exact, x.sum(0), x.dtype, terms) < 0.5
        assert ratio(x[:-1].sum(0), exact, x.sum(0), x.dtype, terms) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_length_counts_in_the_precision_of_the_sums(dtype):
    """16-bit kernels add in FP32, so in 16 bit a long sum allows next to nothing more."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, long = (allowed_errors(x, x, dtype, terms)["largest"] for terms in (1, 10_000))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert long - short == pytest.approx(99 * eps * x.abs().max().item(), rel=1e-6)


def test_nan_is_an_error():
    x = torch.ones(3, dtype=torch.float64)
    found = errors(torch.tensor([1.0, float("nan"), 1.0]), x)
    allowed = allowed_errors(x, x, torch.float32, 3)
    assert not any(found[which] <= allowed[which] for which in allowed)


@pytest.mark.parametrize(
    ("result", "inputs", "terms"),
    [((5, 7), [(5, 7)], 7), ((1,), [(100, 7)], 700), ((7,), [(100, 7), (2, 7)], 100), ((0, 7), [(0, 7)], 7)],
    ids=str,
)
def test_longest_sum(result, inputs, terms):
    assert longest_sum(torch.empty(result), [torch.empty(shape) for shape in inputs]) == terms
