"""Remote input: a file behind a URL as one that can be sought in, whose bytes come over the net once.

    RemoteInput   blocks, asked for when they are touched and a few ahead, kept in a file without a name
    RemoteFolder  the files below a URL, with what identifies them

Whoever reads from beginning to end streams; a second pass, or a footer that is read first, costs nothing
more. A block whose request fails is asked for again (`remote_files.py`), so a connection that breaks off goes
on where it was.
"""

import io
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from millrace.engine.data.remote.remote_files import RemoteFiles
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import is_url

BLOCK = 2**20
AHEAD = 8
"""Blocks that are under way behind the one that is read."""
_REQUESTS = 16
_IDENTITY = (
    *("size", "ETag", "etag", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "Digest"),
    *("mtime", "updated", "generation", "md5Hash", "crc32c", "blob_id", "sha256", "oid"),
)
"""What stores say of a file that changes with it."""


class RemoteStatus(NamedTuple):
    """A file of a store."""

    size: int
    identity: tuple[str, ...]
    """Of its content, as far as the store says."""


class RemoteFolder:
    """What lies below a URL, which may be that of a file. Raises UserError for one that nothing can read."""

    def __init__(self, url: str) -> None:
        self.files = RemoteFiles(url, _REQUESTS)
        self.url = self.files.url

    def names(self) -> list[str]:
        """Paths of all files below the URL, sorted. Raises UserError."""
        try:
            found = self.files.listing()
        except OSError as error:
            raise UserError(f"{self.url}: cannot be listed: {error.strerror}") from None
        if not found:
            raise UserError(f"{self.url}: holds no files, or the server does not list them; name one file")
        return found

    def statuses(self, names: list[str]) -> list[RemoteStatus]:
        """Of these files. Raises UserError."""
        with ThreadPoolExecutor(_REQUESTS) as threads:
            return list(threads.map(self._status, names))

    def _status(self, name: str) -> RemoteStatus:
        info, size = _size_of(self.files, name)
        said = [f"{key}={info[key]}" for key in _IDENTITY if info.get(key) is not None]
        return RemoteStatus(size, tuple(said))


class RemoteInput(io.RawIOBase):
    """A file behind a URL, for one reader. Raises UserError where it cannot be read.

    Args:
        url: of the file.
        folder: what has come over is kept there, in a file that nobody sees; None is the system's.
    """

    def __init__(self, url: str, folder: Path | None = None) -> None:
        super().__init__()
        self._files = RemoteFiles(url, AHEAD + 1)
        self._size, self._at = _size_of(self._files, "")[1], 0
        self.wanted = self._size
        """Where reading ahead of the reader ends."""
        self._folder = folder
        with self._writing():
            self._kept = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close
        self._coming: dict[int, Future[bytes]] = {}
        self._there: set[int] = set()
        self._lock = threading.Lock()  # Arrow reads from threads of its own

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        with self._lock, memoryview(buffer).cast("B") as view:
            size = min(len(view), self._size - self._at)
            if size <= 0:
                return 0
            first, last = self._at // BLOCK, (self._at + size - 1) // BLOCK
            for number in range(first, last + 1):
                self._fetch(number)
            done = os.preadv(self._kept.fileno(), [view[:size]], self._at)
            self._at += done
            return done

    def close(self) -> None:
        if not self.closed and hasattr(self, "_kept"):
            self._kept.close()
        super().close()

    def _fetch(self, number: int) -> None:
        """Have a block, and those behind it on their way."""
        for other in [other for other, work in self._coming.items() if work.done()]:
            self._keep(other)  # of those that the reader has skipped, memory would fill
        end = -(-min(self.wanted, self._size) // BLOCK)
        for following in (number, *range(number + 1, min(number + AHEAD + 1, end))):
            if following not in self._there and following not in self._coming:
                start = following * BLOCK
                work = self._files.get("", start, min(BLOCK, self._size - start))
                self._coming[following] = self._files.run(work)
        if number in self._coming:
            self._keep(number)

    def _keep(self, number: int) -> None:
        rest = memoryview(_asked(self._coming.pop(number).result, self._files.url))
        offset = number * BLOCK
        with self._writing():
            while rest:
                written = os.pwrite(self._kept.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written
        self._there.add(number)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of the disk here is none of the input."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder or tempfile.gettempdir()}: cannot keep {self._files.url} while it is read: "
                f"{error.strerror or error}; finished work is kept, run the same command again"
            ) from None


def read_ahead_until(file: Any, end: int) -> None:
    """Of a file that `open_input` gave, what lies behind `end` is not wanted unless it is asked for."""
    if isinstance(raw := getattr(file, "raw", None), RemoteInput):
        raw.wanted = end


@contextmanager
def open_input(path: Path | str, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A file of the input: on a disk, or behind a URL. Raises OSError, UserError."""
    if is_url(path):
        with RemoteInput(str(path), folder) as raw, io.BufferedReader(raw, BLOCK // 8) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def _size_of(files: RemoteFiles, name: str) -> tuple[dict[str, Any], int]:
    """What a store says of a file, and how long it is."""
    info = _asked(lambda: files.info(name), files.address(name))
    if info.get("size") is None:
        raise UserError(f"{files.address(name)}: the server does not say how long it is; fetch it first")
    return info, int(info["size"])


def _asked(ask: Any, where: str) -> Any:
    """The answer of a store; UserError where it has none."""
    try:
        return ask()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
