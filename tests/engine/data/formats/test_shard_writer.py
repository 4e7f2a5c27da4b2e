import json
import tarfile

import numpy as np
import pytest

from millrace.engine.data.formats.shard_writer import StoredSample, sample_record, shard_bytes, write_shard
from millrace.engine.data.sources.pictures import Captions


def samples(n):
    for i in range(n):
        record = sample_record(f"cats/{i} 猫.png", Captions("long", "short"), 100 + i, 50)
        yield StoredSample(bytes([i % 256]) * (500 + 7 * i), record, 40, 20)


def test_tar_is_a_webdataset_that_others_read(tmp_path):
    shard = write_shard(tmp_path, (16, 32), 3, samples(5), first=120)
    assert shard.file == "16x32/00003.tar"
    with tarfile.open(tmp_path / shard.file) as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == [
            "000000120.jpg",
            "000000120.json",
            "000000121.jpg",
        ]
        assert all(member.isreg() and member.mtime == 0 and member.uid == 0 for member in members)
        for i, stored in enumerate(samples(5)):
            assert tar.extractfile(f"{120 + i:09d}.jpg").read() == stored.picture
            values = json.loads(tar.extractfile(f"{120 + i:09d}.json").read())
            assert values == {
                "key": f"cats/{i} 猫.png",
                "long": "long",
                "short": "short",
                "width": 100 + i,
                "height": 50,
            }


def test_both_indexes_point_at_the_data(tmp_path):
    shard = write_shard(tmp_path, (16, 32), 0, samples(5), first=0)
    data = (tmp_path / shard.file).read_bytes()
    assert len(data) == shard.bytes
    rows = np.load(tmp_path / "16x32/00000.npy")
    for stored, row in zip(samples(5), rows, strict=True):
        at, json_at = row["picture_offset"], row["json_offset"]
        assert data[at : at + row["picture_bytes"]] == stored.picture
        assert data[json_at : json_at + row["json_bytes"]] == stored.record
        assert (row["width"], row["height"]) == (40, 20)
    first, *lines = (tmp_path / "16x32/00000.idx").read_text().splitlines()
    assert first == "v1.2 5"
    with tarfile.open(tmp_path / shard.file) as tar:
        offsets = {member.name: (member.offset_data, member.size) for member in tar.getmembers()}
    for line in lines:
        words = line.split()
        assert len(words) == 8
        for extension, offset, size, name in (words[:4], words[4:]):
            assert name.endswith(f".{extension}")
            assert offsets[name] == (int(offset), int(size))


def test_size_is_known_before_writing(tmp_path):
    shard = write_shard(tmp_path, (16, 32), 0, samples(5), first=0)
    assert shard.bytes == 1024 + sum(shard_bytes(len(s.picture), len(s.record)) for s in samples(5))


def test_same_samples_give_the_same_bytes(tmp_path):
    shards = [write_shard(tmp_path / name, (16, 32), 0, samples(5), first=0) for name in "ab"]
    assert shards[0] == shards[1]
    for name in ("00000.tar", "00000.idx", "00000.npy", "00000.keys"):
        assert (tmp_path / "a/16x32" / name).read_bytes() == (tmp_path / "b/16x32" / name).read_bytes()


def test_nothing_is_left_of_a_shard_that_was_not_finished(tmp_path):
    def breaks():
        yield from samples(2)
        raise RuntimeError("the input ends here")

    with pytest.raises(RuntimeError, match="the input ends here"):
        write_shard(tmp_path, (16, 32), 0, breaks(), first=0)
    with pytest.raises(ValueError, match="without samples"):
        write_shard(tmp_path, (16, 32), 0, [], first=0)
    assert list((tmp_path / "16x32").iterdir()) == []
