import os

from millrace.engine.data.names import Entry, list_folder
from millrace.engine.data.prepare.folders import read_entries
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.reject_reasons import Reason
from millrace.engine.data.sources.folder import FolderSource


def fill(root, bad, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bad.jpeg())
        path.with_suffix(".txt").write_text(f"caption of {name}")


def test_the_same_samples_as_the_folder_source(tmp_path, bad):
    fill(tmp_path, bad, ["b.jpg", "a/z.png", "a.b/c.JPEG", "a/B.webp"])
    (tmp_path / "b.txt").rename(tmp_path / "b.TXT")
    (tmp_path / "readme.md").write_text("no picture")
    source = FolderSource(tmp_path)
    samples = list(read_entries(tmp_path, list_folder(tmp_path).entries))
    assert [sample.key for sample in samples] == [source.key(i) for i in range(len(source))]
    assert [sample.captions for sample in samples] == [source.captions(i) for i in range(len(source))]
    assert all(isinstance(sample, RawSample) for sample in samples)


def test_links_are_followed_but_not_twice(tmp_path, bad):
    fill(tmp_path / "elsewhere", bad, ["x.jpg"])
    fill(tmp_path / "root", bad, ["y.jpg"])
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "b")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "a")
    assert list_folder(tmp_path / "root").entries == [
        Entry("a/x.jpg", ("x.txt",)),
        Entry("b", (), "a link to a folder that is read already"),
        Entry("y.jpg", ("y.txt",)),
    ]


def test_files_that_vanish_are_rejects(tmp_path, bad):
    fill(tmp_path, bad, ["a.jpg", "b.jpg", "c.jpg"])
    entries = list_folder(tmp_path).entries
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.txt").unlink()
    one, two, three = read_entries(tmp_path, entries)
    assert (one.reason, two.reason) == (Reason.UNREADABLE_FILE, Reason.UNREADABLE_FILE)
    assert "a.jpg" in one.detail
    assert "b.txt" in two.detail
    assert isinstance(three, RawSample)
