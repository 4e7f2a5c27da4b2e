"""A file is the old one or the new one whole, whatever happens; and nobody is kept from reading it."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from millrace.engine.util.files import (
    HashingFile,
    atomic_file,
    sha256,
    sha256_file,
    sha256_json,
    sync_folder,
    write_atomically,
)


@pytest.fixture
def calls(monkeypatch):
    """The system calls that make a write durable, in order, with the file they are for."""
    found = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor):
        found.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def rename(old, new):
        found.append(("replace", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    return found


def test_content_then_name_then_folder_are_on_disk(tmp_path, calls):
    path = tmp_path / "a.json"
    write_atomically(path, "text: ä")
    assert path.read_bytes() == "text: ä".encode()
    (first, temporary), *rest = calls
    assert first == "fsync"
    assert temporary.startswith(f"{path}.")
    assert temporary.endswith(".tmp")
    assert rest == [("replace", str(path)), ("fsync", str(tmp_path))]


def test_without_fsync_only_the_rename_is_left(tmp_path, calls):
    write_atomically(tmp_path / "a", b"bytes", sync=False)
    assert calls == [("replace", str(tmp_path / "a"))]


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def stops_halfway():
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        stops_halfway()
    assert path.read_text() == "before"
    with atomic_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_nothing_is_left_of_a_write_that_the_disk_refused(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    path.write_text("before")

    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a", "")


def test_a_file_system_without_fsync_of_folders_is_no_error(tmp_path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(errors.pop(), "refused")

    errors = [errno.EIO, errno.EINVAL]
    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)
    with pytest.raises(OSError, match="refused"):
        sync_folder(tmp_path)


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Threads here, and processes that start with the same process id in containers elsewhere."""
    texts = [str(i) * 5000 for i in range(10)]
    with ThreadPoolExecutor(8) as threads:
        for text in threads.map(lambda i: write_atomically(tmp_path / "a", texts[i % 10]), range(200)):
            assert text is None
    assert (tmp_path / "a").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_digests(tmp_path):
    wanted = hashlib.sha256(b"abcdef").hexdigest()
    (tmp_path / "x").write_bytes(b"abcdef")
    assert sha256(b"abcdef") == sha256(memoryview(b"abcdef")) == wanted
    assert sha256(iter([b"abc", b"", memoryview(b"def")])) == sha256_file(tmp_path / "x") == wanted
    assert sha256([]) == hashlib.sha256().hexdigest()
    value = {"b": [1, None], "a": "ä"}
    assert sha256_json(value) == sha256_json({"a": "ä", "b": [1, None]})
    assert sha256_json(value) == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    assert sha256_json([1, 2]) != sha256_json([2, 1])


def test_what_passes_through_a_file_is_hashed(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as opened:
        file = HashingFile(opened)
        for part in (b"abc", memoryview(b"def")):
            file.write(part)
        assert (file.bytes, file.sha256()) == (6, sha256(b"abcdef"))
    assert path.read_bytes() == b"abcdef"
    with path.open("rb") as opened:
        file = HashingFile(opened)
        assert file.read(4) + file.read(4) + file.read(4) == b"abcdef"
        assert (file.bytes, file.sha256()) == (6, sha256(b"abcdef"))


def test_needs_no_torch():
    code = "import sys, millrace.engine.util.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
