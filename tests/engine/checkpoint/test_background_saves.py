"""What is published is the state of the moment at which the save was begun."""

import errno
import threading

import pytest
import torch

from millrace.engine.checkpoint import background_saves, checkpoints
from millrace.engine.checkpoint.background_saves import BackgroundSaves, HostCopy, room_for_copies
from millrace.engine.checkpoint.checkpoints import CheckpointNotWritten, list_checkpoints
from millrace.engine.checkpoint.damage import DamagedState
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece


def pieces(*tensors):
    return [Piece(f"t{i}", tuple(t.shape), 0, t.flatten()) for i, t in enumerate(tensors)]


@pytest.fixture
def held_back(monkeypatch):
    """An event that the disk waits for."""
    event, write = threading.Event(), checkpoints.write_shard

    def wait_and_write(*arguments):
        assert event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "write_shard", wait_and_write)
    yield event
    event.set()


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path, held_back):
    weights, wanted = torch.arange(5.0), torch.arange(5.0)
    saves = BackgroundSaves(tmp_path, keep=3, blocking=False)
    saves.begin(7, pieces(weights), {"tag": 1}, {})
    assert (saves.step, saves.ended, list_checkpoints(tmp_path)) == (7, False, [])
    weights += 1
    held_back.set()
    folder = saves.finish()
    assert (saves.step, saves.ended) == (None, False)
    reader = CheckpointReader(folder)
    assert (reader.step, reader.meta) == (7, {"tag": 1})
    assert torch.equal(reader.tensor("t0"), wanted)


def test_a_blocking_save_has_ended_when_it_was_begun(tmp_path):
    saves = BackgroundSaves(tmp_path, keep=3, blocking=True)
    saves.begin(7, pieces(torch.ones(2)), {}, {})
    assert (saves.step, saves.ended) == (7, True)
    assert list_checkpoints(tmp_path) == [(7, saves.finish())]


def test_one_save_at_a_time(tmp_path, held_back):
    saves = BackgroundSaves(tmp_path, keep=3, blocking=False)
    saves.begin(7, pieces(torch.ones(2)), {}, {})
    with pytest.raises(RuntimeError, match="step 7 is not finished"):
        saves.begin(8, pieces(torch.ones(2)), {}, {})


def test_what_the_thread_meets_is_raised_where_training_waits(tmp_path, monkeypatch):
    saves = BackgroundSaves(tmp_path, keep=3, blocking=False)
    saves.begin(7, pieces(torch.tensor([1.0, float("nan")])), {}, {})
    with pytest.raises(DamagedState, match=r"t0 [(]1 element not finite"):
        saves.finish()
    monkeypatch.setattr(checkpoints, "write_shard", _full)
    saves.begin(8, pieces(torch.ones(2)), {}, {})
    with pytest.raises(CheckpointNotWritten, match="No space left"):
        saves.finish()
    monkeypatch.undo()
    saves.begin(9, pieces(torch.ones(2)), {}, {})
    saves.finish()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9]


def _full(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (checkpoints.write_shard, "saved {}/step-00000007"),
        (_full, "warning: the checkpoint of step 7 was not"),
    ],
)
def test_closing_waits_and_says_what_became_of_it(tmp_path, monkeypatch, write, said):
    monkeypatch.setattr(checkpoints, "write_shard", write)
    saves, lines = BackgroundSaves(tmp_path, keep=3, blocking=False), []
    saves.begin(7, pieces(torch.ones(2)), {}, {})
    saves.close(lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(said.format(tmp_path))
    saves.close(lines.append)
    assert len(lines) == 1


def test_the_copy_has_every_bit_and_keeps_its_memory():
    copy = HostCopy()
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.tensor(3),
        torch.empty(0),
        torch.tensor([float("nan"), -0.0]),
    ]
    first = copy.take(pieces(*tensors))
    copy.wait()
    place = first[0].data.data_ptr()
    for piece, tensor in zip(first, tensors, strict=True):
        assert (piece.shape, piece.data.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(piece.data.view(torch.uint8), tensor.flatten().view(torch.uint8))
    again = copy.take(pieces(*reversed(tensors)))
    assert again[0].data.data_ptr() == place
    assert torch.equal(again[-1].data, tensors[0].flatten())
    larger = copy.take(pieces(torch.ones(1000)))
    assert larger[0].data.sum() == 1000


def test_a_machine_without_room_waits_for_its_disk(monkeypatch):
    monkeypatch.setattr(background_saves, "available_memory", lambda: 100 * 10**9)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert room_for_copies(8 * 10**9) == []
    (line,) = room_for_copies(9 * 10**9)
    assert "72.0 GB of host memory" in line
    assert "100.0 GB are free" in line
