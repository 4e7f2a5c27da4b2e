"""Held-out pictures: chosen by key alone, and trained on in no source, order or epoch."""

import itertools
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from millrace.engine import prepare
from millrace.engine.config import Data, Validation
from millrace.engine.config.data import Part
from millrace.engine.data import Captions, SampleStream, fingerprint, open_source
from millrace.engine.data.order import members_of
from millrace.engine.data.sources import held_out_split
from millrace.engine.data.sources.held_out_split import split
from millrace.engine.data.sources.key_subset import KeptSource, Rest, keep_listed
from millrace.engine.data.sources.mixture import MixtureSource, order_of
from millrace.engine.util import node_cache
from millrace.engine.util.errors import UserError

COUNT = 40
SHARE = 0.3


class Named:
    """Pictures that have keys and captions alone."""

    def __init__(self, keys):
        self.keys = list(keys)

    def __len__(self):
        return len(self.keys)

    def key(self, index):
        return self.keys[index]

    def captions(self, index):
        return Captions("long", "short")


def keys_of(source):
    return [source.key(i) for i in range(len(source))]


def held_keys(source, **changes):
    config = Validation(**{"share": SHARE, **changes})
    return set(keys_of(split(source, config, Data()).held_out.source))


def test_the_rest_is_all_but_what_is_left_out():
    rng = np.random.default_rng(1)
    for count, out in ((7, 0), (7, 3), (50, 20), (50, 50), (1, 1)):
        left_out = np.sort(rng.choice(count, out, replace=False))
        wanted, rest = np.delete(np.arange(count), left_out), Rest(count, left_out)
        assert len(rest) == len(wanted)
        assert [int(rest[i]) for i in range(len(rest))] == wanted.tolist()
        assert rest[:].tolist() == wanted.tolist()
        assert rest[2:9].tolist() == wanted[2:9].tolist()
        places = rng.integers(0, max(len(rest), 1), 30 if len(rest) else 0)
        assert rest[places].tolist() == wanted[places].tolist()


def test_it_depends_on_the_key_alone():
    keys = [f"pictures/{i}.png" for i in range(1000)]
    held = held_keys(Named(keys))
    assert 250 < len(held) < 350
    assert held_keys(Named(reversed(keys))) == held
    assert held_keys(Named(keys[:500])) == held & set(keys[:500])
    parts = tuple(Part(name=name, path="x") for name in "ab")
    mixed = held_keys(MixtureSource(parts, [Named(keys[500:]), Named(keys[:500])]))
    assert {key.partition("/")[2] for key in mixed} == held
    assert held_keys(Named(keys), share=0.1) < held < held_keys(Named(keys), share=0.5)
    assert held_keys(Named(keys), seed=1) != held


def test_hashes_are_those_of_the_held_out_pictures():
    keys = [f"{i}" for i in range(300)]
    whole = split(Named(keys), Validation(share=SHARE), Data()).held_out
    of = dict(zip(keys_of(whole.source), whole.hashes.tolist(), strict=True))
    part = split(Named(keys[::-3]), Validation(share=SHARE), Data()).held_out
    for key, value in zip(keys_of(part.source), part.hashes.tolist(), strict=True):
        assert of[key] == value < SHARE * 2**64


def test_off_it_is_the_source_itself():
    source = Named("abc")
    assert split(source, Validation(), Data()) == (source, source, None)


def write_photos(folder):
    folder.mkdir(parents=True)
    for i in range(COUNT):
        size = (20, 20) if i % 2 else (32, 16)
        pixels = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"caption {i}")


