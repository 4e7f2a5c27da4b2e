"""Side channels: logs, grids and metrics may fail, and the training that they tell of goes on.

A full disk, a service that does not answer, a picture that cannot be drawn: the first failure of a channel is
a line, all are counted, and the numbers are said at the end. Whatever several ranks do together is not to be
put in here, unless all of them fail together.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

log = logging.getLogger(__name__)


class SideChannels:
    """Counts what failed beside the training; `say` shows a line."""

    def __init__(self, say: Callable[[str], None] = log.warning) -> None:
        self._say = say
        self.failures: Counter[str] = Counter()

    @contextmanager
    def tolerate(self, channel: str) -> Iterator[None]:
        """Any error inside ends the block and nothing else."""
        try:
            yield
        except Exception as error:
            self.failures[channel] += 1
            if self.failures[channel] == 1:
                line = f"{channel} failed: {_reason(error)}; training goes on, the rest is counted"
                self._say(f"warning: {line}")

    def summary(self) -> list[str]:
        """A line about all failures; none if there were none."""
        counts = ", ".join(f"{channel} {count}" for channel, count in self.failures.items())
        return [f"warning: failures beside the training: {counts}"] if counts else []


def _reason(error: Exception) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


class RecordFile:
    """A file of JSON records, one a line, for appending.

    Opened at `step`: later records of an existing file are dropped, they will be made again, and so is a last
    line that was cut off. Lines that a full disk refuses are kept and tried again with the next.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step
        self._file: BinaryIO | None = None
        self._waiting = b""

    def write(self, *records: dict[str, Any], sync: bool = False) -> None:
        """Append records; they are on their way to the disk when this returns, with `sync` on it. Raises
        OSError."""
        self._waiting += "".join(json.dumps(record) + "\n" for record in records).encode()
        if self._file is None:
            drop_after(self._path, self._step)
            self._file = self._path.open("ab", buffering=0)
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
        if sync:
            os.fsync(self._file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """The records of the file, up to a line that was cut off; none if it cannot be read."""
        with suppress(OSError):
            return records_of(self._path)
        return []

    def close(self) -> None:
        """Nothing is written afterwards."""
        if self._file is not None:
            self._file.close()


def drop_after(path: Path, step: int) -> None:
    """Make a file of records end at `step`, and begin it if it is not there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [record for record in records_of(path) if record["step"] <= step] if path.exists() else []
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def records_of(path: Path) -> list[dict[str, Any]]:
    """Records of a file up to a line that was cut off. Raises OSError."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
