import json
import os
import re

import pytest
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.data import Captions, UnreadablePicture, open_source
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.util.errors import UserError


def add(folder, name, caption="a caption", size=(8, 8), color="red"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def refused(folder, *parts):
    with pytest.raises(UserError) as caught:
        FolderSource(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_pictures_are_found_everywhere_in_order_of_their_path(tmp_path):
    for name in ("b.JPG", "a/z.png", "a.b/c.webp", "a/B.jpeg", "c.Png"):
        add(tmp_path, name, caption=f"  caption of {name}\n")
    (tmp_path / "readme.md").write_text("not a picture")
    (tmp_path / "readme.txt").write_text("not a caption of a picture")
    source = open_source(Data(source="folder", path=str(tmp_path)))
    keys = [source.key(index) for index in range(len(source))]
    assert keys == sorted(["b.JPG", "a/z.png", "a.b/c.webp", "a/B.jpeg", "c.Png"])
    for index, key in enumerate(keys):
        assert source.captions(index) == Captions(f"caption of {key}", f"caption of {key}")
        assert source.image(index).size == (8, 8)


def test_pictures_are_read_when_asked_for_and_not_kept(tmp_path):
    path = add(tmp_path, "a.png", color="red")
    source = FolderSource(tmp_path)
    assert source.image(0).getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (8, 8), "blue").save(path)
    assert source.image(0).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"long": " long one ", "short": "short"}, ("long one", "short")),
        ({"caption": "both", "width": 3}, ("both", "both")),
    ],
)
def test_json_captions(tmp_path, values, expected):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert FolderSource(tmp_path).captions(0) == expected


def test_utf8_captions_with_and_without_byte_order_mark(tmp_path):
    for name, encoding in (("a", "utf-8"), ("b", "utf-8-sig")):
        add(tmp_path, f"{name}.png", caption=None)
        (tmp_path / f"{name}.txt").write_text("naïve 猫", encoding=encoding)
    source = FolderSource(tmp_path)
    assert [source.captions(index).long for index in range(2)] == ["naïve 猫", "naïve 猫"]


def test_suffix_of_the_caption_may_be_upper_case(tmp_path):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "a.TXT").write_text("loud")
    assert FolderSource(tmp_path).captions(0).long == "loud"


def test_linked_folders_are_followed_but_not_twice(tmp_path):
    add(tmp_path / "elsewhere", "a.png")
    data = tmp_path / "data"
    add(data, "b.png")
    os.symlink(tmp_path / "elsewhere", data / "linked")
    assert [FolderSource(data).key(index) for index in range(2)] == ["b.png", "linked/a.png"]
    os.symlink(data, data / "linked" / "loop")
    refused(data, data / "linked" / "loop", "a link to a folder", "remove it")


def test_missing_folder(tmp_path):
    refused(tmp_path / "gone", tmp_path / "gone", "no such folder", "data.path")


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, tmp_path, "no pictures", ".webp")


def test_missing_caption(tmp_path):
    add(tmp_path, "a.png")
    path = add(tmp_path, "sub/b.png", caption=None)
    refused(tmp_path, path, "neither b.txt nor b.json", "give it one")


def test_two_captions(tmp_path):
    path = add(tmp_path, "a.png")
    (tmp_path / "a.TXT").write_text("x")
    refused(tmp_path, path, "'a.TXT' and 'a.txt'", "give it one")


@pytest.mark.parametrize("caption", ["", " \n\t"])
def test_empty_caption(tmp_path, caption):
    path = add(tmp_path, "a.png", caption=caption)
    refused(tmp_path, path.with_suffix(".txt"), "the caption is empty", "remove the picture")


def test_caption_that_is_not_utf8(tmp_path):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    refused(tmp_path, tmp_path / "a.txt", "not UTF-8 at byte 2", "save the caption as UTF-8")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"long": ', "not valid JSON"),
        ('["x"]', "write it as"),
        ("{}", 'has neither "caption" nor both "long" and "short"; give it one caption'),
        ('{"long": "x"}', "neither"),
        ('{"caption": "x", "caption": "y"}', 'has "caption" more than once; give it one'),
        ('{"long": "x", "short": " "}', '"short" is empty'),
        ('{"caption": 3}', '"caption" is a int, not text; make it text'),
    ],
)
def test_bad_json_captions(tmp_path, text, part):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "a.json").write_text(text)
    refused(tmp_path, tmp_path / "a.json", part)


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".HEIC"])
def test_other_picture_formats_are_not_skipped_silently(tmp_path, suffix):
    add(tmp_path, "a.png")
    (tmp_path / f"b{suffix}").write_bytes(b"x")
    refused(tmp_path, tmp_path / f"b{suffix}", "convert it to .png or .jpg")


@pytest.mark.parametrize("name", ["b.jpe", "b.apng", "b.mpo", "b.tga", "b"])
def test_pictures_that_are_not_read_are_refused(tmp_path, name):
    add(tmp_path, "a.png")
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.txt").write_text("a caption")
    refused(tmp_path, tmp_path / name, "is not read; convert it")


def test_hidden_files_and_folders_are_left_alone(tmp_path):
    add(tmp_path, "a.png")
    add(tmp_path, ".thumbs/a.png", caption=None)
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "._a.txt").write_bytes(b"\xb0")
    assert len(FolderSource(tmp_path)) == 1


def test_captions_without_a_picture_are_counted(tmp_path, caplog):
    add(tmp_path, "a.png")
    for name in ("b.txt", "c.json"):
        (tmp_path / name).write_text("x")
    assert len(FolderSource(tmp_path)) == 1
    assert "2 captions without a picture are left alone, such as b.txt" in caplog.text


def test_auxiliary_pictures_and_metadata_belong_to_their_sample(tmp_path):
    for name in ("1.jpg", "0.png"):
        add(tmp_path, name, caption="from the .txt")
        for part in (".depth.png", ".mask.png", ".tags.txt"):
            (tmp_path / f"{name[0]}{part}").write_bytes(b"x")
        (tmp_path / f"{name[0]}.json").write_text('{"caption": "of the page", "url": "u"}')
    source = FolderSource(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["0.png", "1.jpg"]
    assert source.captions(0) == Captions("from the .txt", "from the .txt")


def test_a_pipe_is_not_waited_for(tmp_path):
    add(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("a caption")
    with pytest.raises(UnreadablePicture, match="not a regular file"):
        FolderSource(tmp_path).image(1)


def test_half_a_character_is_refused_at_the_start(tmp_path):
    add(tmp_path, "a.png", caption=None)
    (tmp_path / "a.json").write_text('{"caption": "a \\ud83d cat"}')
    refused(tmp_path, tmp_path / "a.json", "half a character at place 2")


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    add(tmp_path, "a.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def deny(path):
        if re.search("closed$", str(path)):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    refused(tmp_path, tmp_path / "closed", "cannot be listed: Permission denied")