def prepared(entry, output, *more):
    words = ["--input", str(entry), "--output", str(output), "--resolution", "16", "--patch", "4"]
    assert prepare.main([*words, "--workers", "0", "--upscale", *more]) == 0
    return {"source": "shards", "path": str(output)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "set"
    write_photos(folder)
    return folder


@pytest.fixture
def settings_of(photos, tmp_path, request):
    """`settings_of(kind)` -> the data section of a set of every kind that can be trained on."""

    def tars():
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for path in sorted(photos.iterdir()):
                tar.add(path, path.name)
        return prepared(tmp_path / "a.tar", tmp_path / "out")

    def table():
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pictures = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.glob("*.png"))]
        rows = {"image": pictures, "text": [f"caption {i}" for i in range(COUNT)]}
        parquet.write_table(arrow.table(rows), tmp_path / "a.parquet")
        return prepared(tmp_path / "a.parquet", tmp_path / "out")

    def mds():
        folder = request.getfixturevalue("write_pictures")(tmp_path / "mds", [(20, 20)] * COUNT)
        return {"source": "mds", "path": str(folder)}

    def folder():
        return {"source": "folder", "path": str(photos)}

    def listed():
        (tmp_path / "keys").write_text("".join(f"{i:03}.png\n" for i in range(0, COUNT, 2)))
        return {**prepared(photos, tmp_path / "out"), "keys": str(tmp_path / "keys")}

    def mixture():
        parts = [{"name": "a", **folder()}, {"name": "b", "source": "builtin", "weight": 2.0}]
        return {"source": "mixture", "mixture": parts}

    kinds = {
        "builtin": lambda: {"source": "builtin"},
        "digits": lambda: {"source": "digits"},
        "folder": folder,
        "shards": lambda: prepared(photos, tmp_path / "out"),
        "buckets": lambda: {**prepared(photos, tmp_path / "out"), "aspect": "bucket", "bucket_run": 4},
        "listed": listed,
        "tars": tars,
        "parquet": table,
        "mds": mds,
        "mixture": mixture,
    }
    return lambda kind: kinds[kind]()


