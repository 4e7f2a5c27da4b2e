import pytest

from millrace.engine.data.prepare.verify import verify
from millrace.engine.util.errors import UserError


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path, {(16, 32): 6, (32, 16): 3})
    return tmp_path


def test_a_sound_data_set(dataset):
    assert verify(dataset, 2) == []


def test_every_damaged_file_is_named(dataset):
    def flip(name, offset):
        data = bytearray((dataset / name).read_bytes())
        data[offset] ^= 1
        (dataset / name).write_bytes(data)

    flip("16x32/00000.tar", 700)
    flip("16x32/00001.npy", -1)
    flip("32x16/00000.idx", -3)
    tar, index, dali = verify(dataset, 2)
    flip("32x16/00000.idx", -3)
    flip("32x16/00000.keys", 5)
    assert "32x16/00000.keys: its SHA-256" in verify(dataset, 2)[2]
    assert "16x32/00000.tar: its SHA-256" in tar
    assert "damaged records: 0" in tar
    assert "16x32/00001.npy: its SHA-256" in index
    assert "32x16/00000.idx: is not the index" in dali


def test_missing_and_short_files(dataset):
    (dataset / "16x32/00000.tar").unlink()
    tar = dataset / "32x16/00000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    (dataset / "16x32/00001.idx").unlink()
    one, two, three = verify(dataset, 1)
    assert "16x32/00000.tar: cannot be read: " in one
    assert "16x32/00001.tar" in two or "00001.idx" in two
    assert "32x16/00000.tar: its SHA-256" in three


def test_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify(tmp_path, 1)
