"""geglu against its equation."""

import math

import pytest
import torch

from millrace.kernels import geglu


def formula(gate_up):
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (0, 64), (7, 37), (3, 6272), (2, 12544)])
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


@pytest.mark.parametrize(
    ("shape", "shown"), [((4,), r"\(4,\)"), ((4, 7), r"\(4, 7\)"), ((2, 4, 8), r"\(2, 4, 8\)")]
)
def test_says_which_argument_is_wrong(shape, shown):
    with pytest.raises(ValueError, match=rf"gate_up has shape {shown}, expected \(T, 2F\)"):
        geglu(torch.zeros(shape))
