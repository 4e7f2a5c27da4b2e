import pytest

from millrace.engine.data import Captions
from millrace.engine.data.prepare.parquet import read_row_group, table_shape
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

SETTINGS = Settings(resolution=32, patch=8)


def write(path, columns, rows=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def read(path, settings=SETTINGS):
    shape = table_shape(path, settings)
    return [item for g in range(len(shape.rows)) for item in read_row_group(path, path.name, g, shape)]


def test_a_hugging_face_table(tmp_path, bad):
    pictures = [{"bytes": bad.jpeg(seed=i), "path": "image.jpg"} for i in range(10)]
    path = write(tmp_path / "a.parquet", {"image": pictures, "text": [f"caption {i}" for i in range(10)]})
    samples = read(path)
    assert table_shape(path, SETTINGS).rows == (4, 4, 2)
    assert [sample.key for sample in samples] == [f"a.parquet#{i}" for i in range(10)]
    assert samples[7] == RawSample("a.parquet#7", bad.jpeg(seed=7), Captions("caption 7", "caption 7"))


def test_binary_column_and_two_captions(tmp_path, bad):
    columns = {"jpg": [bad.jpeg()], "long": ["l"], "short": ["s"], "caption": ["c"]}
    assert read(write(tmp_path / "a.parquet", columns))[0].captions == Captions("l", "s")
    named = Settings(resolution=32, patch=8, picture_column="jpg", caption_columns=("caption",))
    assert read(tmp_path / "a.parquet", named)[0].captions == Captions("c", "c")
    both = Settings(resolution=32, patch=8, caption_columns=("caption", "short"))
    assert read(tmp_path / "a.parquet", both)[0].captions == Captions("c", "s")


def test_columns_are_as_the_keys_of_json(tmp_path, bad):
    columns = {
        "jpg": [bad.jpeg()] * 3,
        "caption": ["c", "c", None],
        "short": ["s", None, "s"],
        "long": [None, "l", "l"],
    }
    captions = [sample.captions for sample in read(write(tmp_path / "a.parquet", columns))]
    assert captions == [Captions("c", "s"), Captions("l", "c"), Captions("l", "s")]
    swapped = Settings(resolution=32, patch=8, caption_columns=("short", "caption"))
    assert read(tmp_path / "a.parquet", swapped)[0].captions == Captions("s", "c")


def test_which_column_was_taken_is_said(tmp_path, bad):
    (tmp_path / "in").mkdir()
    columns = {"image": [bad.jpeg()], "text": ["t"], "caption": ["c\r\nd"]}
    path = write(tmp_path / "in" / "a.parquet", columns)
    assert read(path)[0].captions.long == "c\nd"
    (note,) = table_shape(path, SETTINGS).notes(path)
    assert note.startswith("a.parquet: captions are of column caption; not read: text")
    named = Settings(resolution=32, patch=8, caption_columns=("text",))
    assert table_shape(path, named).notes(path) == []
    _, notes = prepare(tmp_path / "in", tmp_path / "out", SETTINGS, 0, 0.0)
    assert note in notes


def test_bad_rows(tmp_path, bad):
    good = {"bytes": bad.jpeg(), "path": None}
    columns = {
        "image": [good, None, {"bytes": None, "path": "x.jpg"}, good, good, good],
        "caption": ["c", "c", "c", None, " ", "w" * 70_000],
    }
    kinds = [getattr(item, "reason", None) for item in read(write(tmp_path / "a.parquet", columns))]
    assert kinds == [
        None,
        Reason.MISSING_PICTURE,
        Reason.MISSING_PICTURE,
        Reason.MISSING_CAPTION,
        Reason.EMPTY_CAPTION,
        Reason.CAPTION_TOO_LONG,
    ]


def test_captions_that_are_no_utf8(tmp_path, bad):
    captions = pyarrow.array([b"ok", b"na\xefve"]).cast(pyarrow.string(), safe=False)
    path = write(tmp_path / "a.parquet", {"image": [bad.jpeg()] * 2, "caption": captions})
    good, broken = read(path)
    assert isinstance(good, RawSample)
    assert broken.reason is Reason.CAPTION_NOT_UTF8


def test_every_row_of_a_damaged_group_counts(tmp_path, bad):
    columns = {"image": [bad.jpeg(seed=i) for i in range(12)], "caption": ["c"] * 12}
    path = write(tmp_path / "a.parquet", columns)
    with parquet.ParquetFile(path) as file:
        start = file.metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    items = read(path)
    assert len(items) == 12
    assert [item.key for item in items] == [f"a.parquet#{i}" for i in range(12)]
    lost = [item for item in items if not isinstance(item, RawSample)]
    assert {item.reason for item in lost} == {Reason.CORRUPT_PARQUET}
    assert [item.key for item in lost] == [f"a.parquet#{i}" for i in range(4, 8)]


def test_tables_that_cannot_be_used(tmp_path, bad):
    path = write(tmp_path / "a.parquet", {"url": ["x"], "text": ["c"]})
    with pytest.raises(UserError, match=r"a\.parquet: has no column image or .*--picture-column.*url, text"):
        table_shape(path, SETTINGS)
    with pytest.raises(UserError, match="column url holds string"):
        table_shape(path, Settings(resolution=32, patch=8, picture_column="url"))
    path = write(tmp_path / "b.parquet", {"image": [b"x"], "label": [1]})
    with pytest.raises(UserError, match=r"--caption-column .*image, label"):
        table_shape(path, SETTINGS)
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(Rejected) as caught:
        table_shape(path, SETTINGS)
    assert caught.value.reason is Reason.CORRUPT_PARQUET


def test_a_folder_of_tables_becomes_shards(tmp_path, bad):
    for name in ("a", "b"):
        pictures = [{"bytes": bad.jpeg(seed=i), "path": None} for i in range(6)]
        write(tmp_path / "in" / f"{name}.parquet", {"image": pictures, "caption": ["c"] * 6})
    (tmp_path / "in" / "c.parquet").write_bytes(b"damaged")
    manifest, _ = prepare(tmp_path / "in", tmp_path / "out", SETTINGS, 0, 0.1)
    assert manifest.counts == {"seen": 13, "samples": 12, "rejected": 1, "unusable_profiles": 0}
    assert manifest.reject_examples == {"corrupt_parquet": ["c.parquet"]}
    assert ShardsSource(tmp_path / "out").key(11) == "b.parquet#5"
