"""The index of all shards: rows are those of the shards, made once for all processes of a machine."""

import multiprocessing
import os

import numpy as np
import pytest

from millrace.engine.data.formats import joined_index
from millrace.engine.data.formats.joined_index import ROW, open_index
from millrace.engine.data.formats.shard_index import read_index, read_manifest
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.distributed import process_group
from millrace.engine.util import node_cache
from millrace.engine.util.errors import UserError


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path / "set", {(16, 32): 5, (32, 16): 2, (32, 32): 9})
    return tmp_path / "set"


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Small sets are mapped too; the folder of the cache."""
    monkeypatch.setattr(joined_index, "MAPPED_ROWS", 1)
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def is_mapped(array):
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def equals_the_shards(index, root):
    manifest = read_manifest(root)
    rows = np.concatenate([read_index(root, shard) for shard in manifest.shards])
    buckets = [
        manifest.buckets.index(shard.bucket) for shard in manifest.shards for _ in range(shard.samples)
    ]
    np.testing.assert_array_equal(index.rows, rows)
    assert index.rows.dtype == ROW
    assert index.bucket_of.dtype == np.int32
    assert index.bucket_of.tolist() == buckets
    assert not index.rows.flags.writeable
    assert not index.bucket_of.flags.writeable


def test_a_small_set_is_held(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    index = open_index(dataset, read_manifest(dataset))
    equals_the_shards(index, dataset)
    assert not (tmp_path / "cache").exists()


def test_a_large_set_is_mapped_and_its_shards_are_read_once(dataset, mapped, monkeypatch):
    manifest = read_manifest(dataset)
    equals_the_shards(open_index(dataset, manifest), dataset)
    monkeypatch.setattr(joined_index, "read_index", pytest.fail)
    index = open_index(dataset, manifest)
    assert is_mapped(index.rows)
    assert is_mapped(index.bucket_of)
    monkeypatch.undo()
    equals_the_shards(index, dataset)
    (file,) = mapped.iterdir()
    assert file.stat().st_size == 16 * (ROW.itemsize + 4)


def test_another_set_has_another_file(dataset, mapped, tmp_path, write_shards):
    write_shards(tmp_path / "other", {(16, 32): 5, (32, 16): 2, (32, 32): 8})
    for root in (dataset, tmp_path / "other", dataset):
        equals_the_shards(open_index(root, read_manifest(root)), root)
    assert len(list(mapped.iterdir())) == 2


def open_it(root, barrier):
    barrier.wait()
    index = open_index(root, read_manifest(root))
    equals_the_shards(index, root)


def test_processes_that_open_it_at_once(dataset, mapped):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=open_it, args=(dataset, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(mapped.iterdir())) == 1


def test_without_a_folder_to_write_it_is_held(dataset, mapped, caplog):
    mapped.write_text("a file in the way")
    equals_the_shards(open_index(dataset, read_manifest(dataset)), dataset)
    assert "MILLRACE_CACHE" in caplog.text
    assert len(caplog.messages) == 1


def test_a_damaged_file_of_the_cache_is_made_again(dataset, mapped):
    open_index(dataset, read_manifest(dataset))
    (file,) = mapped.iterdir()
    os.truncate(file, 100)
    index = open_index(dataset, read_manifest(dataset))
    assert is_mapped(index.rows)
    equals_the_shards(index, dataset)


def test_a_wrong_index_is_refused_and_leaves_nothing(dataset, mapped):
    path = dataset / "16x32/00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"00000\.npy: its SHA-256"):
        open_index(dataset, read_manifest(dataset))
    assert list(mapped.iterdir()) == []


def test_tars_are_looked_at_once_a_machine(dataset, monkeypatch):
    os.truncate(dataset / "16x32/00000.tar", 100)
    with pytest.raises(UserError, match="has 100 bytes"):
        ShardsSource(dataset)
    monkeypatch.setattr(process_group, "local_rank", lambda: 1)
    assert len(ShardsSource(dataset)) == 16
