"""Training state to a checkpoint and back; whole runs do it across stages and ranks in test_resume.py."""

import pytest
import torch

from millrace.engine.config import Ema, Optimizer
from millrace.engine.errors import UserError
from millrace.engine.optim.adamw import build_optimizer
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.runtime import state
from millrace.engine.runtime.checkpoint import save_checkpoint
from millrace.engine.runtime.sharded import CheckpointReader
from millrace.engine.runtime.shards import local_shards
from millrace.engine.runtime.weights import read_weights


def parts(seed):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 5)
    optimizer = build_optimizer(module.parameters(), Optimizer(lr=0.1, eps=1e-8), torch.device("cpu"))
    shards = local_shards(module, optimizer, 0)
    return module, optimizer, shards, EmaWeights(Ema(enabled=True, decay=0.5, every=1), shards)


def train(module, optimizer, ema, steps):
    for step in range(steps):
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)


def saved(tmp_path, shards, optimizer, ema):
    folder = save_checkpoint(tmp_path, 1, state.state_pieces(shards, optimizer, ema), {}, keep=1)
    return CheckpointReader(folder)


def test_round_trip(tmp_path):
    module, optimizer, shards, ema = parts(1)
    train(module, optimizer, ema, 3)
    assert state.optimizer_steps(shards, optimizer) == 3
    reader = saved(tmp_path, shards, optimizer, ema)
    kinds = ("ema", "exp_avg", "exp_avg_sq", "master")
    assert reader.names() == sorted(f"{kind}/{name}" for kind in kinds for name in ("weight", "bias"))

    other, fresh, held, average = parts(2)
    state.load_weights(other, reader, "x")
    state.load_optimizer(held, fresh, reader, 3)
    state.load_ema(held, average, reader)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(ema.of(one), average.of(two))
        for key, value in optimizer.state[one].items():
            assert torch.equal(fresh.state[two][key], value)
            assert fresh.state[two][key].dtype == value.dtype
    train(module, optimizer, ema, 2)
    train(other, fresh, average, 2)
    assert torch.equal(module.weight, other.weight)


def test_before_the_first_update_there_are_no_moments(tmp_path):
    _, optimizer, shards, _ = parts(1)
    assert state.optimizer_steps(shards, optimizer) == 0
    reader = saved(tmp_path, shards, optimizer, None)
    assert reader.names() == ["master/bias", "master/weight"]
    _, fresh, held, average = parts(2)
    state.load_optimizer(held, fresh, reader, 0)
    assert not fresh.state
    before = average.of(held[0].master).clone()
    state.load_ema(held, average, reader)
    assert torch.equal(average.of(held[0].master), before)


def test_buffers_are_restored(tmp_path):
    """Only the first rank writes them; a checkpoint without one is refused by name."""
    module, optimizer, shards, ema = parts(1)
    module.register_buffer("fixed", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    pieces = state.state_pieces(shards, optimizer, ema, module.named_buffers())
    reader = CheckpointReader(save_checkpoint(tmp_path / "a", 1, pieces, {}, keep=1))
    other, *_ = parts(2)
    other.register_buffer("fixed", torch.zeros(2, 2))
    state.load_weights(other, reader, "run")
    assert torch.equal(other.fixed, module.fixed)
    for weights in ("model", "ema"):
        found = read_weights(reader, weights)
        assert found.keys() == {"weight", "bias", "fixed"}
        assert torch.equal(found["fixed"], module.fixed)
    with pytest.raises(
        UserError, match=r"run: not the weights of this model: 1 missing \(buffer/fixed\), 0 unknown"
    ):
        state.load_weights(other, saved(tmp_path / "b", shards, optimizer, ema), "run")


def test_another_model_is_refused(tmp_path):
    _, optimizer, shards, _ = parts(1)
    reader = saved(tmp_path, shards, optimizer, None)
    with pytest.raises(UserError, match=r"run: weight is \(5, 3\) there and \(5, 4\) in this configuration"):
        state.load_weights(torch.nn.Linear(4, 5), reader, "run")
    with pytest.raises(UserError, match=r"run: .* 0 missing .*1 unknown \(bias\)"):
        state.load_weights(torch.nn.Linear(3, 5, bias=False), reader, "run")
    with pytest.raises(UserError, match=r"2 missing \(0.bias, 0.weight\), 2 unknown \(bias, weight\)"):
        state.load_weights(torch.nn.Sequential(torch.nn.Linear(3, 5)), reader, "run")
