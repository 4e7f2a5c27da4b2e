"""Several ranks, as threads: they save together, fail together and resume from the same checkpoint."""

import errno
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from millrace.engine.checkpoint import checkpoints
from millrace.engine.checkpoint.checkpoints import CheckpointNotWritten, resume_checkpoint, save_checkpoint
from millrace.engine.checkpoint.damage import BadElements, DamagedState
from millrace.engine.checkpoint.manifest import DamagedCheckpoint
from millrace.engine.checkpoint.sharded_tensors import Piece
from millrace.engine.util.errors import UserError


def pieces(step, rank, world_size):
    low, high = rank * 12 // world_size, (rank + 1) * 12 // world_size
    return [Piece("w", (3, 4), low, torch.arange(low, high) + 1000 * step)]


def assert_holds(reader, step):
    assert (reader.step, reader.meta) == (step, {"of": step})
    assert reader.tensor("w").tolist() == [[1000 * step + 4 * row + i for i in range(4)] for row in range(3)]


def names(root):
    return sorted(path.name for path in root.iterdir())


class Ranks:
    """An agreement that not all ranks reach within 10 s breaks the barrier, which no test expects."""

    def __init__(self, world_size):
        self.world_size, self.rank = world_size, threading.local()
        self.votes, self.agreements = [None] * world_size, []
        self.barrier = threading.Barrier(world_size, action=self.count, timeout=10)

    def count(self):
        self.agreements.append(pickle.loads(pickle.dumps(self.votes)))  # as it travels between processes

    def gather(self, value):
        self.votes[self.rank.number] = value
        self.barrier.wait()
        return self.agreements[-1]

    def run(self, call):
        """What `call(rank, rank=..., world_size=..., gather=...)` returned or raised, by rank."""

        def one(rank):
            self.rank.number = rank
            try:
                return call(rank, rank=rank, world_size=self.world_size, gather=self.gather)
            except (UserError, RuntimeError) as error:
                return error

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(one, range(self.world_size)))

    def save(self, root, step, pieces_of=None):
        pieces_of = pieces_of or (lambda rank: pieces(step, rank, self.world_size))
        return self.run(
            lambda me, **ranks: save_checkpoint(root, step, pieces_of(me), {"of": step}, keep=9, **ranks)
        )

    def resume(self, root, which="auto"):
        return self.run(lambda me, **ranks: resume_checkpoint(root, which, **ranks))


@pytest.mark.parametrize("writers", [2, 3])
@pytest.mark.parametrize("readers", [1, 4])
def test_another_number_of_ranks_resumes(tmp_path, writers, readers):
    folders = Ranks(writers).save(tmp_path, 100)
    assert folders == [tmp_path / "step-00000100"] * writers
    assert names(folders[0]) == [
        "manifest.json",
        "manifest.sha256",
        "meta.json",
        *(f"shard-{rank:05d}-of-{writers:05d}.safetensors" for rank in range(writers)),
    ]
    for reader, messages in Ranks(readers).resume(tmp_path):
        assert messages == []
        assert_holds(reader, 100)


def test_all_ranks_know_the_folder_of_a_step_saved_again(tmp_path):
    ranks = Ranks(2)
    ranks.save(tmp_path, 100)
    assert ranks.save(tmp_path, 100) == [tmp_path / "step-00000100.1"] * 2
    assert names(tmp_path) == ["step-00000100.1"]


@pytest.mark.parametrize("failing", [0, 2])
def test_one_failing_rank_stops_all_and_publishes_nothing(tmp_path, failing):
    ranks = Ranks(3)
    ranks.save(tmp_path, 100)
    ranks.agreements.clear()

    def fails_half_way(rank):
        yield from pieces(200, rank, 3)
        if rank == failing:
            raise OSError(errno.EIO, "Input/output error", "/dev/device")

    for error in ranks.save(tmp_path, 200, fails_half_way):
        assert isinstance(error, CheckpointNotWritten)  # which every rank may try again
        assert "Input/output error (/dev/device)" in str(error)
    assert len(ranks.agreements) == 2
    assert names(tmp_path) == ["step-00000100"]

    assert ranks.save(tmp_path, 200) == [tmp_path / "step-00000200"] * 3
    assert_holds(resume_checkpoint(tmp_path)[0], 200)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([(0, 5), (6, 12)], "w: elements [5, 6) of 12 are held by no rank"),
        ([(0, 7), (6, 12)], "w: elements [6, 7) of 12 are handed over twice"),
    ],
)
def test_gap_and_overlap_between_ranks_are_never_published(tmp_path, ranges, said):
    def cut(rank):
        low, high = ranges[rank]
        return [Piece("w", (12,), low, torch.zeros(high - low))]

    ranks = Ranks(2)
    for error in ranks.save(tmp_path, 100, cut):
        assert type(error) is RuntimeError
        assert str(error) == said
    assert len(ranks.agreements) == 3
    assert names(tmp_path) == []


def test_damage_in_one_share_is_known_to_all(tmp_path):
    ranks = Ranks(3)
    ranks.save(tmp_path, 100)
    shard = ranks.save(tmp_path, 200)[0] / "shard-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x10
    shard.write_bytes(data)

    for reader, messages in ranks.resume(tmp_path):
        assert_holds(reader, 100)
        assert len(messages) == 1
        assert f"{shard.name} has sha256" in messages[0]
    for error in ranks.resume(tmp_path, 200):
        assert isinstance(error, DamagedCheckpoint)
        assert error.file == shard.name


def test_a_file_that_only_one_rank_cannot_read_is_damage_on_all(tmp_path, monkeypatch):
    ranks = Ranks(2)
    folder = ranks.save(tmp_path, 100)[0]
    verify = "millrace.engine.checkpoint.sharded_tensors.CheckpointReader.verify"

    def fails_on_rank_1(reader, share=0, of=1, sound=False):
        if share == 1:
            raise DamagedCheckpoint(folder, "meta.json", "cannot be read: Stale file handle")

    monkeypatch.setattr(verify, fails_on_rank_1)
    for error in ranks.resume(tmp_path, 100):
        assert isinstance(error, DamagedCheckpoint)
        assert "meta.json cannot be read: Stale file handle" in str(error)


def test_ranks_go_by_the_listing_of_the_first(tmp_path, monkeypatch):
    """A network file system may show another node the folder as it was seconds ago."""
    ranks = Ranks(2)
    ranks.save(tmp_path, 100)
    listed = checkpoints.list_checkpoints

    def stale(root):
        return listed(root) if ranks.rank.number == 0 else []

    monkeypatch.setattr(checkpoints, "list_checkpoints", stale)
    for which in ("auto", 100):
        for reader, messages in ranks.resume(tmp_path, which):
            assert messages == []
            assert_holds(reader, 100)


@pytest.mark.parametrize("writer", [0, 1])
def test_a_damaged_state_on_one_rank_is_published_by_none(tmp_path, writer):
    ranks = Ranks(2)
    ranks.save(tmp_path, 100)

    def spoilt(rank):
        for piece in pieces(200, rank, 2):
            data = piece.data.float()
            if rank == writer:
                data[1] = float("nan")
            yield Piece(piece.name, piece.shape, piece.start, data)

    for error in ranks.save(tmp_path, 200, spoilt):
        assert isinstance(error, DamagedState)
        assert error.bad == {"w": BadElements(1, 0)}
    assert names(tmp_path) == ["step-00000100"]
