import json
import sys

import pytest

from millrace.engine.config.data import Columns
from millrace.engine.data.formats.mds_shards import load_library
from millrace.engine.data.sources.mds import MdsSource
from millrace.engine.util.errors import UserError

COLUMNS = {"image": "bytes", "caption": "str", "width": "int"}


def samples(n=3):
    return [{"image": b"not a picture", "caption": f"caption {i}", "width": i} for i in range(n)]


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_columns_are_named_or_the_usual_ones(tmp_path, write_mds):
    encodings = {"picture": "jpeg", "caption": "str", "caption_long": "str", "alt": "str"}
    values = {"picture": b"bytes", "caption": "usual", "caption_long": "long", "alt": "alternative"}
    write_mds(tmp_path / "set", encodings, [values])
    source = MdsSource(tmp_path / "set", Columns(image="picture"))
    assert source.captions(0) == ("long", "usual")
    source = MdsSource(tmp_path / "set", Columns(image="picture", short="alt", long="caption"))
    assert source.captions(0) == ("usual", "alternative")


def test_missing_columns_are_told_with_those_that_are_there(tmp_path, write_mds):
    write_mds(tmp_path / "set", {"picture": "bytes", "n": "int"}, [{"picture": b"x", "n": 1}])
    index = tmp_path / "set" / "index.json"
    refused(
        lambda: MdsSource(tmp_path / "set", Columns()),
        index,
        "none of the columns image, jpg",
        "set data.columns.image to one of these: n (int), picture (bytes)",
    )
    refused(
        lambda: MdsSource(tmp_path / "set", Columns(image="photo")), "no column 'photo'", "picture (bytes)"
    )
    refused(
        lambda: MdsSource(tmp_path / "set", Columns(image="n")),
        "column 'n' is stored as 'int', not as bytes or jpeg or png or pil",
        "data.columns.image",
    )
    refused(lambda: MdsSource(tmp_path / "set", Columns(image="picture")), "data.columns.long", "n (int)")


def test_encodings_of_other_columns_do_not_matter(tmp_path, write_mds):
    folder = write_mds(tmp_path / "set", COLUMNS, samples())
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"int"', '"bf16"'))
    assert MdsSource(folder, Columns()).captions(1).long == "caption 1"


def test_folders_that_hold_no_mds_are_refused(tmp_path):
    refused(lambda: MdsSource(tmp_path / "none", Columns()), tmp_path / "none", "no such folder")
    refused(lambda: MdsSource(tmp_path, Columns()), tmp_path, "neither index.json nor folders with one")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not an index of MDS shards"]),
        ("[]", ["not an index of MDS shards"]),
        ('{"shards": [{"format": "mds"}]}', ["not an index of MDS shards"]),
        ('{"shards": []}', ["lists no samples"]),
    ],
)
def test_indexes_that_are_none_are_refused(tmp_path, text, parts):
    (tmp_path / "index.json").write_text(text)
    refused(lambda: MdsSource(tmp_path, Columns()), tmp_path / "index.json", *parts)


def test_shards_of_another_format_are_refused(tmp_path, write_mds):
    from streaming.base.format import JSONWriter

    with JSONWriter(out=str(tmp_path / "set"), columns={"caption": "str"}) as writer:
        writer.write({"caption": "x"})
    refused(lambda: MdsSource(tmp_path / "set", Columns()), "its shards are not MDS")


def test_shards_that_are_missing_or_cut_are_refused_when_opened(tmp_path, write_mds):
    folder = write_mds(tmp_path / "set", COLUMNS, samples())
    shard = folder / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    refused(
        lambda: MdsSource(folder, Columns()), shard, f"{len(data) - 1} bytes, but index.json says {len(data)}"
    )
    shard.unlink()
    refused(lambda: MdsSource(folder, Columns()), shard, "No such file", "copy it again")


def test_compressed_shards_say_that_they_must_be_unpacked(tmp_path, write_mds):
    folder = write_mds(tmp_path / "set", COLUMNS, samples(), compression="zstd")
    refused(lambda: MdsSource(folder, Columns()), "shard.00000.mds.zstd", "unpack it to shard.00000.mds")


@pytest.mark.parametrize("name", ["sha1", "xxh64"])
def test_verify_compares_hashes_when_a_shard_is_first_read(tmp_path, write_mds, name):
    folder = write_mds(tmp_path / "set", COLUMNS, samples(), hashes=[name])
    assert MdsSource(folder, Columns(), verify=True).captions(2).long == "caption 2"
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    assert MdsSource(folder, Columns()).captions(0).long == "caption 0"
    source = MdsSource(folder, Columns(), verify=True)
    for _ in range(2):
        refused(lambda: source.captions(0), shard, f"its {name} is not that in its index")


def test_verify_needs_hashes_that_are_known(tmp_path, write_mds):
    folder = write_mds(tmp_path / "set", COLUMNS, samples())
    source = MdsSource(folder, Columns(), verify=True)
    refused(lambda: source.captions(0), "its index has no hashes", "data.verify")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {"crc": "00"}
    (folder / "index.json").write_text(json.dumps(index))
    source = MdsSource(folder, Columns(), verify=True)
    refused(lambda: source.captions(0), "hash 'crc' that is unknown here")


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming.base.format", None)
    refused(load_library, "pip install --no-deps mosaicml-streaming==")


def test_the_library_works_without_torchvision():
    load_library()
    import streaming

    assert streaming.MDSWriter.__name__ == "MDSWriter"
    assert "streaming.vision" not in sys.modules
