"""Files that the processes of a machine share."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from millrace.engine.util import node_cache
from millrace.engine.util.node_cache import cached_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(node_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_named_one_or_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv(node_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert node_cache.folder() == tmp_path / "millrace"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert node_cache.folder() == tmp_path / ".cache" / "millrace"
    monkeypatch.setenv(node_cache.VARIABLE, "~/here")
    assert node_cache.folder() == tmp_path / "here"


def test_one_of_many_makes_a_file(cache):
    made = []

    def make(file):
        made.append(1)
        time.sleep(0.05)
        file.write(b"x")

    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: cached_file("a", 1, make), range(8)))
    assert paths == {cache / "a"}
    assert made == [1]
    assert (cache / "a").read_bytes() == b"x"
    assert cache.stat().st_mode & 0o777 == 0o700


def test_what_fails_leaves_nothing_and_is_tried_again(cache):
    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cached_file("a", 1, fail)
    assert list(cache.iterdir()) == []
    assert cached_file("a", 1, lambda file: file.write(b"w")).read_bytes() == b"w"


def test_what_nobody_opens_any_more_is_removed(cache):
    for name in ("old", "used", "b.0123.tmp"):
        cached_file(name, 1, lambda file: file.write(b"x"))
    for path in cache.iterdir():
        os.utime(path, (0, time.time() - node_cache.KEPT - 1))
    cached_file("used", 1, lambda _: pytest.fail("made again"))
    cached_file("new", 1, lambda file: file.write(b"x"))
    assert sorted(path.name for path in cache.iterdir()) == ["new", "used"]


def test_a_file_of_another_size_is_made_again(cache):
    cached_file("a", 1, lambda file: file.write(b"x"))
    assert cached_file("a", 2, lambda file: file.write(b"xy")).read_bytes() == b"xy"
