"""Shards behind a URL: the samples of the folder, bit for bit, whatever the connection does."""

import hashlib
import logging
import time
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch

from millrace.engine.config import Data
from millrace.engine.config.data import Remote
from millrace.engine.config.loading import parse_config
from millrace.engine.data import SampleStream, UnreadablePicture, open_source
from millrace.engine.data.formats.byte_store import Span
from millrace.engine.data.remote import remote_store
from millrace.engine.data.remote.remote_files import ATTEMPTS, RemoteFiles
from millrace.engine.data.remote.remote_store import merged
from millrace.engine.data.sources.key_subset import write_keys
from millrace.engine.data.sources.open_source import fingerprint
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.evaluation.reference_set import Reference
from millrace.engine.util.errors import UserError

COUNTS = {(16, 64): 24, (32, 32): 21}


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path / "set", COUNTS, per_shard=8)
    return tmp_path / "set"


def data_of(path, **changes):
    values = {"resolution": 16, "global_batch": 8, "micro_batch": 4, "workers": 2, "flip": 0.5} | changes
    return Data(source="shards", path=str(path), **values)


def digest_of(data, micro_batches=30, first_sample=0):
    """SHA-256 of everything that training takes, and the keys of samples."""
    source = open_source(data)
    stream = SampleStream(
        source, data, seed=3, patch=4, caption_drop=0.2, rank=0, world_size=1, first_sample=first_sample
    )
    found, keys = hashlib.sha256(), []
    for batch in islice(stream, micro_batches):
        for pixels, caption, key in zip(batch.images, batch.captions, batch.keys, strict=True):
            found.update(pixels.numpy().tobytes() + repr((pixels.shape, caption, key)).encode())
            keys.append(key)
    assert stream.bad == {}
    stream.close()
    return found.hexdigest(), keys


@pytest.fixture
def alone(monkeypatch):
    """No data set is small enough for its cache: samples are asked for alone."""
    monkeypatch.setattr(remote_store, "HELD", 0.0)


@pytest.mark.parametrize("block", [700, None])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("aspect", ["square", "mixed", "bucket"])
def test_samples_are_those_of_the_folder(dataset, serve, aspect, workers, block, eventually, monkeypatch):
    if block is None:
        monkeypatch.setattr(remote_store, "HELD", 0.0)
    else:  # of which samples take several, and share some
        monkeypatch.setattr(remote_store, "BLOCK", block)
    offset = int(np.load(dataset / "16x64/00001.npy")["picture_offset"][3]) + 5
    server = serve(dataset, latency=0.01, failures=0.05, cuts=0.05, flips={("16x64/00001.tar", offset): 1})
    resolution = 32 if aspect == "bucket" else 16
    data = data_of(dataset, aspect=aspect, bucket_run=4, workers=workers, resolution=resolution)
    expected = digest_of(data)
    assert len(set(expected[1])) == 45
    remote = data.model_copy(update={"path": server.url})
    assert digest_of(remote) == expected
    assert server.counts["failed"] + server.counts["cut"] > 0
    assert server.counts["flipped"] == 1

    def all_from_the_disk():  # the manifest is all that is asked for
        before = server.counts["bytes"]
        assert digest_of(remote) == expected
        return server.counts["bytes"] - before <= 2 * (dataset / "manifest.json").stat().st_size

    eventually(all_from_the_disk)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_other_schemes(dataset, scheme):
    url = f"file://{dataset}"
    if scheme == "memory":
        url = "memory://bucket/sets/one"
        fsspec.filesystem("memory").put(str(dataset), "/bucket/sets/one", recursive=True)
    data = data_of(dataset)
    expected = digest_of(data)
    for cache_gb in (0, 1):
        remote = data.model_copy(update={"path": f"{url}/", "remote": Remote(cache_gb=cache_gb)})
        assert digest_of(remote) == expected
    if scheme == "memory":
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_parts_of_a_mixture_and_lists_of_keys(dataset, serve, tmp_path):
    server, keys = serve(dataset), tmp_path / "keys.txt"
    write_keys(keys, [f"pictures/{i}.png" for i in range(3, 44, 2)])

    def mixture(place):
        parts = [
            {"name": "some", "source": "shards", "path": str(place), "keys": str(keys), "weight": 2},
            {"name": "all", "source": "shards", "path": str(place)},
        ]
        return Data(source="mixture", mixture=parts, resolution=16, global_batch=8, micro_batch=4, workers=2)

    assert digest_of(mixture(server.url)) == digest_of(mixture(dataset))
    assert fingerprint(open_source(mixture(server.url))) == fingerprint(open_source(mixture(dataset)))


def test_a_resumed_run_may_change_between_disk_and_bucket(dataset, serve):
    data, server = data_of(dataset), serve(dataset)
    remote = data.model_copy(update={"path": server.url})
    assert fingerprint(open_source(remote)) == fingerprint(open_source(data))
    assert digest_of(remote, 8, first_sample=24) == digest_of(data, 8, first_sample=24)


