"""What is left after a kill at any line, a full disk at any write, and a refused call."""

import errno
import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from millrace.engine.checkpoint import checkpoints, manifest, sharded_tensors
from millrace.engine.checkpoint.checkpoints import list_checkpoints, resume_checkpoint, save_checkpoint
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece
from millrace.engine.util import files, safetensors_file
from millrace.engine.util.errors import UserError


def pieces(step, size=12):
    return [Piece("w", (size,), 0, torch.arange(size, dtype=torch.float32) + 1000 * step)]


def save(root, step, keep=9, tag=0):
    return save_checkpoint(root, step, pieces(step), {"tag": tag}, keep=keep)


def assert_holds(reader, step, tag=0):
    assert (reader.step, reader.meta) == (step, {"tag": tag})
    assert reader.read("w").tolist() == [1000.0 * step + i for i in range(reader.shape("w")[0])]


def names(root):
    return sorted(path.name for path in Path(root).iterdir())


# --- kill ---


def trace_lines(action, at_line):
    """Run `action`, calling `at_line(n)` before its n-th line of checkpoint code or recursive delete."""
    writers = (checkpoints, manifest, sharded_tensors, files, safetensors_file)
    sources = {module.__file__ for module in (*writers, shutil)}
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line":
            count += 1
            at_line(count)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)


def lines_to_die_at(action, root):
    """The first line at each state of the files in `root`: a kill at a later one leaves nothing else."""
    lines, states = [], []

    def look(line):
        state = sorted((str(path), path.stat().st_size) for path in root.rglob("*"))
        if not states or state != states[-1]:
            lines.append(line)
            states.append(state)

    trace_lines(action, look)
    return lines


