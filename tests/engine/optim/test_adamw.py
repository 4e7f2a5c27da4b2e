"""AdamW as the trainer builds it: the published update, and steps that are sat out."""

import pytest
import torch

from millrace.engine.config import Optimizer
from millrace.engine.optim.build_optimizer import build_optimizer

CPU = torch.device("cpu")


def test_the_published_update():
    """Algorithm 2 of arXiv 1711.05101 in float64."""
    config = Optimizer(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.05)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = build_optimizer([("weight", weight)], config, CPU)
    w = weight.detach().double()
    m, v = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.tensor([0.3, -1.0, 2.0]) * step
        weight.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 0.1 * 0.05 * w
        w = w - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-6, atol=1e-6)


def test_a_skipped_step_changes_nothing_and_does_not_count():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([("weight", weight)], Optimizer(weight_decay=0.1), CPU)
    weight.grad = torch.full((3,), 0.5)
    optimizer.step()
    before = weight.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    optimizer.skip = True
    weight.grad = torch.full((3,), float("nan"))
    optimizer.step()
    assert torch.equal(weight, before)
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in state.items())
    optimizer.skip = False
    weight.grad = torch.full((3,), 0.5)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
    assert bool((weight < before).all())


def test_settings_reach_torch():
    config = Optimizer(lr=3e-4, betas=(0.7, 0.99), eps=1e-15, weight_decay=0.2)
    (group,) = build_optimizer([("w", torch.nn.Parameter(torch.ones(1)))], config, CPU).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        3e-4,
        (0.7, 0.99),
        1e-15,
        0.2,
    )
    assert not group["fused"]


@pytest.mark.cuda
def test_fused_on_cuda():
    weight = torch.nn.Parameter(torch.ones(1, device="cuda"))
    assert build_optimizer([("weight", weight)], Optimizer(), torch.device("cuda")).param_groups[0]["fused"]


@pytest.mark.parametrize("fused", [None, True])
def test_gradients_are_scaled_within_the_update(fused):
    """As CUDA's kernel does it, and as the loop of a CPU does: the same as a gradient scaled before."""
    found = []
    for scale in (0.25, 1.0):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(40))
        optimizer = build_optimizer([("weight", weight)], Optimizer(weight_decay=0.1), CPU)
        for group in optimizer.param_groups:
            group["fused"] = fused
        optimizer.defaults["fused"] = fused
        optimizer._step_supports_amp_scaling = bool(fused)
        for step in range(3):
            weight.grad = torch.randn(40) * (1.0 if scale != 1.0 else 0.25)
            optimizer.gradient_scale = scale if step != 1 else 1.0
            if step == 1 and scale != 1.0:
                weight.grad *= 0.25
            optimizer.step()
        found.append(weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
