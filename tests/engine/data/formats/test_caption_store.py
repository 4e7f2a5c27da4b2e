"""Captions of a folder that the processes of a machine share."""

import io
import logging
import os
import time

import numpy as np
import pytest

from millrace.engine.data.captions import Captions
from millrace.engine.data.formats import caption_store
from millrace.engine.data.formats.caption_store import (
    CaptionStore,
    folder_state,
    stored_captions,
    write_store,
)
from millrace.engine.util import node_cache

SAMPLES = [
    ("a.png", Captions("a fox", "a fox")),
    ("sub/é\n.jpg", Captions("long 猫\n\0", "short")),
    (os.fsdecode(b"\xff.png"), Captions("x" * 1000, "y")),
]


def samples(note):
    note(logging.INFO, "2 files are left alone")
    yield from SAMPLES


def equals(store):
    assert [(store.key(i), store.captions(i)) for i in range(len(store))] == SAMPLES
    assert store.notes == [(logging.INFO, "2 files are left alone")]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_it_comes_back(count):
    file = io.BytesIO()
    write_store(file, lambda note: iter(SAMPLES[:count]))
    store = CaptionStore(np.frombuffer(file.getvalue(), np.uint8))
    assert [(store.key(i), store.captions(i)) for i in range(len(store))] == SAMPLES[:count]
    assert store.notes == []
    for index in (-1, count):
        with pytest.raises(IndexError):
            store.key(index)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose captions were written an hour ago; small ones are mapped too."""
    monkeypatch.setattr(caption_store, "MAPPED_PICTURES", 1)
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "a.txt", "sub/b.jpg", "sub/b.JSON"):
        (root / name).write_text(name)
        os.utime(root / name, (0, time.time() - 3600))
    return root


def test_a_folder_is_read_once_a_machine(folder, tmp_path):
    equals(stored_captions(folder, samples))
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat().st_ino
    equals(stored_captions(folder, lambda note: pytest.fail("read again")))
    assert file.stat().st_ino == before


def test_a_small_folder_is_held(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(caption_store, "MAPPED_PICTURES", 3)
    equals(stored_captions(folder, samples))
    assert not (tmp_path / "cache").exists()


def test_captions_that_have_just_been_written_are_read(folder, tmp_path):
    """What is written again within the clock's tick would have the same time."""
    (folder / "a.txt").write_text("new")
    equals(stored_captions(folder, samples))
    assert not (tmp_path / "cache").exists()


def test_an_error_leaves_nothing(folder, tmp_path):
    def fails(note):
        yield SAMPLES[0]
        raise ValueError("b.txt: not UTF-8")

    with pytest.raises(ValueError, match="not UTF-8"):
        stored_captions(folder, fails)
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_change_that_captions_depend_on_is_another_state(folder):
    def touch(name, text, age):
        (folder / name).write_text(text)
        os.utime(folder / name, (0, time.time() - age))

    states = [folder_state(folder)]
    assert states[0].pictures == 2
    for change in (
        lambda: touch("a.txt", "other", 3600),
        lambda: os.utime(folder / "a.txt", (0, 1000)),
        lambda: touch("c.txt", "", 3600),
        lambda: (folder / "c.txt").rename(folder / "d.txt"),
        lambda: (folder / "a.png").rename(folder / "d.png"),
        lambda: (folder / "sub/b.JSON").unlink(),
        lambda: (folder / "link").symlink_to(folder / "sub"),
    ):
        change()
        assert folder_state(folder) == folder_state(folder)
        states.append(folder_state(folder))
    assert len({state.digest for state in states}) == len(states)


def test_the_bytes_of_pictures_do_not_count(folder):
    before = folder_state(folder)
    (folder / "a.png").write_text("another picture")
    assert folder_state(folder) == before


def test_a_link_to_a_folder_above_ends(folder):
    (folder / "sub" / "up").symlink_to(folder)
    assert folder_state(folder).pictures == 2


def test_without_a_folder_to_write_it_is_held(folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("in the way")
    equals(stored_captions(folder, samples))
    assert len(caplog.messages) == 1
    assert "MILLRACE_CACHE" in caplog.text
