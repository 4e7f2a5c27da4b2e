"""One rank: what is published, how damage is found, what stays."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from millrace.engine.checkpoint import manifest
from millrace.engine.checkpoint.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    resume_checkpoint,
    save_checkpoint,
)
from millrace.engine.checkpoint.manifest import DamagedCheckpoint
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece
from millrace.engine.util.errors import UserError


def value(step):
    """The state of a step: each tensor tells which step it belongs to."""
    return {"master/w": torch.arange(12) + 1000.0 * step, "ema/w": torch.full((3, 4), step).bfloat16()}


def save(root, step, keep=9, tag="first"):
    pieces = [Piece(name, tuple(t.shape), 0, t.flatten()) for name, t in value(step).items()]
    return save_checkpoint(root, step, pieces, {"step": step, "tag": tag}, keep=keep)


def assert_holds(reader, step, tag="first"):
    assert (reader.step, reader.meta) == (step, {"step": step, "tag": tag})
    assert reader.names() == ["ema/w", "master/w"]
    for name, tensor in value(step).items():
        assert torch.equal(reader.tensor(name), tensor)


def names(root):
    return sorted(path.name for path in Path(root).iterdir())


# --- what is published ---


def test_a_published_folder_proves_itself(tmp_path):
    folder = save(tmp_path / "deep" / "root", 100)
    assert folder == tmp_path / "deep" / "root" / "step-00000100"
    shard = "shard-00000-of-00001.safetensors"
    assert names(folder) == ["manifest.json", "manifest.sha256", "meta.json", shard]
    for name, record in manifest.read_manifest(folder).files.items():
        data = (folder / name).read_bytes()
        assert record == (len(data), hashlib.sha256(data).hexdigest())
    assert_holds(CheckpointReader(folder), 100)


def test_everything_is_on_disk_before_the_name_is_final(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    folder = save(tmp_path, 100)
    staging = str(tmp_path / ".tmp-step-00000100")
    commit = calls.index("rename")
    before, after = calls[:commit], calls[commit + 1 :]
    for name in names(folder):
        assert any(call.startswith(f"{staging}/{name}.") for call in before)  # before its own name was final
    assert before[-1] == staging  # the names in the folder, after the last of its files
    assert after == [str(tmp_path)]


def test_no_pickle(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint went through pickle")

    for function in (
        "pickle.load",
        "pickle.loads",
        "pickle.dump",
        "pickle.dumps",
        "torch.load",
        "torch.save",
    ):
        monkeypatch.setattr(function, refuse)
    save(tmp_path, 100)
    assert_holds(resume_checkpoint(tmp_path)[0], 100)


# --- damage ---

FILES = ["shard-00000-of-00001.safetensors", "meta.json", "manifest.json", "manifest.sha256"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found_and_named(tmp_path, name):
    folder = save(tmp_path, 100)
    original = (folder / name).read_bytes()
    blamed = "manifest.json" if name == "manifest.sha256" else name  # the message names both
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint) as caught:
            CheckpointReader(folder)
        assert caught.value.file == blamed
        assert str(folder) in str(caught.value)
        assert name in str(caught.value)
    (folder / name).write_bytes(original)
    assert_holds(CheckpointReader(folder), 100)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 10, -1, None])
def test_cut_or_lost_file_is_found_and_named(tmp_path, name, length):
    path = save(tmp_path, 100) / name
    if length is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedCheckpoint, match=re.escape(name)):
        CheckpointReader(path.parent)


def flip(folder, name="shard-00000-of-00001.safetensors"):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 0x10
    (folder / name).write_bytes(data)


def test_auto_falls_back_and_says_so(tmp_path):
    save(tmp_path, 100)
    flip(save(tmp_path, 200))
    (save(tmp_path, 300) / "manifest.json").unlink()
    reader, messages = resume_checkpoint(tmp_path)
    assert_holds(reader, 100)
    assert [message.partition(":")[0] for message in messages] == [
        "not resuming from step-00000300",
        "not resuming from step-00000200",
    ]
    assert "manifest.json cannot be read" in messages[0]
    assert re.search(r"shard-\S+ has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}", messages[1])


def test_never_from_step_0_when_all_are_damaged(tmp_path):
    for step in (100, 200):
        flip(save(tmp_path, step))
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*step-00000200.*step-00000100"):
        resume_checkpoint(tmp_path)


def test_nothing_to_resume(tmp_path):
    assert resume_checkpoint(tmp_path / "absent") == (None, [])
    (tmp_path / "log.jsonl").touch()
    (tmp_path / ".tmp-step-00000100").mkdir()
    assert resume_checkpoint(tmp_path) == (None, [])


def test_a_root_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot list checkpoints: Not a directory"):
        resume_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("which", [200, "200", "{root}/step-00000200"])
def test_what_is_asked_for_is_never_replaced_by_another(tmp_path, which):
    save(tmp_path, 100)
    folder = save(tmp_path, 200)
    which = which.format(root=tmp_path) if isinstance(which, str) else which
    reader, messages = resume_checkpoint(tmp_path, which)
    assert_holds(reader, 200)
    assert messages == []
    flip(folder)
    with pytest.raises(DamagedCheckpoint, match="step-00000200 is damaged"):
        resume_checkpoint(tmp_path, which)


def test_resuming_behind_later_checkpoints_is_said(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
    reader, messages = resume_checkpoint(tmp_path, 100)
    assert_holds(reader, 100)
    assert len(messages) == 1
    assert "later steps (200, 300)" in messages[0]


def test_unknown_step_and_folder(tmp_path):
    save(tmp_path, 100)
    with pytest.raises(UserError, match="no checkpoint of step 150; published steps: 100"):
        find_checkpoint(tmp_path, 150)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        find_checkpoint(tmp_path, tmp_path / "absent")


# --- retention ---


def test_the_newest_stay(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
        assert [found for found, _ in list_checkpoints(tmp_path)] == list(range(1, step + 1))[-3:]
    assert names(tmp_path) == ["step-00000005", "step-00000006", "step-00000007"]


def test_keep_counts_back_from_the_step_just_written(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
    save(tmp_path, 150, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [150, 200, 300]
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, 400, keep=0)


def test_a_step_saved_again_replaces_the_old(tmp_path):
    save(tmp_path, 100)
    flip(save(tmp_path, 200))
    for repeat in (1, 2):
        folder = save(tmp_path, 200, tag=f"again {repeat}")
        assert folder.name == f"step-00000200.{repeat}"
        assert list_checkpoints(tmp_path) == [(100, tmp_path / "step-00000100"), (200, folder)]
        assert find_checkpoint(tmp_path, 200) == folder
        assert_holds(resume_checkpoint(tmp_path)[0], 200, f"again {repeat}")


def test_leftovers_of_dead_runs_are_cleared(tmp_path):
    shutil.copytree(save(tmp_path, 100), tmp_path / ".tmp-step-00000200")
    shutil.copytree(tmp_path / "step-00000100", tmp_path / ".tmp-step-00000050-deleted")
    (tmp_path / ".tmp-step-00000200" / "manifest.json").unlink()
    assert list_checkpoints(tmp_path) == [(100, tmp_path / "step-00000100")]
    save(tmp_path, 200)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    assert_holds(resume_checkpoint(tmp_path)[0], 200)
