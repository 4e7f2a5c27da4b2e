"""gated_residual, and its fusion with the next norm, against their equations."""

import pytest
import torch

from millrace.kernels import gated_residual, gated_residual_norm_modulate

CASES = {
    "one token": ((1,), 64),
    "empty in the middle": ((3, 0, 5), 72),
    "width 1792": ((2, 3), 1792),
    "width 3584": ((3,), 3584),
    "uniform": ((4, 4), 96),
}
GATE, SHIFT, SCALE = 2, 3, 4  # places in the six modulation vectors of a block


def residual_formula(rows):
    def evaluate(x, branch, modulation):
        return torch.cat([x[s] + modulation[b, GATE] * branch[s] for b, s in enumerate(rows)])

    return evaluate


def fused_formula(rows, eps=1e-6):
    def evaluate(x, branch, modulation):
        total, parts = residual_formula(rows)(x, branch, modulation), []
        for b, span in enumerate(rows):
            sample = total[span]
            centred = sample - sample.sum(1, keepdim=True) / sample.shape[1]
            deviation = torch.sqrt((centred**2).sum(1, keepdim=True) / sample.shape[1] + eps)
            parts.append((1 + modulation[b, SCALE]) * centred / deviation + modulation[b, SHIFT])
        return total, torch.cat(parts)

    return evaluate


def inputs(lengths, width):
    return {
        "x": torch.randn(sum(lengths), width) + 0.5,
        "branch": torch.randn(sum(lengths), width),
        "modulation": torch.randn(len(lengths), 6, width),
    }


@pytest.mark.parametrize(("lengths", "width"), CASES.values(), ids=CASES)
def test_residual_matches_the_equation(lengths, width, offsets, spans, assert_accurate):
    cu_seqlens = offsets(*lengths)
    assert_accurate(
        lambda x, branch, modulation: gated_residual(x, branch, modulation.unbind(1)[GATE], cu_seqlens),
        residual_formula(spans(*lengths)),
        **inputs(lengths, width),
    )


@pytest.mark.parametrize(("lengths", "width"), CASES.values(), ids=CASES)
def test_fusion_matches_the_equation(lengths, width, offsets, spans, assert_accurate):
    """Both outputs carry gradient: x' into the next block's residual, y into the MLP."""
    cu_seqlens = offsets(*lengths)

    def operation(x, branch, modulation):
        _, _, gate, shift, scale, _ = modulation.unbind(1)
        return gated_residual_norm_modulate(x, branch, gate, shift, scale, cu_seqlens)

    assert_accurate(operation, fused_formula(spans(*lengths)), **inputs(lengths, width))


def test_fusion_uses_eps(offsets, spans, assert_accurate):
    cu_seqlens = offsets(2, 1)

    def operation(x, branch, modulation):
        _, _, gate, shift, scale, _ = modulation.unbind(1)
        return gated_residual_norm_modulate(x, branch, gate, shift, scale, cu_seqlens, eps=0.5)

    assert_accurate(operation, fused_formula(spans(2, 1), eps=0.5), **inputs((2, 1), 64))


def test_a_closed_gate_leaves_x_as_it_is(offsets, dtype, device):
    """adaLN-zero starts every block as the identity, to the bit."""
    x = torch.randn(5, 64, device=device).to(dtype)
    branch = torch.randn(5, 64, device=device).to(dtype)
    assert torch.equal(gated_residual(x, branch, torch.zeros(2, 64, device=device), offsets(2, 3)), x)


def test_the_sum_is_rounded_once(offsets, device):
    """In bf16 gate * branch = 1 + 2^-7 + 2^-14 would round to 1 + 2^-7; FP32 keeps it until x cancels it."""
    near_one = torch.full((1, 64), 1.0078125, dtype=torch.bfloat16, device=device)
    product = 1.0078125**2
    x = torch.full((1, 64), -1.015625, dtype=torch.bfloat16, device=device)
    out = gated_residual(x, near_one, near_one, offsets(1))
    assert torch.equal(out.float(), torch.full((1, 64), product - 1.015625, device=device))


