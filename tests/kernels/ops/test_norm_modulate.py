"""norm_modulate against its equation."""

import pytest
import torch

from millrace.kernels import norm_modulate

CASES = {
    "one token": ((1,), 64),
    "empty in the middle": ((3, 0, 5), 72),
    "empty at both ends": ((0, 4, 0), 64),
    "width 1792": ((2, 3), 1792),
    "width 3584": ((3,), 3584),
    "uniform": ((4, 4), 96),
}


def formula(rows, eps=1e-6):
    def evaluate(x, modulation):
        parts = []
        for b, span in enumerate(rows):
            sample, shift, scale = x[span], modulation[b, 0], modulation[b, 1]
            mean = sample.sum(1, keepdim=True) / sample.shape[1]
            variance = ((sample - mean) ** 2).sum(1, keepdim=True) / sample.shape[1]
            parts.append((1 + scale) * (sample - mean) / torch.sqrt(variance + eps) + shift)
        return torch.cat(parts)

    return evaluate


@pytest.mark.parametrize(("lengths", "width"), CASES.values(), ids=CASES)
def test_matches_the_equation(lengths, width, offsets, spans, assert_accurate):
    """Shift and scale come as the model makes them: slices of one (B, depth, 6, C) projection."""
    cu_seqlens = offsets(*lengths)

    def operation(x, modulation):
        shift, scale, *_ = modulation.unflatten(1, (2, 6)).unbind(1)[0].unbind(1)
        assert len(lengths) == 1 or not shift.is_contiguous()
        return norm_modulate(x, shift, scale, cu_seqlens)

    assert_accurate(
        operation,
        formula(spans(*lengths)),
        x=torch.randn(sum(lengths), width) * 2 + 1,
        modulation=torch.randn(len(lengths), 12, width),
    )


def test_strided_rows(offsets, spans, assert_accurate):
    cu_seqlens = offsets(3, 2)
    in_halves = formula(spans(3, 2))
    assert_accurate(
        lambda x, modulation: norm_modulate(x[:, 64:], *modulation.unbind(1), cu_seqlens),
        lambda x, modulation: in_halves(x[:, 64:], modulation),
        x=torch.randn(5, 128),
        modulation=torch.randn(2, 2, 64),
    )


def test_eps_bounds_the_gain_of_a_constant_row(offsets, device):
    """A row without variance becomes its sample's shift, whatever its level."""
    x = torch.full((3, 64), 7.0, device=device)
    shift, scale = torch.randn(2, 64, device=device), torch.randn(2, 64, device=device)
    y = norm_modulate(x, shift, scale, offsets(1, 2))
    torch.testing.assert_close(y, shift[[0, 1, 1]])


def test_eps_is_used(offsets, spans, assert_accurate):
    cu_seqlens = offsets(2, 1)
    assert_accurate(
        lambda x, modulation: norm_modulate(x, *modulation.unbind(1), cu_seqlens, eps=0.5),
        formula(spans(2, 1), eps=0.5),
        x=torch.randn(3, 64),
        modulation=torch.randn(2, 2, 64),
    )


def test_modulation_may_have_another_dtype_than_x(offsets, spans, device):
    """Activations in bf16, modulation in FP32: only the result is rounded."""
    x = torch.randn(5, 64, device=device).bfloat16()
    modulation = torch.randn(2, 2, 64, device=device)
    y = norm_modulate(x, *modulation.unbind(1), offsets(2, 3))
    exact = formula(spans(2, 3))(x.double(), modulation.double())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("given", [4, 9, None])
def test_max_seqlen_only_chooses_the_path(given, offsets, device):
    """4 takes the uniform path; the bound 9 and None take the general one. Same values, same gradients."""
    x = torch.randn(8, 64, dtype=torch.float64, device=device)
    modulation = torch.randn(2, 2, 64, dtype=torch.float64, device=device)
    results = []
    for max_seqlen in (4, given):
        leaves = x.clone().requires_grad_(), modulation.clone().requires_grad_()
        y = norm_modulate(leaves[0], *leaves[1].unbind(1), offsets(4, 4), max_seqlen=max_seqlen)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for uniform, general in zip(*results, strict=True):
        torch.testing.assert_close(uniform, general, rtol=1e-12, atol=1e-12)


def test_many_tokens(offsets, many, monkeypatch):
    """Thousands of rows in one sample: programs take several rows, and the last of them fewer."""
    monkeypatch.setattr("millrace.kernels.support.rows.PROGRAMS", many // 16)
    x, modulation = torch.randn(many, 8).requires_grad_(), torch.randn(1, 2, 8).requires_grad_()
    y = norm_modulate(x, *modulation.unbind(1), offsets(many), max_seqlen=many)
    exact = formula([slice(0, many)])(x.double(), modulation.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    grad, exact_grad = (torch.autograd.grad(out.sin().sum(), (x, modulation)) for out in (y, exact))
    for got, want in zip(grad, exact_grad, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-3)


def test_is_well_registered(offsets, device, assert_well_registered):
    cu_seqlens = offsets(3, 0, 2)
    modulation = torch.randn(3, 6, 24, device=device, requires_grad=True)
    assert_well_registered(
        lambda x, modulation: norm_modulate(x, modulation[:, 0], modulation[:, 1], cu_seqlens, max_seqlen=3),
        torch.randn(5, 24, device=device, requires_grad=True),
        modulation,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(5)}, r"x has shape \(5,\), expected \(T, C\)"),
        ({"shift": torch.zeros(3, 8)}, r"shift has shape \(3, 8\), expected \(2, 8\)"),
        ({"scale": torch.zeros(2, 7)}, r"scale has shape \(2, 7\), expected \(2, 8\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens is \(2,\) torch.int64, expected .* torch.int32"),
        (
            {"cu_seqlens": torch.tensor([0.0, 5.0])},
            r"cu_seqlens is \(2,\) torch.float32, expected .* torch.int32",
        ),
        (
            {"cu_seqlens": torch.zeros(1, dtype=torch.int32)},
            r"cu_seqlens is \(1,\) torch.int32, expected \(B\+1,\)",
        ),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "x": torch.zeros(5, 8),
        "shift": torch.zeros(2, 8),
        "scale": torch.zeros(2, 8),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        norm_modulate(**right | wrong)
