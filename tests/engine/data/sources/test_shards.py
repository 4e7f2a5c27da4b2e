import errno
import gc
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

import numpy as np
import pytest
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import Captions, SampleStream, UnreadablePicture, open_source
from millrace.engine.data.formats import byte_store
from millrace.engine.data.sources.key_subset import keep_listed, write_keys
from millrace.engine.data.sources.open_source import fingerprint
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError

COUNTS = {(16, 32): 6, (32, 16): 3}


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path / "set", COUNTS)
    return tmp_path / "set"


def damage(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_samples_come_in_the_order_of_the_manifest(dataset):
    source = open_source(Data(source="shards", path=str(dataset)))
    assert isinstance(source, ShardsSource)
    assert len(source) == 9
    assert source.buckets == ((16, 32), (32, 16))
    assert source.bucket_of.tolist() == [0] * 6 + [1] * 3
    assert source.bucket_of.dtype == np.int32
    assert [source.place(i) for i in (0, 3, 4, 5, 6, 8)] == [(0, 0), (0, 3), (1, 0), (1, 1), (2, 0), (2, 2)]
    for i in range(9):
        assert source.key(i) == f"pictures/{i}.png"
        assert source.captions(i) == Captions(f"long caption of {i}", f"short {i}")
        h, w = source.buckets[source.bucket_of[i]]
        assert source.stored_size(i) == (w + 4, h)
        file = Image.open(io.BytesIO(source.encoded(i)))
        assert file.format == "JPEG"
        assert source.image(i).mode == "RGB"
        np.testing.assert_array_equal(np.asarray(source.image(i)), np.asarray(file))


def test_any_thread_may_read_any_sample_with_few_open_files(dataset, monkeypatch):
    monkeypatch.setattr(byte_store, "OPEN_SHARE", 0)
    source = ShardsSource(dataset)
    before = len(os.listdir("/proc/self/fd"))
    expected = [source.encoded(i) for i in range(9)]
    order = np.random.default_rng(0).integers(0, 9, 400).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.encoded, order)) == [expected[i] for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_process_that_may_open_no_more_files_gives_back_its_own(dataset, monkeypatch):
    source = ShardsSource(dataset)
    expected = [source.encoded(i) for i in range(9)]
    fresh, real = ShardsSource(dataset), os.open

    def limited(path, *rest):
        if len(fresh._store.files) >= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest)

    monkeypatch.setattr(byte_store.os, "open", limited)
    assert [fresh.encoded(i) for i in range(9)] == expected
    assert len(fresh._store.files) == 1


def test_sources_share_what_a_process_may_have_open(dataset, monkeypatch):
    monkeypatch.setattr(byte_store, "raise_limit", lambda: 8)
    gc.collect()
    monkeypatch.setattr(byte_store.OpenFiles, "_all", WeakSet())
    first, second = ShardsSource(dataset), ShardsSource(dataset)
    for source in (first, second):
        for i in range(9):
            source.encoded(i)
        assert len(source._store.files) == 2
    del source, second
    gc.collect()
    for i in range(9):
        first.encoded(i)
    assert len(first._store.files) == 3  # all there are


def test_a_copy_for_another_process_reads_the_same(dataset):
    source = ShardsSource(dataset)
    other = pickle.loads(pickle.dumps(source))
    assert other.digest == source.digest
    assert other.encoded(8) == source.encoded(8)


@pytest.mark.parametrize("file", ["picture", "json"])
def test_a_damaged_record_is_unreadable_and_named_by_its_place(dataset, file):
    offset = int(np.load(dataset / "16x32/00001.npy")[f"{file}_offset"][1])
    damage(dataset / "16x32/00001.tar", offset + 8)
    source = ShardsSource(dataset)
    for read in (source.encoded, source.image, source.captions):
        with pytest.raises(UnreadablePicture, match=r"16x32/00001\.tar#1: .*CRC-32"):
            read(5)
    assert source.key(5) == "16x32/00001.tar#1"
    assert source.key(4) == "pictures/4.png"


def test_a_tar_that_shrinks_or_vanishes_in_a_run_is_unreadable(dataset):
    source = ShardsSource(dataset)
    os.truncate(dataset / "32x16/00000.tar", 600)
    with pytest.raises(UnreadablePicture, match="ends before it"):
        source.encoded(8)
    (dataset / "16x32/00001.tar").unlink()
    with pytest.raises(UnreadablePicture, match="No such file"):
        source.image(5)


def test_the_stream_replaces_and_counts_damaged_records(dataset):
    offset = int(np.load(dataset / "16x32/00000.npy")["picture_offset"][2])
    damage(dataset / "16x32/00000.tar", offset)
    data = Data(
        source="shards",
        path=str(dataset),
        resolution=16,
        global_batch=9,
        micro_batch=9,
        workers=2,
        max_bad_share=0.2,
    )
    stream = SampleStream(open_source(data), data, seed=0, patch=16, caption_drop=0.0, rank=0, world_size=1)
    batch = next(stream)
    stream.close()
    assert list(stream.bad) == ["16x32/00000.tar#2"]
    assert sorted(batch.keys) == sorted(f"pictures/{3 if i == 2 else i}.png" for i in range(9))


def test_shards_that_do_not_fit_the_manifest_are_refused_when_opened(dataset):
    tar = dataset / "16x32/00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    refused(lambda: ShardsSource(dataset), tar, len(whole) - 1, len(whole))
    tar.unlink()
    refused(lambda: ShardsSource(dataset), tar, "No such file")


def test_checksums_are_compared_at_the_first_touch_on_request(dataset):
    tar = dataset / "16x32/00001.tar"
    damage(tar, 0)  # a header, which reading by offset does not meet
    assert ShardsSource(dataset).encoded(4)
    source = ShardsSource(dataset, verify=True)
    assert source.encoded(0)
    refused(lambda: source.encoded(4), tar, "SHA-256")


def test_fingerprint_needs_no_records(dataset, tmp_path, monkeypatch):
    write_keys(tmp_path / "keys.txt", ["pictures/3.png", "pictures/0.png"])
    source = ShardsSource(dataset)
    kept = keep_listed(source, tmp_path / "keys.txt")
    monkeypatch.setattr(ShardsSource, "record", None)
    prints = {fingerprint(source), fingerprint(kept)}
    assert len(prints) == 2
    assert fingerprint(ShardsSource(dataset)) in prints


def test_fingerprint_follows_checksums(dataset, write_shards, tmp_path):
    other = write_shards(tmp_path / "other", COUNTS, draw=lambda i, h, w: np.full((h, w, 3), i, np.uint8))
    assert other.samples == 9
    assert fingerprint(ShardsSource(dataset)) != fingerprint(ShardsSource(tmp_path / "other"))
    write_shards(tmp_path / "same", COUNTS)
    assert fingerprint(ShardsSource(dataset)) == fingerprint(ShardsSource(tmp_path / "same"))


def test_path_is_asked_for():
    with pytest.raises(ValueError, match=r"source shards needs data\.path"):
        Data(source="shards")
