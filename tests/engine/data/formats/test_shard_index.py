import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from millrace.engine.data.formats.shard_index import ROW, Manifest, read_index, read_manifest
from millrace.engine.util.errors import UserError


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path, {(16, 32): 5, (32, 16): 2})
    return tmp_path


def rewrite(root, change):
    """Apply `change` to the values of manifest.json."""
    path = root / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_manifest_comes_back_with_keys_that_are_not_known_yet(dataset, write_shards):
    before = read_manifest(dataset)
    assert before.samples == 7
    assert [shard.file for shard in before.shards] == [
        "16x32/00000.tar",
        "16x32/00001.tar",
        "32x16/00000.tar",
    ]
    rewrite(dataset, lambda values: values.update(later={"x": 1}))
    after = read_manifest(dataset)
    assert after.model_dump()["later"] == {"x": 1}
    assert after.digest == before.digest
    rewrite(dataset, lambda values: values["shards"].reverse())
    assert read_manifest(dataset).digest != before.digest


def test_folders_that_are_no_data_set(tmp_path):
    refused(lambda: read_manifest(tmp_path / "none"), tmp_path / "none", "no such folder")
    refused(lambda: read_manifest(tmp_path), tmp_path, "manifest.json", "millrace prepare")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="other"), "'other'"),
        (lambda m: m["shards"][0].update(file="../x/00000.tar"), "shards.0.file"),
        (lambda m: m["shards"][0].update(file="/16x32/00000.tar"), "shards.0.file"),
        (lambda m: m["shards"][0].update(file="16x48/00000.tar"), "folder of its bucket"),
        (lambda m: m["shards"][0].update(samples=0), "shards.0.samples"),
        (lambda m: m["shards"][0].update(sha256="x"), "shards.0.sha256"),
        (lambda m: m["shards"].append(m["shards"][0]), "named twice"),
        (lambda m: m.update(buckets=[[16, 32]]), "buckets"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m.pop("resolution"), "resolution"),
    ],
)
def test_manifests_that_cannot_be(dataset, change, part):
    rewrite(dataset, change)
    refused(lambda: read_manifest(dataset), dataset / "manifest.json", part)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"shards": ' + "[" * 100_000, "\xff"])
def test_manifests_that_are_not_json(dataset, text):
    (dataset / "manifest.json").write_text(text, encoding="latin-1")
    refused(lambda: read_manifest(dataset), dataset / "manifest.json")


def test_index_of_another_content_is_refused_by_its_checksum(dataset):
    shard = read_manifest(dataset).shards[0]
    path = dataset / "16x32/00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(lambda: read_index(dataset, shard), path, "SHA-256")
    path.unlink()
    refused(lambda: read_index(dataset, shard), path, "No such file")


@pytest.mark.parametrize(
    ("field", "row", "value"),
    [
        ("picture_offset", 0, 0),
        ("picture_offset", 2, 2**62),
        ("picture_bytes", 1, 0),
        ("picture_bytes", 1, 2**63 - 1),
        ("picture_bytes", 3, -5),
        ("json_offset", 0, 512),
        ("json_bytes", 3, 2**40),
        ("width", 0, 0),
        ("height", 2, -1),
    ],
)
def test_index_with_offsets_outside_the_tar_is_refused_even_with_its_checksum(dataset, field, row, value):
    path = dataset / "16x32/00000.npy"
    rows = np.load(path)
    rows[field][row] = value
    np.save(path, rows)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(dataset, lambda values: values["shards"][0].update(index_sha256=digest))
    shard = read_manifest(dataset).shards[0]
    refused(lambda: read_index(dataset, shard), path, "offsets")


@pytest.mark.parametrize(
    "rows", [np.zeros(4), np.zeros((4, 1), ROW), np.zeros(3, ROW), np.array([{}] * 4, dtype=object)]
)
def test_arrays_that_are_no_index(dataset, rows):
    path = dataset / "16x32/00000.npy"
    np.save(path, rows, allow_pickle=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(dataset, lambda values: values["shards"][0].update(index_sha256=digest))
    refused(lambda: read_index(dataset, read_manifest(dataset).shards[0]), path)


def test_manifest_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="shards"):
        Manifest(resolution=16, aspect="mixed", patch=16, buckets=(), shards=())


def test_many_threads_read_indexes_at_once(dataset):
    """np.load fails now and then when several threads use it."""
    shards = read_manifest(dataset).shards * 500
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda shard: read_index(dataset, shard), shards))
    for shard, some in zip(shards[:3], rows[:3], strict=True):
        np.testing.assert_array_equal(some, np.load((dataset / shard.file).with_suffix(".npy")))


def test_white_space_of_other_numpy_versions_is_taken(dataset):
    path = dataset / "16x32/00000.npy"
    data = path.read_bytes()
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].rstrip() + b" " * 100 + b"\n"
    path.write_bytes(data[:8] + len(header).to_bytes(2, "little") + header + data[10 + length :])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(dataset, lambda values: values["shards"][0].update(index_sha256=digest))
    assert len(read_index(dataset, read_manifest(dataset).shards[0])) == 4
