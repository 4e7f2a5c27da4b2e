import hashlib
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from millrace.engine.checkpoint import sharded_tensors
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.manifest import (
    DamagedCheckpoint,
    Manifest,
    merge,
    shard_name,
    write_file,
    write_manifest,
)
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader, Piece, write_shard
from millrace.engine.util.errors import UserError


def state():
    """Tensors of every kind a run stores, with values that a lossy path would change."""
    generator = torch.Generator().manual_seed(7)
    special = torch.tensor([0x7FC00123, -0x7FFFFFFF - 1, 0x7F800000, 1, -1], dtype=torch.int32)
    return {
        "master/w": torch.randn(7, 11, generator=generator),
        "master/special": special.view(torch.float32),  # NaN with a payload, -0.0, inf, a denormal, a NaN
        "ema/w": torch.randn(5, 3, generator=generator).bfloat16(),
        "half": torch.randn(9, generator=generator).half(),
        "double": torch.randn(4, generator=generator).double(),
        "step": torch.tensor(123456789012345),
        "int32": torch.arange(-3, 4, dtype=torch.int32),
        "bytes": torch.arange(13, dtype=torch.uint8),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 5),
    }


def cuts(numel, parts):
    """Borders of `parts` uneven contiguous ranges, some of them empty for small tensors."""
    return [numel * i * i // (parts * parts) for i in range(parts)] + [numel]


def pieces_of(tensors, rank, world_size):
    for name, tensor in tensors.items():
        borders = cuts(tensor.numel(), world_size)
        start, stop = borders[rank], borders[rank + 1]
        yield Piece(name, tuple(tensor.shape), start, tensor.flatten()[start:stop])


def store(folder, tensors, world_size):
    """A checkpoint folder as `world_size` ranks leave it, one after another."""
    folder.mkdir()
    names = [shard_name(rank, world_size) for rank in range(world_size)]
    indices = [
        write_shard(folder / name, pieces_of(tensors, rank, world_size), rank)
        for rank, name in enumerate(names)
    ]
    files = {name: index.file for name, index in zip(names, indices, strict=True)}
    files["meta.json"] = write_file(folder / "meta.json", b'{"lr": 0.1}')
    write_manifest(folder, Manifest(40, world_size, files, merge(indices)))
    return folder


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_any_split_reads_back_bit_exact(tmp_path, writers):
    tensors = state()
    reader = CheckpointReader(store(tmp_path / "c", tensors, writers))
    assert (reader.step, reader.meta, reader.names()) == (40, {"lr": 0.1}, sorted(tensors))
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert_same_bits(reader.tensor(name), tensor)
        for readers in (1, 2, 3, 5):
            borders = cuts(tensor.numel(), readers)
            for start, stop in pairwise(borders):
                found = reader.read(name, start, stop - start)
                assert_same_bits(found, tensor.flatten()[start:stop])


def test_every_range_of_a_tensor_in_three_pieces(tmp_path):
    reader = CheckpointReader(store(tmp_path / "c", {"w": torch.arange(20.0)}, 3))
    for start in range(21):
        assert reader.read("w", start).tolist() == [float(i) for i in range(start, 20)]
        for count in range(21 - start):
            assert reader.read("w", start, count).tolist() == [float(i) for i in range(start, start + count)]


def test_what_is_read_is_writable_and_apart_from_the_file(tmp_path):
    reader = CheckpointReader(store(tmp_path / "c", {"w": torch.ones(4)}, 1))
    reader.read("w").zero_()
    assert reader.read("w").tolist() == [1.0] * 4


def test_shard_is_a_safetensors_file_with_aligned_tensors(tmp_path):
    tensors = state()
    record = write_shard(tmp_path / "s.safetensors", pieces_of(tensors, 0, 1), shard=0)
    data = (tmp_path / "s.safetensors").read_bytes()
    assert record.file == (len(data), hashlib.sha256(data).hexdigest())

    loaded = load_file(tmp_path / "s.safetensors")
    assert set(loaded) == {f"{name}@0" for name in tensors if name != "empty"}
    for key, found in loaded.items():
        assert_same_bits(found, tensors[key.removesuffix("@0")].flatten())
    for name, entry in record.tensors.items():
        for piece in entry.pieces:
            assert piece.offset % tensors[name].element_size() == 0


@pytest.mark.parametrize(
    ("start", "data"),
    [(-1, torch.zeros(2)), (5, torch.zeros(2)), (0, torch.zeros(2, 3)), (0, torch.tensor(1.0))],
)
def test_piece_that_does_not_fit_is_refused(tmp_path, start, data):
    with pytest.raises(RuntimeError, match=r"w: a piece is a 1-D range inside \[0, 6\)"):
        write_shard(tmp_path / "s", [Piece("w", (2, 3), start, data)], 0)
    assert not (tmp_path / "s").exists()


def test_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"w: torch.complex64 cannot be stored"):
        write_shard(tmp_path / "s", [Piece("w", (2,), 0, torch.zeros(2, dtype=torch.complex64))], 0)


