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


_BLOCK = 1 << 16
"""Bytes read at a time from the end of a file of records."""


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

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """The records of a step, last one first, found from the end; none if the file cannot be read."""
        found = []
        with suppress(OSError), self._path.open("rb") as file:
            for _, line in lines_backwards(file):
                record = _record(line)
                if record is not None and record["step"] < step:
                    break
                if record is not None and record["step"] == step:
                    found.append(record)
        return found

    def close(self) -> None:
        """Nothing is written afterwards."""
        if self._file is not None:
            self._file.close()


def drop_after(path: Path, step: int) -> None:
    """Make a file of records, whose steps do not fall, end at `step`; begin it if it is not there.

    Only what is dropped is read: the file is cut in place. Damaged lines at its end go too. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        write_atomically(path, "")
        return
    with file:
        end, whole = 0, True
        for start, line in lines_backwards(file):
            record = _record(line)
            if record is not None and record["step"] <= step:
                end, whole = start + len(line), line.endswith(b"\n")
                break
        if end < file.seek(0, os.SEEK_END):
            file.truncate(end)
        if not whole:  # cut off between the record and the end of its line
            file.seek(end)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def steps_of(path: Path) -> Iterator[dict[str, Any]]:
    """The records of steps in a run's log, in order; not those of evaluations, nor damaged lines. Raises
    OSError."""
    with path.open("rb") as file:
        for line in file:
            record = _record(line)
            if record is not None and "evaluation" not in record:
                yield record


def lines_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline if it has one) of a file from its last line to its first."""
    start, tail, size = file.seek(0, os.SEEK_END), b"", _BLOCK
    while start > 0:
        step = min(size, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
        lines = [line + b"\n" for line in tail.split(b"\n")]
        lines[-1] = lines[-1][:-1]
        if not lines[-1]:
            lines.pop()
        # The first may have begun before this block.
        tail, at = lines[0], start + len(tail)
        for line in reversed(lines[1:]):
            at -= len(line)
            yield at, line
        size = _BLOCK if len(lines) > 1 else 2 * size
    if tail:
        yield 0, tail


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None of a damaged one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # of which UnicodeDecodeError is one
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