def test_what_the_cache_can_hold_is_asked_for_once_in_blocks(dataset, serve, tmp_path, eventually):
    tars = [path.stat().st_size for path in dataset.glob("*/*.tar")]
    server = serve(dataset, latency=0.02)

    def requests(work):
        before = server.counts["requests"]
        work()
        return server.counts["requests"] - before

    def read(cache_gb, folder):
        """For an epoch."""
        remote = Remote(cache_gb=cache_gb, cache_dir=str(folder))
        return requests(lambda: digest_of(data_of(server.url, workers=2, remote=remote)))

    ShardsSource(server.url)  # which keeps the indexes
    opening = requests(lambda: ShardsSource(server.url))
    large, small = tmp_path / "large", tmp_path / "small"
    assert read(1.0, large) - opening == len(tars)
    eventually(
        lambda: sum(path.stat().st_size for path in large.iterdir() if path.name != "used") == sum(tars)
    )
    assert read(1.0, large) == opening
    assert read(sum(tars) / 1e9, small) - opening > 3 * len(tars)  # neighbours share some


def test_samples_are_asked_for_together_and_ahead(dataset, serve, alone):
    server = serve(dataset, latency=0.1)
    data = data_of(server.url, workers=1).model_copy(update={"remote": Remote(requests=16)})
    source = open_source(data)
    before = server.counts["requests"]
    server.counts["busiest"] = 0
    start = time.perf_counter()
    stream = SampleStream(source, data, seed=3, patch=4, caption_drop=0.2, rank=0, world_size=1)
    for _ in islice(stream, 11):  # 44 samples, which one after another would take 4.4 s
        pass
    assert time.perf_counter() - start < 2.2
    assert 4 < server.counts["busiest"] <= 16
    assert server.counts["requests"] - before <= 45  # none twice: the cache has what comes again
    stream.close()
    assert source._store._wanted == {}


def test_references_of_an_evaluation_are_read_together(dataset, serve):
    def reference(path):
        config = parse_config({"data": data_of(path).model_dump(mode="json")}, "test")
        return Reference(config, 16)

    server, near = serve(dataset, latency=0.1), reference(dataset)
    far = reference(server.url)
    start = time.perf_counter()
    assert far.identity() == near.identity()
    assert all(map(torch.equal, far.views(range(45)), map(near.view, range(45))))
    assert time.perf_counter() - start < 4  # one after another 45 keys and 61 pictures take 10 s


def test_indexes_are_fetched_once_a_machine(dataset, serve, cache):
    server = serve(dataset)
    first = ShardsSource(server.url)
    assert len(list(cache.glob("*.index"))) == 1
    before = server.counts["bytes"]
    again = ShardsSource(server.url)
    assert server.counts["bytes"] - before == (dataset / "manifest.json").stat().st_size
    assert [again.key(i) for i in range(45)] == [first.key(i) for i in range(45)]


@pytest.mark.parametrize("held", [0.0, 1.0])
def test_bytes_that_stay_wrong_are_the_samples_fault(dataset, serve, held, monkeypatch):
    monkeypatch.setattr(remote_store, "HELD", held)
    offset = int(np.load(dataset / "16x64/00000.npy")["picture_offset"][2]) + 40
    server = serve(dataset, flips={("16x64/00000.tar", offset): 1000})
    source = ShardsSource(server.url)
    with pytest.raises(UnreadablePicture, match=rf"^{server.url}/16x64/00000\.tar#2: .*CRC-32"):
        source.image(2)
    assert source.key(2) == "16x64/00000.tar#2"
    if held == 0.0:
        assert server.counts["flipped"] == 4  # two reads, each of them twice
    assert source.key(1) == "pictures/1.png"


@pytest.mark.parametrize("held", [0.0, 1.0])
def test_bytes_that_the_disk_lost_are_fetched_again(dataset, serve, cache, eventually, held, monkeypatch):
    monkeypatch.setattr(remote_store, "HELD", held)
    server = serve(dataset)
    expected, sources = [ShardsSource(dataset).encoded(i) for i in range(45)], []

    def all_from_the_disk():
        source = ShardsSource(server.url)
        sources.append(source)
        before = server.counts["requests"]
        assert [source.encoded(i) for i in range(45)] == expected
        return server.counts["requests"] == before

    eventually(all_from_the_disk)
    for source in sources:  # whose last writes would mend the damage
        source._store._disk.shutdown()
    copies = [path for path in (cache / "samples").iterdir() if path.name != "used"]
    assert len(copies) == 6
    damaged = bytearray(copies[0].read_bytes())
    damaged[700:720] = bytes(20)
    copies[0].write_bytes(damaged)
    before = server.counts["requests"]
    again = ShardsSource(server.url)
    opening = server.counts["requests"] - before
    assert [again.encoded(i) for i in range(45)] == expected
    assert server.counts["requests"] - before - opening == 1


