import json

import pytest
from PIL import Image

from millrace.engine.data.names import Entry, Role, is_hidden, list_folder, places
from millrace.engine.data.prepare.folders import read_entries
from millrace.engine.data.reject_reasons import Reason
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.util.errors import UserError


@pytest.mark.parametrize("name", [".DS_Store", "._1.jpg", "a/.thumbs/1.jpg", ".git/x", "./.x", "a/..b"])
def test_hidden_names(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "../a.jpg", "a/b.c/d", "a./b"])
def test_names_that_are_not_hidden(name):
    assert not is_hidden(name)


PICTURE, CAPTION, UNREAD, AUXILIARY, OTHER = Role


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        ("1.jpg 1.txt 1.json", [PICTURE, CAPTION, CAPTION]),
        ("1.JPG 1.TXT", [PICTURE, CAPTION]),
        ("1.depth.png 1.jpg 1.mask.v2.png 1.txt", [AUXILIARY, PICTURE, AUXILIARY, CAPTION]),
        ("1.txt 1.mask.webp", [CAPTION, AUXILIARY]),
        ("1.jpg 1.txt 1.tags.txt 1.cls 1.npy", [PICTURE, CAPTION, AUXILIARY, AUXILIARY, AUXILIARY]),
        ("1.jpg 1.jpg.txt", [PICTURE, AUXILIARY]),
        ("v1.3.jpg v1.3.txt v1.jpg v1.txt", [PICTURE, CAPTION, PICTURE, CAPTION]),
        ("v1.3.jpg v1.jpg v1.txt", [PICTURE, PICTURE, CAPTION]),  # 3 is no mask: its caption is missing
        ("IMG.2024.01.jpg IMG.2024.01.txt", [PICTURE, CAPTION]),
        ("1.mask.jpg 1.mask.txt 1.jpg 1.txt", [PICTURE, CAPTION, PICTURE, CAPTION]),
        ("a.b/1.jpg a.b/1.txt", [PICTURE, CAPTION]),
        ("x/1.mask.png 1.jpg 1.txt", [PICTURE, PICTURE, CAPTION]),  # of another folder
        ("1.apng 1.txt 2.tga 3.mpo 4.JPE", [UNREAD, CAPTION, UNREAD, UNREAD, UNREAD]),
        ("1 1.txt 2", [UNREAD, CAPTION, OTHER]),
        ("readme.md readme.txt a.parquet", [OTHER, CAPTION, OTHER]),
    ],
)
def test_roles_whatever_the_order(names, roles):
    names = names.split()
    for order in (names, names[::-1]):
        found = dict(zip(order, (place.role for place in places(order)), strict=True))
        assert [found[name] for name in names] == roles


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("a caption")


def test_every_leftover_has_a_reason_or_is_counted(tmp_path):
    fill(
        tmp_path,
        "a.jpg",
        "a.txt",
        "a.mask.png",
        "b.txt",
        "c.jpg",
        "d.apng",
        "d.txt",
        "e",
        "e.txt",
        "f.md",
        "g",
    )
    fill(tmp_path, ".DS_Store", "._a.jpg", ".thumbs/a.jpg")
    listing = list_folder(tmp_path)
    missing = "there is a caption but no picture of its name"
    unnamed = "a name without suffix is not read"
    assert listing.entries == [
        Entry("a.jpg", ("a.txt",)),
        Entry("b.txt", (), missing, Reason.MISSING_PICTURE),
        Entry("c.jpg", ()),
        Entry("d.apng", ("d.txt",), ".apng is not read", Reason.UNSUPPORTED_FORMAT),
        Entry("e", ("e.txt",), unnamed, Reason.UNSUPPORTED_FORMAT),
    ]
    assert listing.left_alone == {"hidden": 3, "auxiliary .mask.png": 1, ".md": 1, "without suffix": 1}
    assert listing.notes() == ["left alone: 3 hidden, 1 auxiliary .mask.png, 1 .md, 1 without suffix"]


def test_two_spellings_of_one_name_are_named(tmp_path):
    """macOS takes accents apart; two such files look alike and are of different names."""
    fill(tmp_path, "caf\u00e9.jpg", "cafe\u0301.txt", "na\u00efve.jpg", "na\u00efve.txt", "nai\u0308ve.txt")
    found = {entry.path: entry for entry in list_folder(tmp_path).entries}
    wanted = "its caption 'cafe\\u0301.txt' spells the name in another Unicode form (NFC and NFD)"
    assert found["caf\u00e9.jpg"] == Entry("caf\u00e9.jpg", (), wanted, Reason.MISSING_CAPTION)
    assert found["na\u00efve.jpg"].captions == ("na\u00efve.txt",)
    assert found["cafe\u0301.txt"].reason is Reason.MISSING_PICTURE
    with pytest.raises(UserError, match=r"Unicode form \(NFC and NFD\); rename one of them$"):
        FolderSource(tmp_path)
    rejects = [item for item in read_entries(tmp_path, [found["caf\u00e9.jpg"]])]
    assert [(reject.reason, reject.detail) for reject in rejects] == [(Reason.MISSING_CAPTION, wanted)]


def test_the_files_of_img2dataset(tmp_path):
    fill(tmp_path, "00000/0.jpg", "00000/0.txt", "00000.parquet")
    (tmp_path / "00000/0.json").write_text(json.dumps({"caption": "x", "status": "success"}))
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "other_stats.json").write_text("{}")
    listing = list_folder(tmp_path)
    assert [entry.path for entry in listing.entries] == ["00000/0.jpg", "other_stats.json"]
    assert listing.left_alone == {".parquet": 1, "_stats.json of img2dataset": 1}
