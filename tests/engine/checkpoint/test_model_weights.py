"""Weights out of checkpoints that the engine's own writer made."""

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.model_weights import checkpoint_folder, checkpoint_state, choose_weights
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece
from millrace.engine.config import Config
from millrace.engine.util.errors import UserError

CONFIG = Config.model_validate({"run": {"steps": 5}, "model": {"width": 32, "heads": 2, "depth": 3}})
MASTER = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.tensor([1.5])}
EMA = {name: tensor + 10 for name, tensor in MASTER.items()}


def _save(run, step, *, ema):
    tensors = {f"master/{name}": tensor + step for name, tensor in MASTER.items()}
    tensors["exp_avg/a"] = torch.zeros(2, 3)
    if ema:
        tensors |= {f"ema/{name}": tensor + step for name, tensor in EMA.items()}
    pieces = [Piece(name, tuple(tensor.shape), 0, tensor.flatten()) for name, tensor in tensors.items()]
    return save_checkpoint(
        run / "checkpoints", step, pieces, {"config": CONFIG.model_dump(mode="json")}, keep=9
    )


def _assert_equal(found, wanted, step):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name] + step)


def test_run_folder_means_its_newest_checkpoint(tmp_path):
    first, second = _save(tmp_path, 100, ema=True), _save(tmp_path, 200, ema=True)
    assert checkpoint_folder(tmp_path) == second
    assert checkpoint_folder(str(first)) == first
    state, config = checkpoint_state(tmp_path)
    assert config == CONFIG
    _assert_equal(state, EMA, 200)
    _assert_equal(checkpoint_state(first)[0], EMA, 100)


@pytest.mark.parametrize(("weights", "wanted"), [("auto", EMA), ("ema", EMA), ("model", MASTER)])
def test_choice_where_there_is_ema(tmp_path, weights, wanted):
    _assert_equal(checkpoint_state(_save(tmp_path, 1, ema=True), weights)[0], wanted, 1)


def test_choice_where_there_is_no_ema(tmp_path):
    folder = _save(tmp_path, 1, ema=False)
    for weights in ("auto", "model"):
        _assert_equal(checkpoint_state(folder, weights)[0], MASTER, 1)
    with pytest.raises(UserError, match="no EMA weights"):
        choose_weights(CheckpointReader(folder), "ema")


def test_the_second_average(tmp_path):
    tensors = {f"{kind}/a": torch.full((2,), float(i)) for i, kind in enumerate(("master", "ema", "ema2"))}
    pieces = [Piece(name, (2,), 0, tensor) for name, tensor in tensors.items()]
    meta = {"config": CONFIG.model_dump(mode="json")}
    folder = save_checkpoint(tmp_path / "checkpoints", 1, pieces, meta, keep=1)
    for weights, wanted in (("model", 0), ("ema", 1), ("ema2", 2), ("auto", 1)):
        assert checkpoint_state(folder, weights)[0]["a"].tolist() == [wanted] * 2
    with pytest.raises(UserError, match=r"holds no second EMA \(ema\.second_decay\); take weights 'ema'"):
        choose_weights(CheckpointReader(_save(tmp_path / "other", 1, ema=True)), "ema2")
    with pytest.raises(UserError, match=r"holds no second EMA .*; take weights 'model'"):
        choose_weights(CheckpointReader(_save(tmp_path / "none", 1, ema=False)), "ema2")


def test_heads_of_training_are_left_out(tmp_path):
    names = ("master/a", "master/alignment.a", "ema/a", "ema/alignment.a", "buffer/b", "buffer/alignment.b")
    pieces = [Piece(name, (1,), 0, torch.ones(1)) for name in names]
    meta = {"config": CONFIG.model_dump(mode="json")}
    folder = save_checkpoint(tmp_path / "checkpoints", 1, pieces, meta, keep=1)
    for weights in ("model", "ema"):
        assert checkpoint_state(folder, weights)[0].keys() == {"a", "b"}


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"neither a checkpoint nor a run"):
        checkpoint_folder(tmp_path)
    with pytest.raises(UserError, match=r"neither a checkpoint nor a run"):
        checkpoint_folder(tmp_path / "absent")


def test_damage_is_found_before_weights_are_used(tmp_path):
    folder = _save(tmp_path, 1, ema=False)
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint_state(tmp_path)


def test_weights_that_are_not_finite_are_named_and_others_still_read(tmp_path, monkeypatch):
    """Of a checkpoint that an earlier version published."""
    tensors = {"master/a": torch.ones(3), "ema/a": torch.tensor([1.0, float("nan"), 1.0])}
    tensors["exp_avg/a"] = torch.full((3,), float("inf"))
    pieces = [Piece(name, (3,), 0, tensor) for name, tensor in tensors.items()]
    monkeypatch.setattr("millrace.engine.checkpoint.checkpoints.total", lambda parts: {})
    meta = {"config": CONFIG.model_dump(mode="json")}
    folder = save_checkpoint(tmp_path / "checkpoints", 1, pieces, meta, keep=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"its weights 'ema' are damaged: a \(1 element not finite\)"):
        checkpoint_state(folder)
    assert checkpoint_state(folder, "model")[0]["a"].tolist() == [1.0, 1.0, 1.0]
