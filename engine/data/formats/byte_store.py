"""Byte store: where the files of a data set lie, which is a folder or a place that fsspec knows.

    folder                     `LocalFiles`: reads at offsets of files that stay open
    s3:// gs:// hf:// https:// `remote/remote_store.py`: requests for ranges, asked for ahead, kept on disk

Files are named by their path in the data set, such as `768x1344/00000.tar`.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self
from weakref import WeakSet

from millrace.engine.util.descriptors import raise_limit
from millrace.engine.util.files import is_url
from millrace.engine.util.transient import retried

if TYPE_CHECKING:
    from millrace.engine.config.data import Remote

OPEN_SHARE = 0.5
"""Of the files that a process may have open, those that all its stores keep."""


class Span(NamedTuple):
    """Bytes of a file that are read together."""

    file: str
    offset: int
    size: int
    digest: str
    """SHA-256 of the file, by which copies are named."""
    file_size: int
    """Bytes of the file."""
    sound: Callable[[bytes], bool]
    """Whether bytes are those that were written."""


class ByteStore(Protocol):
    """The files of a data set, read from any thread."""

    root: Path | str
    """The folder, or the URL without a slash at its end."""
    is_remote: bool
    ahead: int
    """Samples that should be asked for before they are read; 0 where that gains nothing."""

    def where(self, file: str) -> str:
        """A file, or a place in one, for messages."""

    def size(self, file: str) -> int | None:
        """Bytes of a file; None where the store does not say. Raises OSError, UserError."""

    def whole(self, file: str) -> bytes:
        """A file. Raises OSError, UserError."""

    def read(self, span: Span) -> bytes:
        """Its bytes, fewer where the file ends before; sound, if any attempt gave such. Raises OSError, and
        UserError where the store cannot be reached."""

    def expect(self, size: int) -> None:
        """Samples will be read that take `size` bytes together."""

    def read_ahead(self, spans: Iterable[Span]) -> None:
        """Begin to read what will be asked for, each once and in about this order. Returns at once."""

    def forget(self) -> None:
        """Drop what was read ahead and nobody has asked for."""


Place = str | Path | ByteStore
"""A data set: its folder, its URL, or what is open of it."""


def open_store(place: Place, remote: "Remote | None" = None) -> ByteStore:
    """The files of a data set; `remote` has the settings for a URL. Raises UserError for a URL that nothing
    installed can read."""
    if not isinstance(place, str | Path):
        return place
    if not is_url(place):
        return LocalFiles(place)
    from millrace.engine.data.remote.remote_store import RemoteStore

    return RemoteStore(str(place), remote)


class LocalFiles:
    """Files of a folder."""

    is_remote = False
    ahead = 0

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._prefix = f"{self.root}{os.sep}"
        self.files = OpenFiles()

    def where(self, file: str) -> str:
        return f"{self.root / file}"

    def size(self, file: str) -> int:
        return (self.root / file).stat().st_size

    def whole(self, file: str) -> bytes:
        return (self.root / file).read_bytes()

    def read(self, span: Span) -> bytes:
        return retried(lambda: self.files.read(self._prefix + span.file, span.offset, span.size))

    def read_into(self, file: str, offset: int, buffer: memoryview) -> int:
        """As `OpenFiles.read_into`, tried again where that may help."""
        return retried(lambda: self.files.read_into(self._prefix + file, offset, buffer))

    def expect(self, size: int) -> None:
        """It makes no difference."""

    def read_ahead(self, spans: Iterable[Span]) -> None:
        """The system does."""

    def forget(self) -> None:
        """There is nothing."""


class _Descriptor:
    """An open file that closes when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class OpenFiles:
    """The files that were read last. A file that leaves stays open as long as a thread reads from it.

    Those of all stores share what the process may have open.
    """

    _all: ClassVar[WeakSet[Self]] = WeakSet()

    def __init__(self) -> None:
        self._all.add(self)
        self._budget = int(raise_limit() * OPEN_SHARE)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file. Raises OSError."""
        with self._using(path) as number:
            data = os.pread(number, size, offset)
            while data and len(data) < size:  # a signal or a network file system may cut a read short
                more = os.pread(number, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer of bytes from `offset`; how many there were before the end of the file. OSError."""
        done = 0
        with self._using(path) as number:
            while done < len(buffer) and (count := os.preadv(number, [buffer[done:]], offset + done)):
                done += count
        return done

    def close(self, path: str) -> None:
        """Open this file anew when it is read next."""
        with self._lock:
            self._open.pop(path, None)

    @contextmanager
    def _using(self, path: str) -> Iterator[int]:
        """The descriptor of a file."""
        file = self._get(path)
        try:
            yield file.number
        except OSError:
            # A stale handle stays stale: open the file anew when it is tried again.
            self._drop(path, file)
            raise

    def _drop(self, path: str, file: _Descriptor) -> None:
        with self._lock:
            if self._open.get(path) is file:
                del self._open[path]

    def _get(self, path: str) -> _Descriptor:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        try:
            file = _Descriptor(path)  # outside the lock: opening may wait for a network
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            with self._lock:  # others have taken what was left
                self._budget = max(1, len(self._open) // 2)
                self._open.clear()
            file = _Descriptor(path)
        with self._lock:
            self._open[path] = file
            self._open.move_to_end(path)
            while len(self._open) > max(1, self._budget // len(self._all)):
                self._open.popitem(last=False)
        return file
