"""geglu against its equation."""

import math
from importlib import import_module
from typing import get_args

import pytest
import torch

from millrace.engine.config import GegluBackend
from millrace.kernels import geglu
from millrace.kernels.support.registration import INTERPRETING

# The package `millrace.kernels.ops` has a module of this name, the one above it a function.
module = import_module("millrace.kernels.ops.geglu")


def formula(gate_up):
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (0, 64), (5, 0), (7, 37), (3, 6272), (2, 12544)])
def test_matches_the_equation(tokens, hidden, assert_accurate):
    assert_accurate(geglu, formula, gate_up=torch.randn(tokens, 2 * hidden))


def test_large_gates(assert_accurate):
    """The tanh saturates: far to the right the gate passes, far to the left it closes."""
    gate = torch.linspace(-12, 12, 49)
    assert_accurate(geglu, formula, gate_up=torch.stack((gate, torch.ones(49)), 1))


def test_strided_input(assert_accurate):
    assert_accurate(
        lambda wide: geglu(wide[:, 8:72]), lambda wide: formula(wide[:, 8:72]), wide=torch.randn(5, 80)
    )


def test_transposed_input_and_expanded_gradient(device):
    """Neither neighbours in a row nor the rows of the gradient need be neighbours in memory."""
    gate_up = torch.randn(10, 3, dtype=torch.float64).t().to(device, torch.float32).requires_grad_()
    weight = torch.randn(5, device=device)
    exact_input = gate_up.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(geglu(gate_up), gate_up, weight.expand(3, 5))
    (exact,) = torch.autograd.grad(formula(exact_input), exact_input, weight.double().expand(3, 5))
    torch.testing.assert_close(got, exact.float())


def test_many_tokens(device):
    gate_up = torch.randn(257 if INTERPRETING else 8191, 6, device=device)
    torch.testing.assert_close(geglu(gate_up), formula(gate_up.double()).float())


def test_huge_gates_keep_finite_gradients(device, dtype):
    """g^3 overflows long before g does; the derivative is 0 or 1 there, not NaN."""
    gate = torch.tensor([-3e4, 3e4], device=device)
    gate_up = torch.stack((gate, torch.ones_like(gate)), 1).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(geglu(gate_up).sum(), gate_up)
    assert grad[:, 0].tolist() == [0, 1]
    assert grad[:, 1].tolist() == gate_up[:, 0].clamp(min=0).tolist()


def test_is_well_registered(device, assert_well_registered):
    assert_well_registered(geglu, torch.randn(5, 20, device=device, requires_grad=True))
    wide = torch.randn(5, 31, device=device, requires_grad=True)
    assert_well_registered(lambda wide: geglu(wide[:, 3:25]), wide)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_agree(backend, device):
    gate_up = torch.randn(5, 74, device=device, requires_grad=True)
    outputs = geglu(gate_up, backend), geglu(gate_up)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), gate_up) for y in outputs))


@pytest.fixture
def liger_device(request, device):
    """Where liger-kernel's kernels run: on CUDA, or in the interpreter."""
    request.getfixturevalue("liger" if device == "cuda" else "interpreted_liger")
    return device


@pytest.mark.parametrize("tokens", [1, 5])
def test_liger_agrees(tokens, liger_device):
    gate_up = torch.randn(tokens, 74, device=liger_device, requires_grad=True)
    before = gate_up.detach().clone()
    outputs = geglu(gate_up, "liger"), geglu(gate_up)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), gate_up) for y in outputs))
    assert torch.equal(gate_up, before)  # its own backward pass writes over it


def test_liger_is_well_registered(liger_device, assert_well_registered):
    """Compiled without a break in the graph, too."""
    gate_up = torch.randn(5, 20, device=liger_device, requires_grad=True)
    assert_well_registered(lambda x: geglu(x, "liger"), gate_up)


def test_settings_are_the_backends():
    assert get_args(GegluBackend) == module.BACKENDS


def test_backends_that_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of auto, reference, triton, liger"):
        geglu(torch.zeros(2, 4), "cuda")
    if not INTERPRETING:
        with pytest.raises(ValueError, match="'liger' cannot run: its kernels run on CUDA, not on cpu"):
            geglu(torch.zeros(2, 4), "liger")
    monkeypatch.setattr(module, "is_importable", lambda _: False)
    assert module.liger_obstacle(torch.device("cuda")) == "liger-kernel is not installed"


@pytest.mark.parametrize(
    ("shape", "shown"), [((4,), r"\(4,\)"), ((4, 7), r"\(4, 7\)"), ((2, 4, 8), r"\(2, 4, 8\)")]
)
def test_says_which_argument_is_wrong(shape, shown):
    with pytest.raises(ValueError, match=rf"gate_up has shape {shown}, expected \(T, 2F\)"):
        geglu(torch.zeros(shape))
