import hashlib
import json
import os

import pytest

from millrace.engine.checkpoint import manifest as module
from millrace.engine.checkpoint.manifest import (
    DamagedCheckpoint,
    FileRecord,
    Manifest,
    PieceRecord,
    ShardIndex,
    TensorRecord,
    merge,
    read_manifest,
    shard_name,
    verify_file,
    write_file,
    write_manifest,
)
from millrace.engine.util.errors import UserError

NO_FILE = FileRecord(0, "")


def index(name, shape, *ranges, shard=0, dtype="F32"):
    pieces = [PieceRecord(shard, start, count, 0) for start, count in ranges]
    return ShardIndex(NO_FILE, {name: TensorRecord(shape, dtype, pieces)})


def test_merge_orders_pieces_over_shards_and_names():
    merged = merge(
        [
            index("b", (2, 5), (7, 3), (0, 2), shard=0),
            index("b", (2, 5), (2, 5), shard=1),
            index("a", (), (0, 1), shard=1),
        ]
    )
    assert list(merged) == ["a", "b"]
    assert [(p.shard, p.start, p.count) for p in merged["b"].pieces] == [(0, 0, 2), (1, 2, 5), (0, 7, 3)]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([(0, 4)], [(6, 4)], r"w: elements \[4, 6\) of 10 are held by no rank"),
        ([(1, 4)], [(5, 5)], r"w: elements \[0, 1\) of 10 are held by no rank"),
        ([(0, 4)], [(4, 5)], r"w: elements \[9, 10\) of 10 are held by no rank"),
        ([(0, 6)], [(4, 6)], r"w: elements \[4, 6\) of 10 are handed over twice"),
        ([(0, 10)], [(0, 10)], r"w: elements \[0, 10\) of 10 are handed over twice"),
        ([], [], r"w: elements \[0, 10\) of 10 are held by no rank"),
    ],
)
def test_merge_refuses_gap_and_overlap(first, second, said):
    with pytest.raises(RuntimeError, match=said):
        merge([index("w", (10,), *first), index("w", (10,), *second, shard=1)])


def test_merge_accepts_an_empty_tensor_and_empty_shares():
    merged = merge([index("empty", (0, 5)), index("w", (3,), (0, 3)), index("w", (3,))])
    assert merged["empty"].pieces == []
    assert [piece.count for piece in merged["w"].pieces] == [3]


@pytest.mark.parametrize("other", [((5, 2), "F32"), ((10,), "BF16")])
def test_merge_refuses_disagreeing_shape_or_dtype(other):
    shape, dtype = other
    with pytest.raises(RuntimeError, match=r"w: one piece says F32 \(10,\), another"):
        merge([index("w", (10,), (0, 10)), index("w", shape, dtype=dtype)])


def test_shard_index_survives_its_file():
    original = index("w", (10,), (0, 4), (4, 6), shard=3)
    assert ShardIndex.from_json(original.to_json()) == original


def test_write_file_hashes_what_it_wrote(tmp_path):
    record = write_file(tmp_path / "x", b"abcdefg")
    assert (tmp_path / "x").read_bytes() == b"abcdefg"
    assert record == FileRecord(7, hashlib.sha256(b"abcdefg").hexdigest())


def written(folder):
    record = TensorRecord((2, 3), "BF16", [PieceRecord(1, 0, 6, 88)])
    files = {
        "meta.json": FileRecord(2, "ab"),
        shard_name(0, 2): FileRecord(8, ""),
        shard_name(1, 2): FileRecord(100, ""),
    }
    manifest = Manifest(100, 2, files, {'odd "name"\n': record})
    write_manifest(folder, manifest)
    return manifest


def test_manifest_round_trip_with_one_tensor_a_line(tmp_path):
    manifest = written(tmp_path)
    assert read_manifest(tmp_path) == manifest
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    assert r'  "odd \"name\"\n": {"shape": [2, 3], "dtype": "BF16", "pieces": [[1, 0, 6, 88]]}' in lines
    digest = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert (tmp_path / "manifest.sha256").read_text() == f"{digest}  manifest.json\n"