KINDS = ["builtin", "digits", "folder", "shards", "buckets", "listed", "tars", "parquet", "mds", "mixture"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_source_gives_a_held_out_picture(kind, settings_of):
    data = Data(
        **{"resolution": 16, "upscale": True, "workers": 0, "global_batch": 8, "micro_batch": 4}
        | settings_of(kind)
    )
    found = split(open_source(data), Validation(share=SHARE), data)
    held, trained, whole = (
        set(keys_of(source)) for source in (found.held_out.source, found.train, found.whole)
    )
    assert held
    assert not held & trained
    assert held | trained == whole
    options = {"seed": 1, "patch": 4, "caption_drop": 0.0, "world_size": 1, "rank": 0}
    if kind == "digits":  # decoding them all would add nothing
        order = order_of(found.train, data, 1, 0)
        given = [found.train.key(order.picture(place)[0]) for place in range(2 * len(found.train))]
    else:
        stream = SampleStream(found.train, data, **options)
        batches = itertools.islice(stream, 3 * len(whole) // data.micro_batch)
        given = [key for batch in batches for key in batch.keys]
        stream.close()
    assert not held & set(given)
    if kind != "mixture":  # whose parts have epochs of their own
        assert set(given) == trained


def test_buckets_are_visited_without_them(write_shards, tmp_path):
    """Each picture of an epoch once, at the size that it has in the whole set."""
    write_shards(tmp_path, {(16, 24): 40, (24, 16): 24, (20, 20): 36}, patch=4)
    data = Data(source="shards", path=str(tmp_path), aspect="bucket", bucket_run=1, micro_batch=1)
    found = split(open_source(data), Validation(share=SHARE), data)
    order, whole = order_of(found.train, data, 5, 0), found.whole
    sizes = {whole.key(i): whole.buckets[whole.bucket_of[i]] for i in range(len(whole))}
    seen = []
    for place in range(len(found.train)):
        picture, pool = order.picture(place)
        seen.append(found.train.key(picture))
        assert sizes[seen[-1]] == pool.size
    assert sorted(seen) == sorted(set(sizes) - set(keys_of(found.held_out.source)))


def test_an_unreadable_picture_is_not_replaced_by_a_held_out_one(photos, tmp_path):
    (tmp_path / "set").mkdir()
    for path in photos.iterdir():
        (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
    options = {"resolution": 16, "upscale": True, "workers": 0, "global_batch": 4, "micro_batch": 4}
    data = Data(source="folder", path=str(tmp_path / "set"), max_bad_share=0.9, **options)
    found = split(open_source(data), Validation(share=SHARE), data)
    held = set(keys_of(found.held_out.source))
    for key in keys_of(found.train)[::2]:
        (tmp_path / "set" / key).write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken" * 9)
    stream = SampleStream(found.train, data, seed=1, patch=4, caption_drop=0.0, world_size=1, rank=0)
    given = {key for batch in itertools.islice(stream, 12) for key in batch.keys}
    assert len(stream.bad) > 5
    assert not given & held


def test_of_a_large_set_they_are_found_once(tmp_path, write_shards, monkeypatch):
    write_shards(tmp_path / "set", {(16, 16): 60})
    data = Data(source="shards", path=str(tmp_path / "set"))
    config, source = Validation(share=SHARE), open_source(data)
    wanted = split(source, config, data)
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(held_out_split, "MAPPED_ROWS", 1)
    first = split(source, config, data)
    monkeypatch.setattr(held_out_split, "_look", pytest.fail)
    again = split(source, config, data)
    for found in (first, again):
        assert found.held_out.source.kept.tolist() == wanted.held_out.source.kept.tolist()
        assert found.held_out.hashes.tolist() == wanted.held_out.hashes.tolist()
        assert fingerprint(found.train) == fingerprint(wanted.train) != fingerprint(source)


def test_memory_holds_the_held_out_pictures_alone():
    """Of ten million pictures, whose places would take 80 MB."""
    count = 10_000_000

    class Large(Named):
        def __init__(self):
            self.bucket_of = np.broadcast_to(np.int32(0), count)
            self.buckets = ((16, 16),)

        def __len__(self):
            return count

        def key_digests(self):
            for first in range(0, count, 1 << 16):
                numbers = np.arange(first, min(first + (1 << 16), count), dtype=np.uint64)
                yield np.stack([numbers, numbers], 1)

    data = Data(source="shards", path="x", aspect="bucket", bucket_run=64, micro_batch=32, resolution=16)
    tracemalloc.start()
    found = split(Large(), Validation(share=1e-3), data)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    (members,) = members_of(found.train.bucket_of, 1, 0)  # which looks at a million at a time
    assert tracemalloc.get_traced_memory()[1] < 48e6
    held = found.held_out.source.kept
    assert len(members) == len(found.train) == count - len(held)
    tracemalloc.stop()
    assert 9000 < len(held) < 11000


def test_digests_of_a_subset_are_those_of_its_keys(write_shards, tmp_path):
    write_shards(tmp_path / "set", {(16, 16): 30}, per_shard=7)
    (tmp_path / "keys").write_text("".join(f"pictures/{i}.png\n" for i in (3, 9, 10, 28)))
    whole = open_source(Data(source="shards", path=str(tmp_path / "set")))
    for kept in (keep_listed(whole, tmp_path / "keys"), KeptSource(whole, Rest(30, np.array([0, 7, 29])))):
        found = np.concatenate(list(kept.key_digests()))
        wanted = np.concatenate(list(whole.key_digests()))[kept.kept[:]]
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("keys", "share", "message"),
    [
        ("abcd", 1e-6, "validation.share 1e-06 holds out none of 4 pictures"),
        ("a", 0.999999, "leaves nothing to train on of the data"),
    ],
)
def test_refusals(keys, share, message):
    with pytest.raises(UserError, match=message) as caught:
        split(Named(keys), Validation(share=share), Data())
    assert "\n" not in str(caught.value)


def test_a_part_of_a_mixture_must_have_something_left():
    parts = tuple(Part(name=name, path="x") for name in ("large", "small"))
    held = sorted(held_keys(Named(map(str, range(100)))))
    source = MixtureSource(parts, [Named(map(str, range(100))), Named(held[:1])])
    with pytest.raises(UserError, match="leaves nothing to train on of part 'small' \\(1 pictures\\)"):
        split(source, Validation(share=SHARE), Data())


def test_a_data_set_of_its_own_takes_nothing_away(photos):
    source = Named("abc")
    found = split(source, Validation(path=str(photos)), Data())
    assert found.train is source
    assert keys_of(found.held_out.source) == [f"{i:03}.png" for i in range(COUNT)]
    assert len(set(found.held_out.hashes.tolist())) == COUNT
    with pytest.raises(UserError, match="no such folder"):
        split(source, Validation(path="/nowhere"), Data())
