import json

import numpy as np
import pytest

from millrace.engine.config import Data
from millrace.engine.data import fingerprint, open_source
from millrace.engine.data.formats import byte_store, shard_index
from millrace.engine.data.formats.shard_index import key_digest
from millrace.engine.data.sources import key_subset, pictures
from millrace.engine.data.sources import open_source as open_source_module
from millrace.engine.data.sources.digits import DigitsSource, most_typical
from millrace.engine.data.sources.key_subset import KeptSource, keep_listed, write_keys
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util import node_cache
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256


def keys_of(source):
    return [source.key(i) for i in range(len(source))]


def test_listed_pictures_are_kept_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("\n digits/0010 \n\ndigits/0003\r\ndigits/1795")
    whole, kept = DigitsSource(), keep_listed(DigitsSource(), path)
    assert keys_of(kept) == ["digits/0003", "digits/0010", "digits/1795"]
    place = keys_of(whole).index("digits/0010")
    assert kept.captions(1) == whole.captions(place)
    assert kept.image(1).tobytes() == whole.image(place).tobytes()


def test_a_curated_set_goes_through_a_file(tmp_path):
    path = tmp_path / "typical.txt"
    chosen = most_typical(DigitsSource(), 0.05)
    write_keys(path, chosen)
    source = open_source(Data(source="digits", keys=str(path)))
    assert keys_of(source) == chosen
    assert fingerprint(source) != fingerprint(DigitsSource())


