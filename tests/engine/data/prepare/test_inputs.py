import pytest

from millrace.engine.data.prepare import inputs
from millrace.engine.data.prepare.inputs import find_inputs, read_part
from millrace.engine.data.reject_reasons import Reason
from millrace.engine.util.errors import UserError


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_a_folder_is_cut_into_parts_of_pictures(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(inputs, "PART_PICTURES", 2)
    found = find_inputs(put(tmp_path, "a.jpg", "b.png", "c/d.gif", "c/d.txt", "e.md"), settings)
    assert found.samples == 3
    assert [[entry.path for entry in part.entries] for part in found.parts] == [
        ["a.jpg", "b.png"],
        ["c/d.gif"],
    ]
    assert [item.reason for part in found.parts for _, item in read_part(part)] == [
        Reason.MISSING_CAPTION,
        Reason.MISSING_CAPTION,
        Reason.UNSUPPORTED_FORMAT,
    ]


def test_tars_are_parts(tmp_path, settings):
    found = find_inputs(put(tmp_path, "b.tar", "a/c.tar", "b.parquet", "b_stats.json"), settings)
    assert [part.name for part in found.parts] == ["a/c.tar", "b.tar"]
    assert found.samples is None
    assert found.notes == ["1 .parquet files beside the tars are not read"]
    assert [part.name for part in find_inputs(tmp_path / "b.tar", settings).parts] == ["b.tar"]


def test_digest_follows_what_there_is(tmp_path, settings):
    digests = [find_inputs(put(tmp_path, "a.jpg"), settings).digest]
    digests.append(find_inputs(put(tmp_path, "a.txt"), settings).digest)
    digests.append(find_inputs(put(tmp_path, "b.jpg"), settings).digest)
    assert len(set(digests)) == 3
    tar = put(tmp_path / "tars", "a.tar") / "a.tar"
    before = find_inputs(tar, settings).digest
    tar.write_bytes(b"x")
    assert find_inputs(tar, settings).digest != before


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ((), "holds no pictures"),
        (("a.md",), "holds no pictures"),
        (("a.jpg", "b.tar"), "a.jpg) and b.tar"),
        (("a.png", "b.parquet"), "a.png) and b.parquet"),
        (("a.tar.gz",), "a.tar.gz: is compressed"),
        (("x/a.TGZ", "b.tar"), "a.TGZ: is compressed"),
    ],
)
def test_folders_that_are_refused(tmp_path, settings, names, part):
    with pytest.raises(UserError) as caught:
        find_inputs(put(tmp_path, *names), settings)
    assert part in str(caught.value)


def test_paths_that_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match="no such folder or file"):
        find_inputs(tmp_path / "none", settings)
    with pytest.raises(UserError, match=r"give a folder, a \.tar or a \.parquet"):
        find_inputs(put(tmp_path, "a.zip") / "a.zip", settings)
