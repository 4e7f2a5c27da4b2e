"""A checkpoint that is read is not pruned."""

import json
import os
from dataclasses import replace

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints, save_checkpoint
from millrace.engine.checkpoint.model_weights import pinned_checkpoint
from millrace.engine.checkpoint.pins import pinned_folders
from millrace.engine.checkpoint.sharded_tensors import Piece
from millrace.engine.distributed.run_lock import Owner
from millrace.engine.util.errors import UserError


def save(run, step, keep=1):
    pieces = [Piece("master/w", (2,), 0, torch.ones(2))]
    return save_checkpoint(run / "checkpoints", step, pieces, {"step": step}, keep=keep)


def steps(run):
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


def test_a_pinned_checkpoint_outlives_newer_ones(tmp_path):
    save(tmp_path, 1)
    with pinned_checkpoint(tmp_path) as folder:
        save(tmp_path, 2)
        save(tmp_path, 3)
        assert folder.name == "step-00000001"
        assert steps(tmp_path) == [1, 3]
    save(tmp_path, 4)
    assert steps(tmp_path) == [4]
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_pins_of_the_dead_do_not_count(tmp_path):
    folder = save(tmp_path, 1)
    gone = replace(Owner.of_this_process(), started="an earlier process with this id")
    (folder.parent / f".pin-{folder.name}-00").write_text(json.dumps(vars(gone)))
    assert pinned_folders(folder.parent) == set()
    assert list(folder.parent.glob(".pin-*")) == []


def test_a_pin_from_another_host_counts_for_a_day(tmp_path):
    folder = save(tmp_path, 1)
    pin = folder.parent / f".pin-{folder.name}-00"
    pin.write_text(json.dumps(vars(replace(Owner.of_this_process(), host="gpu07"))))
    assert pinned_folders(folder.parent) == {folder.name}
    os.utime(pin, (0, 0))
    assert pinned_folders(folder.parent) == set()


def test_a_folder_that_may_not_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)

    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pinned_checkpoint(tmp_path) as found:
        assert found == folder


def test_one_that_is_deleted_meanwhile(tmp_path, monkeypatch):
    old = save(tmp_path, 1)
    from millrace.engine.checkpoint import model_weights

    looked = []

    def slow(path):
        looked.append(model_weights_folder(path))
        if len(looked) == 1:
            save(tmp_path, 2)
        return looked[-1]

    model_weights_folder = model_weights.checkpoint_folder
    monkeypatch.setattr(model_weights, "checkpoint_folder", slow)
    with pinned_checkpoint(tmp_path) as folder:
        assert (looked[0], folder.name) == (old, "step-00000002")
    monkeypatch.setattr(model_weights, "checkpoint_folder", lambda path: path)
    with pytest.raises(UserError, match="its run has just deleted it"), pinned_checkpoint(old):
        pass