def test_strided_and_gradient_carrying_pieces_are_stored_by_value(tmp_path):
    tensor = torch.arange(10.0, requires_grad=True)[::2]
    folder = save_checkpoint(tmp_path, 1, [Piece("w", (5,), 0, tensor)], {}, keep=1)
    assert CheckpointReader(folder).tensor("w").tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_unknown_name_and_range_outside(tmp_path):
    reader = CheckpointReader(store(tmp_path / "c", {"w": torch.ones(4)}, 1))
    with pytest.raises(UserError, match=r"holds no tensor 'v'"):
        reader.read("v")
    for start, count in ((-1, 2), (3, 2), (5, None), (2, -1)):
        with pytest.raises(ValueError, match=r"lies outside \[0, 4\)"):
            reader.read("w", start, count)


def test_unverified_reader_still_finds_a_short_or_lost_shard(tmp_path):
    folder = store(tmp_path / "c", {"w": torch.ones(4)}, 1)
    shard = folder / shard_name(0, 1)
    shard.write_bytes(shard.read_bytes()[:-3])
    reader = CheckpointReader(folder, verify=False)
    assert reader.read("w", 0, 3).tolist() == [1.0] * 3
    with pytest.raises(DamagedCheckpoint, match="ends 3 bytes too early"):
        reader.read("w")
    shard.unlink()
    with pytest.raises(DamagedCheckpoint, match="cannot be read: No such file"):
        reader.read("w")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_shares_cover_every_file_once(tmp_path, monkeypatch, world_size):
    reader = CheckpointReader(store(tmp_path / "c", {"w": torch.ones(40)}, 4), verify=False)
    seen = []
    module = "millrace.engine.checkpoint.sharded_tensors"
    monkeypatch.setattr(f"{module}.verify_file", lambda folder, name, record: seen.append(name))
    monkeypatch.setattr(
        f"{module}.CheckpointReader._verify_shard", lambda reader, name, record, sound: seen.append(name)
    )
    for rank in range(world_size):
        reader.verify(rank, world_size)
    assert sorted(seen) == sorted(["meta.json", *(shard_name(rank, 4) for rank in range(4))])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_pieces_are_stored_by_value(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in state().items()}
    folder = save_checkpoint(tmp_path, 1, pieces_of(tensors, 0, 1), {}, keep=1)
    reader = CheckpointReader(folder)
    for name, tensor in state().items():
        assert_same_bits(reader.tensor(name), tensor)


def opens(monkeypatch):
    """Names of the shards that are opened from here on."""
    found = []

    def counted(path, *mode, **options):
        found.append(path.name)
        return open(path, *mode, **options)

    monkeypatch.setattr(sharded_tensors, "open", counted, raising=False)
    return found


def test_a_shard_is_opened_once_while_its_ranges_are_read(tmp_path, monkeypatch):
    tensors = state()
    reader = CheckpointReader(store(tmp_path / "c", tensors, 3))
    found = opens(monkeypatch)
    with reader.kept_open(), reader.kept_open():
        read = {name: reader.tensor(name) for name in tensors}
    for name, tensor in tensors.items():
        assert_same_bits(read[name], tensor)
    assert sorted(found) == [shard_name(rank, 3) for rank in range(3)]
    reader.tensor("master/w")
    assert len(found) == 6  # nothing stays open afterwards


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_tensors, "_KEPT_OPEN", 2)
    reader = CheckpointReader(store(tmp_path / "c", {"w": torch.arange(20.0), "v": torch.arange(9.0)}, 3))
    found = opens(monkeypatch)
    with reader.kept_open():
        assert [reader.tensor(name).tolist() for name in ("w", "v")] == [
            [float(i) for i in range(n)] for n in (20, 9)
        ]
        assert len(reader._open) == 2
        assert not any(file.closed for file in reader._open.values())
    assert len(found) == 6
