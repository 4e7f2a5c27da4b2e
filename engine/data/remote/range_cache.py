"""Range cache: parts of remote files that were read, on a local disk, within a bound, for all processes.

    FOLDER/<SHA-256 of the file>    a sparse file: what was read lies where it lies in the original
    FOLDER/used                     bytes that all of them take at most, as text; its lock is held to write

Which ranges are there is written nowhere: whoever reads has checksums, and a hole does not have them. So a
process may be killed in the middle of a write, and a disk may lose bytes; neither is seen by anybody but the
reader, who reads the original again. When the bound is reached, the files that were not read for longest are
emptied; a file is a few hundred megabytes, so that is soon done and rarely.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from millrace.engine.data.formats.byte_store import OpenFiles

log = logging.getLogger(__name__)

FILLED = 0.95
"""Share of the bound that is filled; the rest is for what a file system keeps of fragments."""
EMPTIED = 0.9
"""Share of what may be filled that is left when files are emptied."""
TOUCHED = 1.0
"""Seconds between notes that a file is in use."""
_BLOCK = 4096
_USED = "used"


class RangeCache:
    """Ranges of files, by their digests. Any thread and process may use the same folder.

    Raises OSError where `folder` cannot be written. Later, an error in writing ends writing, with a warning.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._most = int(limit * FILLED)
        self._files = OpenFiles()
        self._touched: dict[str, float] = {}
        self._writing = threading.Lock()  # threads of a process: a lock of a file is the process's
        self.closed = False
        """Whether an error has ended writing."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            self._set_used(self._measured())

    @property
    def used(self) -> int:
        """Bytes that are taken at most."""
        with self._locked():
            return self._get_used()

    def get(self, digest: str, offset: int, size: int, sound: Callable[[bytes], bool]) -> bytes | None:
        """A range of a file, if it is there and `sound`."""
        path = str(self.folder / digest)
        try:
            data = self._files.read(path, offset, size)
        except OSError:
            return None
        if len(data) < size or not sound(data):
            return None
        now = time.monotonic()
        if now - self._touched.get(digest, 0.0) > TOUCHED:
            self._touched[digest] = now
            with suppress(OSError):
                os.utime(path)
        return data

    def put(self, ranges: list[tuple[str, int, bytes]]) -> None:
        """Keep (digest of the file, offset, bytes)."""
        if self.closed or not ranges:
            return
        needed = sum(_blocks(offset, data) for _, offset, data in ranges)
        try:
            with self._locked():
                used = self._get_used()
                if used + needed > self._most:
                    used = self._make_room(needed)
                if used + needed > self._most:
                    return
                self._set_used(used + needed)  # first: a process may be killed while it writes
                for digest in {digest for digest, _, _ in ranges}:
                    self._write(
                        str(self.folder / digest), [(at, data) for of, at, data in ranges if of == digest]
                    )
        except OSError as error:
            self.closed = True
            log.warning("%s: no more samples are kept: %s", self.folder, error.strerror or error)

    def _write(self, path: str, ranges: list[tuple[int, bytes]]) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for offset, data in ranges:
                rest = memoryview(data)
                while rest:
                    written = os.pwrite(descriptor, rest, offset)
                    rest, offset = rest[written:], offset + written
        finally:
            os.close(descriptor)
        # A file of this name that was emptied since may be open still; it is another.
        self._files.close(path)

    def _make_room(self, needed: int) -> int:
        """Empty files until `needed` bytes fit; bytes that the others take."""
        used, found = 0, []
        for entry in os.scandir(self.folder):
            if entry.name == _USED:
                continue
            with suppress(OSError):
                status = entry.stat()
                used += status.st_blocks * 512
                found.append((status.st_mtime_ns, status.st_blocks * 512, entry.path))
        if used + needed > self._most:
            for _, size, path in sorted(found):
                if used + needed <= self._most * EMPTIED:
                    break
                with suppress(FileNotFoundError):
                    os.truncate(path, 0)  # frees what others have open
                    os.unlink(path)
                    used -= size
        self._set_used(used)
        return used

    def _measured(self) -> int:
        blocks = 0
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                blocks += entry.stat().st_blocks if entry.name != _USED else 0
        return blocks * 512

    def _get_used(self) -> int:
        try:
            return int((self.folder / _USED).read_text())
        except (OSError, ValueError):
            return self._measured()

    def _set_used(self, used: int) -> None:
        (self.folder / _USED).write_text(str(used))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._writing:
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)


def _blocks(offset: int, data: bytes) -> int:
    """Bytes of the blocks that a range touches: what it takes on a disk at most."""
    end = offset + len(data)
    return (end + _BLOCK - 1) // _BLOCK * _BLOCK - offset // _BLOCK * _BLOCK