def test_a_server_that_is_gone_ends_the_stream_in_one_line(dataset, serve, hasty):
    server = serve(dataset)
    data = data_of(server.url, remote=Remote(requests=2, cache_gb=0))
    stream = SampleStream(open_source(data), data, seed=3, patch=4, caption_drop=0.2, rank=0, world_size=1)
    next(stream)
    server.down = True
    with pytest.raises(UserError) as caught:
        for _ in islice(stream, 50):
            pass
    message = str(caught.value)
    assert message.startswith(f"{server.url}/")
    assert "cannot be read: HTTP 503" in message
    assert f"({ATTEMPTS} attempts in " in message
    assert "\n" not in message


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there(dataset, serve, hasty):
    server = serve(dataset)
    assert "no manifest.json" in refusal(lambda: ShardsSource(f"{server.url}/16x64"))
    (dataset / "16x64/00002.tar").rename(dataset / "16x64/away")
    message = refusal(lambda: ShardsSource(server.url))
    assert "00002.tar: cannot be read: the store has no such file" in message
    (dataset / "16x64/00002.tar").write_bytes(b"x")
    assert "00002.tar: has 1 bytes, the manifest says" in refusal(lambda: ShardsSource(server.url))
    server.down = True
    assert "/manifest.json: cannot be read: HTTP 503" in refusal(lambda: ShardsSource(server.url))


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/set", "s3fs"), ("gs://bucket/set", "gcsfs"), ("nowhere://x/y", "")]
)
def test_schemes_that_nothing_installed_reads(url, package, monkeypatch):
    if package:
        monkeypatch.setitem(__import__("sys").modules, package, None)
    message = refusal(lambda: open_source(data_of(url)))
    assert message.startswith(f"{url}: ")
    assert not package or f"pip install fsspec {package} (the extra `remote` " in message


def test_settings_that_do_not_go_together(dataset):
    assert "verify" in refusal(lambda: ShardsSource(f"file://{dataset}", verify=True))
    for source in ("folder", "mds"):
        with pytest.raises(ValueError, match=rf"source {source} reads a folder on a disk, not s3://b/x"):
            Data(source=source, path="s3://b/x")
    with pytest.raises(ValueError, match=r"data\.cached is read from a disk, not from s3://b/x"):
        Data(source="shards", path="s3://b/x", cached=("text",))


def test_a_cache_folder_that_cannot_be_written(dataset, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    url, remote = f"file://{dataset}", Remote(cache_dir=str(tmp_path / "file/x"))
    assert "data.remote.cache_dir" in refusal(lambda: ShardsSource(url, remote=remote))


def test_one_line_says_how_it_is_read(dataset, cache, caplog):
    with caplog.at_level(logging.INFO, "millrace"):
        ShardsSource(f"file://{dataset}", remote=Remote(requests=7, cache_gb=2.5))
        ShardsSource(f"file://{dataset}", remote=Remote(cache_gb=0))
    first, second = [record.getMessage() for record in caplog.records]
    kept = f"samples are kept in {cache}/samples, which holds 0.0 of 2.5 GB"
    assert first == f"file://{dataset}: 7 requests in flight; {kept}"
    assert second.endswith("64 requests in flight; nothing is kept on disk")


def span(file, offset, size):
    return Span(file, offset, size, "", 0, bool), remote_store._Wanted()


def test_neighbours_share_a_request(monkeypatch):
    monkeypatch.setattr(remote_store, "GAP", 100)
    monkeypatch.setattr(remote_store, "LONGEST", 1000)
    spans = [span("b", 0, 10), span("a", 500, 50), span("a", 0, 50), span("a", 120, 50), span("a", 560, 600)]
    groups = [[(item.file, item.offset) for item, _ in group] for group in merged(spans)]
    assert groups == [[("a", 0), ("a", 120)], [("a", 500), ("a", 560)], [("b", 0)]]


def test_a_server_without_ranges_is_told_apart(dataset, monkeypatch):
    files = RemoteFiles(f"file://{dataset}", 2)
    monkeypatch.setattr(files._files, "cat_file", lambda *_, **__: bytes(100))
    assert "the server does not know ranges" in refusal(lambda: files.read("manifest.json", 0, 10))


def test_errors_that_pass_and_errors_that_do_not(dataset, monkeypatch, hasty):
    files, asked = RemoteFiles(f"file://{dataset}", 2), []

    class Refused(Exception):
        status = 403

    def fail(error):
        asked.clear()

        def read(*_, **__):
            asked.append(1)
            raise error

        monkeypatch.setattr(files._files, "cat_file", read)
        with pytest.raises((OSError, UserError)) as caught:
            files.read("x", 0, 10)
        return caught.value, len(asked)

    error, times = fail(Refused("no"))
    assert isinstance(error, PermissionError)
    assert times == 1
    error, times = fail(type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"))
    assert error.strerror == "Unable to locate credentials"
    assert times == 1
    throttled = type("Throttled", (Exception,), {"code": 429})
    for passing in (TimeoutError(), ConnectionResetError("reset"), throttled("slow")):
        error, times = fail(passing)
        assert isinstance(error, UserError)
        assert times == ATTEMPTS
