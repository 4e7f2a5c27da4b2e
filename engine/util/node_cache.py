"""Node cache: files that one process of a machine makes and all of its processes map into memory.

    $MILLRACE_CACHE/NAME     else $XDG_CACHE_HOME/millrace/NAME, else ~/.cache/millrace/NAME

A name holds the digest of what the file is made from, so a file is never changed: it is there whole or not at
all. The folder should be on a local disk. What nobody has opened for KEPT is removed when a file is made.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from millrace.engine.util.files import TEMPORARY, atomic_file

VARIABLE = "MILLRACE_CACHE"
"""Environment variable that names the folder."""
KEPT = 30 * 24 * 3600
"""Seconds."""
_ABANDONED = 24 * 3600
"""Seconds after which a temporary file is of a process that was killed."""


def folder() -> Path:
    """The cache of this user on this machine; it need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "millrace"


def cached_file(name: str, size: int | None, make: Callable[[BinaryIO], object]) -> Path:
    """Path of the file `name`, which `make` writes where it is not there yet, or has not `size` bytes.

    Of the processes that want it at the same time one makes it and the others wait. Raises OSError where the
    folder cannot be written, and what `make` raises.
    """
    path = folder() / name
    if _is_there(path, size):
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.parent):
        if not _is_there(path, size):
            _clear(path.parent)
            with atomic_file(path) as file:
                make(file)
    return path


def _is_there(path: Path, size: int | None) -> bool:
    """Whether a file is there and whole, which counts as opening it."""
    try:
        if path.stat().st_size != size and size is not None:
            return False
    except FileNotFoundError:
        return False
    with suppress(OSError):  # of another user, or on a disk that cannot be written
        os.utime(path)
    return True


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        with suppress(OSError):  # where a file system has no locks, two may make the same file
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear(root: Path) -> None:
    now = time.time()
    for path in root.iterdir():
        with suppress(OSError):
            if now - path.stat().st_mtime > (_ABANDONED if path.name.endswith(TEMPORARY) else KEPT):
                path.unlink()
