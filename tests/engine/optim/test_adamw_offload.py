"""AdamW on the host: the bits of AdamW, part by part, with state that is the host's."""

import pytest
import torch

from millrace.engine.checkpoint import train_state
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Model, Optimizer
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed.zero_shards import local_shards
from millrace.engine.optim import adamw_offload
from millrace.engine.optim.build_optimizer import build_optimizer
from millrace.engine.optim.training_optimizer import optimizer_entry
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
SETTINGS = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _parts(monkeypatch):
    monkeypatch.setattr(adamw_offload, "PART", 100)  # several of the matrix, one of the bias


def parts(kind, device=CPU, seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Linear(37, 19).to(device)
    optimizer = build_optimizer(module.named_parameters(), Optimizer(kind=kind, **SETTINGS), device)
    return module, optimizer, local_shards(module, optimizer, 0)


def train(module, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.gradient_scale = 0.5 if step % 2 else 1.0
        optimizer.skip = step == 2
        optimizer.step()


def reader_of(tmp_path, shards, optimizer):
    pieces = train_state.state_pieces(shards, optimizer, None)
    return CheckpointReader(save_checkpoint(tmp_path, 1, pieces, {}, keep=1))


def test_bits_and_checkpoints_are_adamws(tmp_path):
    """Both ways: what one wrote the other goes on with."""
    (one, adamw, shards), (two, host, held) = parts("adamw"), parts("adamw_offload")
    for module, optimizer in ((one, adamw), (two, host)):
        train(module, optimizer, 5)
    readers = [
        reader_of(tmp_path / "a", shards, adamw),
        reader_of(tmp_path / "b", held, host),
    ]
    assert readers[0].names() == readers[1].names()
    for name in readers[0].names():
        assert torch.equal(readers[0].read(name), readers[1].read(name)), name
    assert [train_state.optimizer_steps(*pair) for pair in ((shards, adamw), (held, host))] == [4, 4]
    (three, resumed, shards), (four, other, held) = (parts(k, seed=5) for k in ("adamw", "adamw_offload"))
    for (module, optimizer, mine), reader in (
        ((three, resumed, shards), readers[1]),
        ((four, other, held), readers[0]),
    ):
        train_state.load_weights(module, reader, "x")
        assert train_state.load_optimizer(mine, optimizer, reader, 4) == []
        train(module, optimizer, 3, seed=2)
    train(one, adamw, 3, seed=2)
    assert torch.equal(three.weight, one.weight)
    assert torch.equal(four.weight, one.weight)
    assert torch.equal(four.bias, one.bias)


def test_groups_may_be_updated_one_by_one():
    """As DeepSpeed does, which changes the groups for it; the smaller comes first."""
    (one, adamw, _), (two, host, _) = parts("adamw"), parts("adamw_offload")
    whole = host.param_groups[0]
    for step in range(2):
        for module in (one, two):
            for p in module.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
        adamw.step()
        for p in (two.bias, two.weight):
            host.param_groups = [whole | {"params": [p]}]
            host.step()
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_the_kernel_of_the_host_computes_the_same():
    """That which a GPU's run takes, torch's fused one."""
    (one, adamw, _), (two, host, _) = parts("adamw"), parts("adamw_offload")
    host.fused = True
    for module, optimizer in ((one, adamw), (two, host)):
        train(module, optimizer, 5)
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.weight, parts("adamw")[0].weight)


@pytest.mark.cuda
def test_moments_are_the_hosts():
    device = torch.device("cuda")
    (one, adamw, _), (two, host, held) = parts("adamw", device), parts("adamw_offload", device)
    assert host.fused
    for module, optimizer in ((one, adamw), (two, host)):
        train(module, optimizer, 5)
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-5, atol=1e-6)
    assert two.weight.is_cuda
    assert all(not value.is_cuda for shard in held for value in host.state[shard.master].values())


def test_the_planner_counts_them_for_the_host():
    module, host, _ = parts("adamw_offload")
    train(module, host, 1)
    entry, named = optimizer_entry("adamw_offload"), list(module.named_parameters())
    assert entry.state_bytes(named, Optimizer(kind="adamw_offload"), Model(), 4) == {}
    held = [v for p in module.parameters() for v in host.state[p].values() if v.dim()]
    assert entry.host_bytes(named) == sum(v.numel() * v.element_size() for v in held)


def test_bfloat16_masters_are_refused():
    values = {
        "data": {"path": "x"},
        "optimizer": {"kind": "adamw_offload"},
        "precision": {"master": "bfloat16", "compute": "bfloat16"},
    }
    with pytest.raises(UserError, match="adamw_offload updates FP32 weights, but precision"):
        parse_config(values, "test")
