"""Working copies of weights: the same bits as autocast's casts, with fewer bytes."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

from millrace.engine.model.working_weights import WorkingLinear, WorkingWeights

BF16 = torch.bfloat16


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.SiLU(), nn.Sequential(nn.Linear(16, 16, bias=False)), nn.Linear(16, 4)
    )


def gradients(model, batches, recompute=False):
    """Of the sum over the batches, in FP32, and the losses."""
    losses = []
    for x in batches:
        with torch.autocast("cpu", BF16):
            y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        loss = y.float().square().mean()
        loss.backward()
        losses.append(loss.detach())
    return [p.grad for p in model.parameters()], losses


@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_every_bit(recompute):
    ours, theirs = network(), network()
    working = WorkingWeights(ours, BF16)
    working.refresh()
    batches = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for found, expected in zip(
        gradients(ours, batches, recompute), gradients(theirs, batches, recompute), strict=True
    ):
        for mine, other in zip(found, expected, strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, other)


def test_follows_the_weights_when_refreshed():
    model = network()
    working = WorkingWeights(model, BF16)
    working.refresh()
    x = torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        before = model(x)
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.equal(model(x), before)
        working.refresh()
        assert not torch.equal(model(x), before)


def test_copies_are_neither_parameters_nor_buffers():
    model, plain = network(), network()
    WorkingWeights(model, BF16)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, WorkingLinear) for module in model.modules()) == 3


def test_multiplies_by_the_weights_outside_autocast():
    model, plain = network(), network()
    WorkingWeights(model, BF16)  # never refreshed
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(x))


def test_frozen_weights_get_no_gradient():
    model = network()
    working = WorkingWeights(model, BF16)
    working.refresh()
    model.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", BF16):
        model(x).float().sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())
    assert all(copy.grad is None for copy in working.copies)


def test_hooks_on_the_weight_are_told_once_a_backward():
    model = network()
    WorkingWeights(model, BF16).refresh()
    told = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: told.append((name, p.grad.dtype)))
    gradients(model, [torch.randn(2, 8)])
    assert sorted(told) == sorted((name, torch.float32) for name, _ in model.named_parameters())


def test_compiled_layers_share_a_graph_and_the_bits():
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(3))
    plain = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(3))
    plain.load_state_dict(blocks.state_dict())
    WorkingWeights(blocks, BF16).refresh()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=counter)

    def run(parts):
        x = torch.ones(4, 8)
        with torch.autocast("cpu", BF16):
            for part in parts:
                x = part(x)
        x.float().sum().backward()
        return [p.grad for p in parts.parameters()]

    for _ in range(2):
        for mine, other in zip(run(blocks), run(plain), strict=True):
            assert torch.equal(mine, other)
    assert counter.frame_count <= 2  # the first input needs no gradient, the others do
