"""A replicated module against torch's own clipping and AdamW."""

import pytest
import torch

from millrace.engine.repa_e.replicated import Replicated

CPU = torch.device("cpu")


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def loss(module, seed):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return (module(x) - 1).square().mean() * 30


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e6])
def test_steps_are_those_of_adam(clip):
    ours, plain = Replicated(network(), CPU), network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        for part in range(2):  # accumulation
            loss(ours.module, 10 * seed + part).backward()
            loss(plain, 10 * seed + part).backward()
        found = ours.reduce()
        wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        torch.testing.assert_close(found, wanted)
        ours.apply(1e-2, clip, found)
        optimizer.step()
        optimizer.zero_grad()
        for mine, theirs in zip(ours.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        assert not ours.flat.any()


def test_state_carries_over():
    ours = Replicated(network(), CPU)
    for seed in range(2):
        loss(ours.module, seed).backward()
        ours.apply(1e-2, 1.0, ours.reduce())
    saved = {name: tensor.clone() for name, tensor in ours.state()}
    assert float(saved["updates"]) == 2
    other = Replicated(network(seed=9), CPU)
    for name, tensor in other.state():
        with torch.no_grad():
            tensor.copy_(saved[name])
    other.share_updates()
    for part in (ours, other):
        loss(part.module, 5).backward()
        part.apply(1e-2, 1.0, part.reduce())
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours.state(), other.state(), strict=True))


def test_clear_forgets_the_gradient():
    ours = Replicated(network(), CPU)
    loss(ours.module, 0).backward()
    assert ours.flat.any()
    ours.clear()
    assert not any(p.grad.any() for p in ours.module.parameters())
    assert len({p.grad.untyped_storage().data_ptr() for p in ours.module.parameters()}) == 1