def test_another_format_is_refused_but_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 2)
    written(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="checkpoint format 2, but this version reads format 1") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_lost_manifest_is_damage(tmp_path, name):
    written(tmp_path)
    os.remove(tmp_path / name)
    with pytest.raises(DamagedCheckpoint, match=f"{name} cannot be read: No such file") as caught:
        read_manifest(tmp_path)
    assert (caught.value.folder, caught.value.file) == (tmp_path, name)


def test_verify_file_says_expected_and_found(tmp_path):
    record = write_file(tmp_path / "x", b"abc")
    verify_file(tmp_path, "x", record)
    (tmp_path / "x").write_bytes(b"abd")
    found = hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(DamagedCheckpoint, match=f"x has sha256 {found}, expected {record.sha256}"):
        verify_file(tmp_path, "x", record)
    (tmp_path / "x").write_bytes(b"ab")
    with pytest.raises(DamagedCheckpoint, match="x has 2 bytes, expected 3"):
        verify_file(tmp_path, "x", record)


FOREIGN = {
    "a gap": lambda m: m["tensors"]["w"]["pieces"].pop(),
    "an overlap of elements": lambda m: m["tensors"]["w"]["pieces"].append([0, 0, 2, 8]),
    "a piece too long": lambda m: m["tensors"]["w"]["pieces"][1].__setitem__(2, 7),
    "a larger tensor": lambda m: m["tensors"]["w"].update(shape=[2, 4]),
    "a huge shape": lambda m: m["tensors"]["w"].update(shape=[2**40, 2**40]),
    "a negative shape": lambda m: m["tensors"]["w"].update(shape=[-2, -3]),
    "an unknown dtype": lambda m: m["tensors"]["w"].update(dtype="F13"),
    "no dtype": lambda m: m["tensors"]["w"].pop("dtype"),
    "bytes shared by two pieces": lambda m: m["tensors"]["w"]["pieces"][1].__setitem__(3, 16),
    "bytes before the data": lambda m: m["tensors"]["w"]["pieces"][0].__setitem__(3, 0),
    "bytes after the file": lambda m: m["files"][shard_name(0, 1)].update(bytes=31),
    "a shard that is not there": lambda m: m["tensors"]["w"]["pieces"][0].__setitem__(0, 1),
    "a fraction": lambda m: m["tensors"]["w"]["pieces"][0].__setitem__(2, 2.0),
    "a shard left out": lambda m: m["files"].pop(shard_name(0, 1)),
    "another file": lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
    "another file instead": lambda m: m["files"].update({"../x": m["files"].pop(shard_name(0, 1))}),
    "more processes": lambda m: m.update(world_size=2),
    "very many processes": lambda m: m.update(world_size=10**12),
    "no files": lambda m: m.pop("files"),
    "a list of files": lambda m: m.update(files=[]),
    "no step": lambda m: m.pop("step"),
}
"""Changes to a manifest after which it describes no whole checkpoint."""


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_sealed_manifest_that_describes_no_whole_checkpoint_is_refused(tmp_path, change):
    """None that `write_manifest` makes: of a checkpoint that somebody else made, or made up."""
    record = TensorRecord((2, 3), "F32", [PieceRecord(0, 0, 4, 8), PieceRecord(0, 4, 2, 24)])
    files = {"meta.json": FileRecord(2, "ab"), shard_name(0, 1): FileRecord(32, "cd")}
    write_manifest(tmp_path, Manifest(100, 1, files, {"w": record}))
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert read_manifest(tmp_path).tensors["w"] == record
    change(values)
    data = json.dumps(values).encode()
    (tmp_path / "manifest.json").write_bytes(data)
    (tmp_path / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json does not describe a checkpoint") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_manifest_without_an_end_is_not_read(tmp_path, name):
    written(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DamagedCheckpoint, match=f"{name} cannot be read: not a regular file"):
        read_manifest(tmp_path)


def test_a_manifest_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr(module, "LARGEST", 100)
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json is larger than 100 bytes"):
        read_manifest(tmp_path)
