import numpy as np
import pytest

from millrace.engine.data.prepare.inputs import find_inputs
from millrace.engine.data.prepare.parts import MAX_DETAIL, data_path, do_part, key_hash, load_part, rows_path
from millrace.engine.data.reject_reasons import Reason


@pytest.fixture
def part(tmp_path, bad, settings):
    tar = bad.TarBuilder(tmp_path / "a.tar")
    tar.sample("0").sample("n" * 900, b"").sample("2", caption=b"short")
    return find_inputs(tar.close(), settings).parts[0]


def test_a_part_comes_back_as_it_was_put_aside(tmp_path, settings, part, bad):
    counts = []
    done = do_part(part, tmp_path, settings, lambda *n: counts.append(n))
    assert counts == [(1, 0), (0, 1), (1, 0)]
    again = load_part(rows_path(tmp_path, part.key))
    np.testing.assert_array_equal(again.rows, done.rows)
    assert again.rejects == done.rejects
    assert (again.seen, again.bad) == (3, 1)
    assert again.rejects[0].reason is Reason.EMPTY_PICTURE
    assert len(again.rejects[0].key) == MAX_DETAIL
    row = again.samples[1]
    assert again.rows["bucket"].tolist()[1] == -1
    assert {unit.tobytes() for unit in again.rows["unit"]} == {part.units}
    assert row["key"].tobytes() == key_hash("a.tar/2")
    assert (row["long_characters"], row["short_characters"]) == (5, 5)
    with data_path(tmp_path, part.key).open("rb") as file:
        file.seek(int(row["offset"]))
        picture, record = file.read(int(row["picture_bytes"])), file.read(int(row["record_bytes"]))
        assert file.read() == b""
    assert picture[:2] == b"\xff\xd8"
    assert b'"key":"a.tar/2"' in record


@pytest.mark.parametrize("missing", ["rows", "data"])
def test_a_part_is_done_only_when_all_of_it_is_there(tmp_path, settings, part, missing):
    rows = rows_path(tmp_path, part.key)
    assert load_part(rows) is None
    do_part(part, tmp_path, settings, lambda *_: None)
    path = rows.with_suffix(f".{missing}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert load_part(rows) is None
    path.unlink()
    assert load_part(rows) is None
