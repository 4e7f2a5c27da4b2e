import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from millrace.engine.data import latent_cache as module
from millrace.engine.data.formats import byte_store
from millrace.engine.data.formats.byte_store import OpenFiles
from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.formats.shard_writer import write_manifest
from millrace.engine.data.latent_cache import (
    CacheFile,
    CacheRecord,
    LatentCache,
    TextCache,
    cache_path,
    cache_problems,
    common_path,
)
from millrace.engine.distributed import process_group
from millrace.engine.encoders.latent_cache_writer import quantise
from millrace.engine.util import node_cache
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_file
from millrace.engine.util.safetensors_file import GrowingTensorFile

COUNTS = {(16, 32): 6, (32, 16): 3}
DIM = 6


def rows_of(sample, which, dtype=torch.bfloat16):
    length = (sample % 3) + (2 if which == "long" else 0)
    generator = torch.Generator().manual_seed(2 * sample + (which == "long"))
    return torch.randn(length, DIM, generator=generator).to(dtype)


def moments_of(sample, bucket):
    generator = torch.Generator().manual_seed(sample)
    return torch.randn(2, 4, bucket[0] // 8, bucket[1] // 8, generator=generator).bfloat16()


def file_of(root, path, of=""):
    return CacheFile(file=path, bytes=(root / path).stat().st_size, sha256=sha256_file(root / path), of=of)


def publish(root, kind, files, dtype):
    manifest = read_manifest(root)
    record = CacheRecord(
        network={"kind": "test"}, dtype=dtype, common=file_of(root, common_path(kind)), files=tuple(files)
    )
    values = record.model_dump(mode="json")
    write_manifest(root, manifest.model_copy(update={"caches": manifest.caches | {kind: values}}))


def write_text(root, dtype="bfloat16"):
    manifest, first, files = read_manifest(root), 0, []
    save_file(
        {"rows": torch.ones(1, DIM), "cut": torch.zeros(1, dtype=torch.uint8)}, root / "text.safetensors"
    )
    for shard in manifest.shards:
        path = root / cache_path(shard, "text")
        with path.open("wb") as file:
            out, lengths, scales = GrowingTensorFile(file, "rows", {"made": "by a test"}), [0], []
            for i in range(first, first + shard.samples):
                for which in ("long", "short"):
                    rows = rows_of(i, which)
                    lengths.append(len(rows))
                    if dtype == "int8":
                        rows, scale = quantise(rows)
                        scales.append(scale)
                    out.append(rows)
            captions = torch.arange(2 * shard.samples)
            out.finish(
                {
                    "offsets": torch.tensor(lengths).cumsum(0),
                    "cut": (captions % 5 == 0).to(torch.uint8),
                    "long": captions[::2].contiguous(),
                    "short": captions[1::2].contiguous(),
                    **({"scale": torch.cat(scales)} if scales else {}),
                }
            )
        files.append(file_of(root, cache_path(shard, "text"), shard.sha256))
        first += shard.samples
    publish(root, "text", files, dtype)


def write_latents(root, unreadable=()):
    manifest, first, files = read_manifest(root), 0, []
    save_file({}, root / "latents.safetensors", {"scale": "0.5"})
    for shard in manifest.shards:
        with (root / cache_path(shard, "latents")).open("wb") as file:
            out = GrowingTensorFile(file, "moments", {})
            samples = range(first, first + shard.samples)
            for i in samples:
                out.append(moments_of(i, shard.bucket)[None])
            out.finish({"present": torch.tensor([i not in unreadable for i in samples], dtype=torch.uint8)})
        files.append(file_of(root, cache_path(shard, "latents"), shard.sha256))
        first += shard.samples
    publish(root, "latents", files, "bfloat16")


@pytest.fixture
def dataset(tmp_path, write_shards):
    write_shards(tmp_path / "set", COUNTS)
    return tmp_path / "set"


def places(root):
    return [(number, row) for number, s in enumerate(read_manifest(root).shards) for row in range(s.samples)]


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e4])
def test_int8_is_within_absmax_over_254(spread):
    rows = torch.randn(200, 64) * spread
    rows[0], rows[1, 1:] = 0.0, 0.0
    steps, scale = quantise(rows)
    assert (steps.dtype, scale.dtype) == (torch.int8, torch.float32)
    bound = rows.double().abs().amax(1, keepdim=True) / 254
    error = (steps.double() * scale.double()[:, None] - rows.double()).abs()
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert float((error / bound.clamp_min(1e-300)).max()) > 0.9
    assert bool((steps.int().abs().amax(1)[1:] == 127).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_caption_comes_back(dataset, dtype):
    write_text(dataset, dtype)
    cache = TextCache(dataset, read_manifest(dataset))
    assert (cache.dim, cache.record.dtype) == (DIM, dtype)
    assert torch.equal(cache.empty.rows, torch.ones(1, DIM))
    lengths = set()
    for i, place in enumerate(places(dataset)):
        for offset, which in enumerate(("long", "short")):
            found, wanted = cache.rows(place, which), rows_of(i, which)
            assert found.cut == ((2 * place[1] + offset) % 5 == 0)
            lengths.add(len(found.rows))
            if dtype == "int8":
                for mine, theirs in zip((found.rows, found.scale), quantise(wanted), strict=True):
                    assert torch.equal(mine, theirs)
            else:
                assert found.scale is None
                assert torch.equal(found.rows, wanted)
    assert lengths == {0, 1, 2, 3, 4}


def test_moments_come_back_and_what_was_unreadable_has_none(dataset):
    write_latents(dataset, unreadable=(4,))
    cache = LatentCache(dataset, read_manifest(dataset))
    assert cache.metadata == {"scale": "0.5"}
    for i, place in enumerate(places(dataset)):
        bucket = read_manifest(dataset).shards[place[0]].bucket
        found = cache.moments(place)
        assert found is None if i == 4 else torch.equal(found, moments_of(i, bucket))


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Small sets are mapped too; the folder of the node cache."""
    monkeypatch.setattr(module, "MAPPED_ROWS", 1)
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["text", "latents"])
def test_a_sample_is_one_read_and_opens_no_file(dataset, mapped, kind, monkeypatch):
    """Of a set that was opened on this machine before."""
    write = write_text if kind == "text" else write_latents
    made = TextCache if kind == "text" else LatentCache
    write(dataset)
    manifest = read_manifest(dataset)
    wanted = everything(made(dataset, manifest), dataset)
    assert [path.suffix for path in mapped.iterdir()] == [f".{kind}"]
    monkeypatch.setattr(made, "_index", pytest.fail)
    cache = made(dataset, manifest)
    opened, reads = [], []
    real, inner = os.open, OpenFiles.read_into
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest))
    monkeypatch.setattr(OpenFiles, "read_into", lambda *words: reads.append(words) or inner(*words))
    for _ in range(3):
        found = everything(cache, dataset)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    assert sorted(opened) == sorted(str(dataset / file.file) for file in cache.record.files)
    assert len(reads) == 3 * len(wanted)


def everything(cache, dataset):
    if isinstance(cache, LatentCache):
        return [cache.moments(place) for place in places(dataset)]
    return [cache.rows(place, which).rows for place in places(dataset) for which in ("long", "short")]


def test_caches_that_differ_have_indexes_of_their_own(dataset, mapped):
    for dtype in ("bfloat16", "int8", "bfloat16"):
        write_text(dataset, dtype)
        found = everything(TextCache(dataset, read_manifest(dataset)), dataset)
        assert found[1].dtype == getattr(torch, dtype)
    assert len(list(mapped.iterdir())) == 2


def test_any_thread_may_read_with_few_files_open(dataset, monkeypatch):
    monkeypatch.setattr(byte_store, "OPEN_SHARE", 0)
    write_text(dataset)
    cache, all_places = TextCache(dataset, read_manifest(dataset)), places(dataset)
    order = np.random.default_rng(0).integers(0, len(all_places), 400).tolist()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: cache.rows(all_places[i], "long"), order))
    for i, one in zip(order, found, strict=True):
        assert torch.equal(one.rows, rows_of(i, "long"))
    assert len(cache._store.files) == 1


def damage(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_damaged_files_are_named(dataset):
    write_text(dataset)
    manifest = read_manifest(dataset)
    path = dataset / cache_path(manifest.shards[1], "text")
    whole = path.read_bytes()

    def open_it(verify=False):
        return TextCache(dataset, manifest, verify)

    def read(cache):
        assert cache.rows((0, 0), "long") is not None
        return cache.rows((1, 0), "long")

    path.write_bytes(whole[:-1])
    sizes = f"has {len(whole) - 1} bytes, the manifest says {len(whole)}"
    refused(open_it, path, sizes, "millrace cache text")
    path.write_bytes(b"\xff" * 8 + whole[8:])
    refused(open_it, path, "damaged")
    path.write_bytes(whole)
    damage(path, -1)
    refused(lambda: read(open_it(verify=True)), path, "SHA-256")
    path.unlink()
    refused(open_it, path, "cannot be read", "millrace cache text --replace")
    path.write_bytes(whole)
    cache = open_it()
    os.truncate(path, 4096)
    refused(lambda: read(cache), path, "damaged: it ends before", "millrace cache text")
    path.unlink()
    cache._store.files.close(str(path))
    refused(lambda: read(cache), path, "cannot be read", "millrace cache text --replace")


def test_sizes_are_compared_once_a_machine(dataset, mapped, monkeypatch):
    write_text(dataset)
    manifest = read_manifest(dataset)
    TextCache(dataset, manifest)
    path = dataset / cache_path(manifest.shards[1], "text")
    os.truncate(path, 100)
    refused(lambda: TextCache(dataset, manifest), path, "has 100 bytes")
    monkeypatch.setattr(process_group, "local_rank", lambda: 1)
    assert TextCache(dataset, manifest).rows((0, 0), "long") is not None


@pytest.mark.parametrize("name", ["offsets", "long", "cut"])
def test_captions_that_do_not_fit_their_rows_are_named(dataset, name):
    write_text(dataset)
    manifest = read_manifest(dataset)
    path = dataset / cache_path(manifest.shards[0], "text")
    tensors = load_file(path)
    tensors[name] = tensors[name][:-1] if name == "cut" else tensors[name] + 100
    save_file(tensors, path)
    record = CacheRecord.model_validate(manifest.caches["text"])
    files = (file_of(dataset, record.files[0].file, manifest.shards[0].sha256), *record.files[1:])
    publish(dataset, "text", files, "bfloat16")
    refused(lambda: TextCache(dataset, read_manifest(dataset)), path, "do not fit")


def test_all_damaged_files_are_found(dataset):
    assert cache_problems(dataset) == []
    write_text(dataset)
    write_latents(dataset)
    assert cache_problems(dataset) == []
    shards = read_manifest(dataset).shards
    paths = [dataset / cache_path(shards[2], "text"), dataset / cache_path(shards[0], "latents")]
    for path in paths:
        damage(path, -20)
    found = cache_problems(dataset)
    assert len(found) == 2
    for path, line in zip(paths, found, strict=True):
        assert line.startswith(f"{path}: damaged: its SHA-256")


def test_a_data_set_without_the_cache_says_how_to_make_it(dataset):
    refused(
        lambda: TextCache(dataset, read_manifest(dataset)), dataset, "no text cache", "millrace cache text"
    )


def edited(dataset, change):
    values = json.loads((dataset / "manifest.json").read_text())
    change(values["caches"]["text"], values)
    (dataset / "manifest.json").write_text(json.dumps(values))
    return lambda: TextCache(dataset, read_manifest(dataset))


def test_records_that_do_not_fit_are_named(dataset):
    write_text(dataset)
    kept = (dataset / "manifest.json").read_text()
    cases = [
        (lambda text, _: text.update(version=2), "version 2"),
        (lambda text, _: text["files"].pop(), "other shards"),
        (lambda text, _: text["files"][0].update(of="0" * 64), "other shards"),
        (lambda text, _: text["common"].update(bytes=-1), "common.bytes"),
    ]
    for change, words in cases:
        refused(edited(dataset, change), dataset, "text cache", words)
        (dataset / "manifest.json").write_text(kept)