@pytest.mark.parametrize("given", [4, 9, None])
def test_max_seqlen_only_chooses_the_path(given, offsets, device):
    """4 takes the uniform path; the bound 9 and None take the general one. Same values, same gradients."""
    start = {name: value.double().to(device) for name, value in inputs((4, 4), 64).items()}
    results = []
    for max_seqlen in (4, given):
        leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        _, _, gate, shift, scale, _ = leaves["modulation"].unbind(1)
        out = gated_residual_norm_modulate(
            leaves["x"], leaves["branch"], gate, shift, scale, offsets(4, 4), max_seqlen=max_seqlen
        )
        objective = out[0].square().sum() + out[1].square().sum()
        results.append((*out, *torch.autograd.grad(objective, list(leaves.values()))))
    for uniform, general in zip(*results, strict=True):
        torch.testing.assert_close(uniform, general, rtol=1e-12, atol=1e-12)


def test_many_tokens(offsets, many, monkeypatch):
    """Thousands of rows in one sample: programs take several rows, and the last of them fewer."""
    monkeypatch.setattr("millrace.kernels.support.rows.PROGRAMS", many // 16)
    start = {name: value.requires_grad_() for name, value in inputs((many,), 8).items()}
    x, branch, modulation = start.values()
    _, _, gate, shift, scale, _ = modulation.unbind(1)
    out, y = gated_residual_norm_modulate(x, branch, gate, shift, scale, offsets(many), max_seqlen=many)
    again = gated_residual(x, branch, gate, offsets(many), max_seqlen=many)
    exact = fused_formula([slice(0, many)])(x.double(), branch.double(), modulation.double())
    for got, want in zip((out, y, again), (*exact, exact[0]), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grad = torch.autograd.grad((out + y + again).sin().sum(), (x, branch, modulation))
    exact_grad = torch.autograd.grad((2 * exact[0] + exact[1]).sin().sum(), (x, branch, modulation))
    for got, want in zip(grad, exact_grad, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_is_well_registered(offsets, device, assert_well_registered):
    cu_seqlens = offsets(3, 0, 2)

    def function(x, branch, modulation):
        _, _, gate, shift, scale, again = modulation.unbind(1)
        x, y = gated_residual_norm_modulate(x, branch, gate, shift, scale, cu_seqlens, max_seqlen=3)
        return gated_residual(x, y, again, cu_seqlens, max_seqlen=3)

    values = inputs((3, 0, 2), 24)
    assert_well_registered(function, *(value.to(device).requires_grad_() for value in values.values()))


def test_reference_is_another_backend(offsets, device):
    """The plain formula that the registered operator is compared with in benchmarks."""
    start = {name: value.to(device) for name, value in inputs((3, 2), 24).items()}
    _, _, gate, shift, scale, _ = start["modulation"].unbind(1)
    results = [
        gated_residual_norm_modulate(
            start["x"], start["branch"], gate, shift, scale, offsets(3, 2), backend=backend
        )
        for backend in ("reference", "auto")
    ]
    for plain, registered in zip(*results, strict=True):
        torch.testing.assert_close(plain, registered)
    with pytest.raises(ValueError, match="backend is 'fast', expected one of: auto, reference"):
        gated_residual_norm_modulate(
            start["x"], start["branch"], gate, shift, scale, offsets(3, 2), backend="fast"
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(5)}, r"x has shape \(5,\), expected \(T, C\)"),
        ({"branch": torch.zeros(4, 8)}, r"branch has shape \(4, 8\), expected \(5, 8\)"),
        ({"gate": torch.zeros(3, 8)}, r"gate has shape \(3, 8\), expected \(2, 8\)"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"cu_seqlens is \(3,\) torch.int64, expected .* torch.int32",
        ),
    ],
)
def test_says_which_argument_is_wrong(wrong, message):
    right = {
        "x": torch.zeros(5, 8),
        "branch": torch.zeros(5, 8),
        "gate": torch.zeros(2, 8),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        gated_residual(**right | wrong)
    modulation = {"shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(ValueError, match=message):
        gated_residual_norm_modulate(**right | modulation | wrong)


@pytest.mark.parametrize("name", ["shift", "scale"])
def test_fusion_checks_the_norm_arguments(name):
    arguments = {
        "x": torch.zeros(5, 8),
        "branch": torch.zeros(5, 8),
        "gate": torch.zeros(2, 8),
        "shift": torch.zeros(2, 8),
        "scale": torch.zeros(2, 8),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 9\), expected \(2, 8\)"):
        gated_residual_norm_modulate(**arguments | {name: torch.zeros(2, 9)})
