import numpy as np
import pytest

from millrace.engine.data.prepare.inputs import find_inputs
from millrace.engine.data.prepare.parts import MAX_DETAIL, do_part, key_hash, load_part, open_data
from millrace.engine.data.reject_reasons import Reason


@pytest.fixture
def part(tmp_path, bad, settings):
    tar = bad.TarBuilder(tmp_path / "a.tar")
    tar.sample("0").sample("n" * 900, b"").sample("2", caption=b"short")
    return find_inputs(tar.close(), settings).parts[0]


def test_a_part_comes_back_as_it_was_put_aside(tmp_path, settings, part, bad):
    counts = []
    done = do_part(part, 7, tmp_path, settings, lambda *n: counts.append(n))
    assert counts == [(1, 0), (0, 1), (1, 0)]
    again = load_part(7, tmp_path)
    np.testing.assert_array_equal(again.rows, done.rows)
    assert again.rejects == done.rejects
    assert (again.seen, again.bad) == (3, 1)
    assert again.rejects[0].reason is Reason.EMPTY_PICTURE
    assert len(again.rejects[0].key) == MAX_DETAIL
    row = again.rows[1]
    assert row["key"].tobytes() == key_hash("a.tar/2")
    assert (row["long_characters"], row["short_characters"]) == (5, 5)
    with open_data(7, tmp_path) as file:
        file.seek(int(row["offset"]))
        picture, record = file.read(int(row["picture_bytes"])), file.read(int(row["record_bytes"]))
        assert file.read() == b""
    assert picture[:2] == b"\xff\xd8"
    assert b'"key":"a.tar/2"' in record


@pytest.mark.parametrize("missing", ["json", "npy", "data"])
def test_a_part_is_done_only_when_all_of_it_is_there(tmp_path, settings, part, missing):
    assert load_part(0, tmp_path) is None
    do_part(part, 0, tmp_path, settings, lambda *_: None)
    path = tmp_path / f"000000.{missing}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert load_part(0, tmp_path) is None
    path.unlink()
    assert load_part(0, tmp_path) is None
