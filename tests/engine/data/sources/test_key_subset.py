import pytest

from millrace.engine.config import Data
from millrace.engine.data import fingerprint, open_source
from millrace.engine.data.sources.digits import DigitsSource, most_typical
from millrace.engine.data.sources.key_subset import keep_listed, write_keys
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError


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


def test_keys_of_shards_are_read_without_their_pictures(tmp_path, write_shards, monkeypatch):
    write_shards(tmp_path / "shards", {(64, 64): 9})
    source = ShardsSource(tmp_path / "shards")
    keys, read, bytes_read = source.keys(), source._files.read, []

    def counting(path, offset, size):
        bytes_read.append(size)
        return read(path, offset, size)

    monkeypatch.setattr(source._files, "read", counting)
    listed = tmp_path / "keys.txt"
    write_keys(listed, [keys[7], keys[2]])
    kept = keep_listed(source, listed)
    assert sum(bytes_read) < 9 * 120  # a record; a picture has more than 3,000
    assert [kept.key(i) for i in range(2)] == [source.key(2), source.key(7)] == [keys[2], keys[7]]


def test_a_record_that_cannot_be_read_has_its_place_as_its_key(tmp_path, write_shards):
    manifest = write_shards(tmp_path / "shards", {(16, 16): 3}, per_shard=3)
    tar = tmp_path / "shards" / manifest.shards[0].file
    source = ShardsSource(tmp_path / "shards")
    row = source._rows[1]
    data = bytearray(tar.read_bytes())
    data[int(row["json_offset"])] ^= 0xFF
    tar.write_bytes(data)
    assert source.keys() == [source.key(i) for i in range(3)]
    assert source.keys()[1].endswith("00000.tar#1")