def test_keys_of_a_folder_are_relative_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        DigitsSource().image(0).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    (tmp_path / "keep.list").write_text("sub/b.png\n")
    source = open_source(Data(source="folder", path=str(tmp_path), keys=str(tmp_path / "keep.list")))
    assert keys_of(source) == ["sub/b.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "digits/0000\ndigits/0004\n",
            "line 2: no picture has the key 'digits/0004' (the first of 1438 is 'digits/0000'); correct or "
            "remove the line",
        ),
        ("digits/0000\n\ndigits/0000", "line 3: 'digits/0000' is in line 1 already; remove one"),
        (" \n\n", "lists no keys; write one key a line, or set data.keys to null"),
    ],
)
def test_refusals_name_the_line(tmp_path, text, message):
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        open_source(Data(source="digits", keys=str(path)))
    assert str(caught.value) == f"{path}: {message}"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file .*; correct data\.keys$"):
        keep_listed(DigitsSource(), tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 at byte 2; save the list"):
        keep_listed(DigitsSource(), tmp_path / "latin.txt")


def without_keys(root):
    """Make a data set one that was prepared before shards had an index of keys."""
    path = root / "manifest.json"
    values = json.loads(path.read_text())
    for shard in values["shards"]:
        (root / shard["file"]).with_suffix(".keys").unlink()
        del shard["keys_sha256"]
    path.write_text(json.dumps(values))


@pytest.fixture
def no_reads(monkeypatch):
    """Collects how many bytes are read of tars."""
    read, sizes = byte_store.OpenFiles.read, []

    def counting(self, path, offset, size):
        sizes.append(size)
        return read(self, path, offset, size)

    monkeypatch.setattr(byte_store.OpenFiles, "read", counting)
    return sizes


@pytest.mark.parametrize("older", [False, True])
def test_keys_of_shards_are_found_without_their_pictures(tmp_path, write_shards, no_reads, older, caplog):
    root, listed = tmp_path / "shards", tmp_path / "keys.txt"
    write_shards(root, {(64, 64): 9, (64, 96): 3})
    if older:
        without_keys(root)
    source = ShardsSource(root)
    keys = keys_of(source)
    write_keys(listed, [keys[7], keys[11], keys[2]])
    no_reads.clear()
    with caplog.at_level("INFO", "millrace"):
        kept = keep_listed(source, listed)
    assert kept.kept.tolist() == [2, 7, 11]
    if older:
        assert 0 < sum(no_reads) < 12 * 120  # a record; a picture has more than 3,000
        assert "keys of 12 samples are read from its tars" in caplog.text
    else:
        assert no_reads == []
        assert caplog.text == ""
    assert keys_of(kept) == [keys[2], keys[7], keys[11]]
    assert [kept.key_alone(i) for i in range(3)] == keys_of(kept)
    assert kept.bucket_of.tolist() == [0, 0, 1]


def test_a_shard_whose_keys_are_not_the_manifests_is_refused(tmp_path, write_shards):
    manifest = write_shards(tmp_path / "shards", {(16, 16): 3})
    path = (tmp_path / "shards" / manifest.shards[0].file).with_suffix(".keys")
    (tmp_path / "keys.txt").write_text("pictures/1.png\n")
    source = ShardsSource(tmp_path / "shards")
    path.write_bytes(bytes(48))
    with pytest.raises(UserError, match=r"00000\.keys: its SHA-256"):
        keep_listed(source, tmp_path / "keys.txt")
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.keys: cannot be read"):
        keep_listed(source, tmp_path / "keys.txt")


def test_of_a_large_set_the_places_are_found_once(tmp_path, write_shards, monkeypatch):
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(key_subset, "MAPPED_ROWS", 1)
    write_shards(tmp_path / "shards", {(16, 16): 9})
    source, listed = ShardsSource(tmp_path / "shards"), tmp_path / "keys.txt"
    listed.write_text("pictures/4.png\npictures/1.png\n")
    first = keep_listed(source, listed)
    assert first.kept.tolist() == [1, 4]
    with monkeypatch.context() as patch:
        patch.setattr(key_subset, "_places", pytest.fail)
        again = keep_listed(source, listed)
    assert again.kept.tolist() == [1, 4]
    assert fingerprint(again) == fingerprint(first) == fingerprint(KeptSource(source, np.array([1, 4])))
    listed.write_text("pictures/4.png\npictures/2.png\n")
    assert keep_listed(source, listed).kept.tolist() == [2, 4]
    listed.write_text("pictures/none.png\n")
    with pytest.raises(UserError, match="line 1: no picture has the key"):
        keep_listed(source, listed)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_fingerprint_is_that_of_the_list_of_places(tmp_path, write_shards, monkeypatch):
    monkeypatch.setattr(open_source_module, "_PLACES_AT_A_TIME", 2)
    write_shards(tmp_path, {(16, 16): 9})
    source = ShardsSource(tmp_path)
    for places in ([4], [0, 3], [1, 4, 5, 7, 8]):
        wanted = sha256(json.dumps(["", source.digest, *places]).encode())
        assert fingerprint(KeptSource(source, np.array(places))) == wanted


class Named:
    """A source of keys alone."""

    def __init__(self, keys):
        self._keys = keys

    def __len__(self):
        return len(self._keys)

    def key(self, index):
        return self._keys[index]


def test_many_keys_against_a_dictionary(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_KEYS_AT_A_TIME", 100)
    random = np.random.default_rng(0)
    keys = [f"{number:x}/é{number}" for number in random.permutation(3000).tolist()]
    for count in (1, 7, 2999, 3000):
        chosen = random.permutation(3000)[:count].tolist()
        write_keys(tmp_path / "keys", [keys[place] for place in chosen])
        assert keep_listed(Named(keys), tmp_path / "keys").kept.tolist() == sorted(chosen)


def test_digests_of_which_half_is_equal_are_told_apart(monkeypatch, tmp_path):
    def half(key):
        return b"12345678" + key_digest(key)[8:]

    monkeypatch.setattr(key_subset, "key_digest", half)
    monkeypatch.setattr(shard_index, "key_digest", half)
    keys = [str(number) for number in range(50)]
    write_keys(tmp_path / "keys", ["3", "49", "0", "17"])
    assert keep_listed(Named(keys), tmp_path / "keys").kept.tolist() == [0, 3, 17, 49]
    write_keys(tmp_path / "keys", ["3", "50", "0"])
    with pytest.raises(UserError, match="line 2: no picture has the key '50'"):
        keep_listed(Named(keys), tmp_path / "keys")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "x", "a"], "line 2: no picture has the key 'x'"),
        (["a", "a", "x"], "line 2: 'a' is in line 1 already"),
        (["b", "a", "", "a", "a"], "line 4: 'a' is in line 2 already"),
        (["c", "b", "a", "c", "b"], "line 4: 'c' is in line 1 already"),
        (["x", "x"], "line 1: no picture has the key 'x'"),
    ],
)
def test_the_first_wrong_line_is_named(tmp_path, lines, message):
    (tmp_path / "keys").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        keep_listed(Named(["a", "b", "c"]), tmp_path / "keys")


def test_a_record_that_cannot_be_read_has_its_place_as_its_key(tmp_path, write_shards):
    manifest = write_shards(tmp_path / "shards", {(16, 16): 3}, per_shard=3)
    tar = tmp_path / "shards" / manifest.shards[0].file
    source = ShardsSource(tmp_path / "shards")
    row = source._rows[1]
    data = bytearray(tar.read_bytes())
    data[int(row["json_offset"])] ^= 0xFF
    tar.write_bytes(data)
    assert [source.key_alone(i) for i in range(3)] == keys_of(source)
    assert source.key_alone(1).endswith("00000.tar#1")