def die_at(action, line):
    """Run `action` in a fork that vanishes, without any clean-up, before its `line`-th line."""
    process = os.fork()
    if process == 0:
        trace_lines(action, lambda count: os._exit(9) if count == line else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def kill_everywhere(tmp_path, prepare, action, look):
    """What `look` finds after a kill at each moment of `action` in a folder made by `prepare`."""
    prepare(tmp_path / "dry")
    lines = lines_to_die_at(lambda: action(tmp_path / "dry"), tmp_path / "dry")
    found = []
    for line in lines:
        root = tmp_path / f"killed-{line}"
        prepare(root)
        die_at(lambda root=root: action(root), line)
        for _, folder in list_checkpoints(root):
            CheckpointReader(folder, verify=True)  # also those that auto would not reach are whole
        reader, messages = resume_checkpoint(root)
        assert messages == []
        found.append(look(reader))
        save(root, 300, keep=1)  # the next run clears what this one left behind
        assert names(root) == ["step-00000300"]
    return found


def test_killed_at_any_moment_while_a_new_step_replaces_the_only_one(tmp_path):
    """keep=1: the old checkpoint may go only once the new one is complete."""

    def look(reader):
        assert_holds(reader, reader.step)
        return reader.step

    found = kill_everywhere(
        tmp_path, lambda root: save(root, 100), lambda root: save(root, 200, keep=1), look
    )
    assert found == sorted(found)  # one instant turns the old state into the new one
    assert found.count(100) > 10
    assert found.count(200) > 5


def test_killed_at_any_moment_while_a_step_is_saved_again(tmp_path):
    """The same step twice and nothing else: at every moment one of the two is there."""

    def look(reader):
        assert_holds(reader, 100, reader.meta["tag"])
        return reader.meta["tag"]

    found = kill_everywhere(
        tmp_path, lambda root: save(root, 100, tag=1), lambda root: save(root, 100, keep=1, tag=2), look
    )
    assert found == sorted(found)
    assert set(found) == {1, 2}


@pytest.mark.parametrize("milliseconds", range(2, 62, 5))
def test_sigkill_in_the_middle_of_a_run(tmp_path, milliseconds):
    """A run that saves 1 MB a step as fast as it can is killed: what is published is whole."""
    size = 250_000
    save_checkpoint(tmp_path, 1, pieces(1, size=size), {"tag": 0}, keep=2)
    data = pieces(0, size=size)[0].data
    process = os.fork()
    if process == 0:
        step = 1
        while True:
            step += 1
            piece = Piece("w", (size,), 0, data + 1000 * step)
            save_checkpoint(tmp_path, step, [piece], {"tag": 0}, keep=2)
    time.sleep(milliseconds / 1000)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    for _, folder in list_checkpoints(tmp_path):
        reader = CheckpointReader(folder)
        assert torch.equal(reader.tensor("w"), data + 1000 * reader.step)
    reader, messages = resume_checkpoint(tmp_path)
    assert messages == []
    save_checkpoint(tmp_path, reader.step + 1, pieces(7, size=size), {"tag": 0}, keep=1)
    assert names(tmp_path) == [f"step-{reader.step + 1:08d}"]


# --- the disk refuses ---


class FullDisk(io.BufferedWriter):
    """A file on a disk with room for `room` more writes; the next one fails half-way with ENOSPC."""

    room = 0

    def write(self, chunk):
        if FullDisk.room == 0:
            super().write(chunk[: len(chunk) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= 1
        return super().write(chunk)


def test_disk_full_at_any_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 100)
    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(io.FileIO(path, mode)), raising=False)
    for room in range(6):  # header, tensor; their index; meta; manifest; seal
        FullDisk.room = room
        with pytest.raises(UserError, match="step 200 failed: No space left on device") as caught:
            save(tmp_path, 200, keep=1)
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["step-00000100"]
    monkeypatch.undo()
    assert_holds(resume_checkpoint(tmp_path)[0], 100)

    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(io.FileIO(path, mode)), raising=False)
    FullDisk.room = 6
    save(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["step-00000200"]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_refused_system_call_is_one_clear_line(tmp_path, monkeypatch, call):
    save(tmp_path, 100)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "somewhere")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(
        UserError, match=r"step 200 failed: Permission denied \(somewhere\); earlier"
    ) as caught:
        save(tmp_path, 200)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000100"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="checkpoint of step 100 failed: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 100)


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning_until_they_can(tmp_path, monkeypatch, caplog):
    """A file that is open on NFS is enough: somebody evaluates the old checkpoint."""
    save(tmp_path, 100)
    delete = shutil.rmtree

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    for step in (200, 300):
        save(tmp_path, step, keep=1)
        assert_holds(resume_checkpoint(tmp_path)[0], step)
    said = [record.getMessage() for record in caplog.records]
    assert all("cannot be deleted: Device or resource busy" in line and "\n" not in line for line in said)
    assert len(said) == 3  # step 100 twice, step 200 once
    monkeypatch.setattr(checkpoints.shutil, "rmtree", delete)
    save(tmp_path, 400, keep=1)
    assert names(tmp_path) == ["step-00000400"]


def test_an_old_checkpoint_that_cannot_be_renamed_stays(tmp_path, monkeypatch, caplog):
    save(tmp_path, 100)
    rename = os.rename

    def refuse(source, target):
        if "deleted" in str(target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    save(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    assert "step-00000100 cannot be deleted" in caplog.text
    monkeypatch.undo()
    save(tmp_path, 300, keep=1)
    assert names(tmp_path) == ["step-00000300"]


def test_a_leftover_of_this_very_step_is_not_in_the_way(tmp_path, monkeypatch):
    (tmp_path / ".tmp-step-00000100").mkdir()
    (tmp_path / ".tmp-step-00000100" / "busy").touch()
    monkeypatch.setattr(checkpoints, "_delete", lambda doomed: None)
    assert save(tmp_path, 100) == tmp_path / "step-00000100"
    assert_holds(resume_checkpoint(tmp_path)[0], 100)


def test_shard_that_lost_bytes_on_the_way_is_never_published(tmp_path, monkeypatch):
    """A shared file system that shows rank 0 a shorter shard than the other rank wrote."""
    write = checkpoints.write_shard

    def shorten(path, *rest):
        index = write(path, *rest)
        os.truncate(path, index.file.bytes - 4)
        return index

    monkeypatch.setattr(checkpoints, "write_shard", shorten)
    with pytest.raises(UserError, match=r"shard-00000-of-00001.safetensors lost bytes after it was written"):
        save(tmp_path, 100)
    assert names(tmp_path) == []
