"""Caption store: keys and captions of a folder's pictures as bytes, in memory or in a mapped file.

    NAME.captions in the node cache:
        UTF-8 of key, long, short of each picture, end to end; a short one that is the long one has no bytes
        (3 n + 1,) <i8 where each begins
        notes as a JSON list
        three <i8: n, begin of the offsets, begin of the notes

Of a large folder one process of a machine reads the caption files, and all map the result, also in later
runs: its name holds the names of all files, and size and times of change of those that are no pictures. The
others only list the folder. Memory holds the pages that are looked at, once a machine.
"""

import hashlib
import io
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from millrace.engine.data.captions import Captions
from millrace.engine.data.names import PICTURES
from millrace.engine.util.node_cache import VARIABLE, cached_file

log = logging.getLogger(__name__)

MAPPED_PICTURES = 1 << 10
"""From so many pictures on the captions are mapped: fewer files take as long to open as a lock does, also on
a shared file system, where an open costs half a millisecond and all processes ask at once."""
_VERSION = 1
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file that is changed again has another time of change, on any file system."""

Note = Callable[[int, str], None]
"""Takes a line for the user, and the level of its log record."""
Read = Callable[[Note], Iterator[tuple[str, Captions]]]
"""Reads a folder: key and captions of each picture."""


class CaptionStore:
    """Key and captions of each picture, from what `write_store` has written."""

    def __init__(self, data: np.ndarray) -> None:
        count, offsets, notes = data[-24:].view("<i8").tolist()
        self._data, self._count = data, count
        self._starts = data[offsets : offsets + 8 * (3 * count + 1)].view("<i8")
        said = json.loads(data[notes:-24].tobytes())
        self.notes: list[tuple[int, str]] = [(level, text) for level, text in said]
        """What reading the folder has said: level of the log record, and line."""

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        """Raises IndexError."""
        return self._text(index, 0)

    def captions(self, index: int) -> Captions:
        """Raises IndexError."""
        long = self._text(index, 1)
        return Captions(long, self._text(index, 2) or long)

    def _text(self, index: int, part: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(f"picture {index} of {self._count}")
        start, end = self._starts[3 * index + part : 3 * index + part + 2].tolist()
        return self._data[start:end].tobytes().decode(errors="surrogateescape")


def stored_captions(root: Path, read: Read) -> CaptionStore:
    """The captions of the folder `root`, by `read` unless a process of this machine has read them before.

    Raises what `read` raises.
    """
    state = folder_state(root)
    if state.pictures >= MAPPED_PICTURES and time.time_ns() - state.changed > _SETTLED:
        try:
            path = cached_file(f"{state.digest}.captions", None, lambda file: write_store(file, read))
            return CaptionStore(np.memmap(path, np.uint8, "r").view(np.ndarray))
        except OSError as error:
            log.warning(
                "%s: its captions cannot be kept for all processes of this machine: %s; each reads them all, "
                "set %s to a folder on a local disk",
                *(root, error, VARIABLE),
            )
    file = io.BytesIO()
    write_store(file, read)
    return CaptionStore(np.frombuffer(file.getbuffer(), np.uint8))


def write_store(file: BinaryIO, read: Read) -> None:
    """Write what a CaptionStore reads; memory holds 24 bytes a picture."""
    starts, at, notes = array("q", [0]), 0, list[tuple[int, str]]()
    for key, captions in read(lambda level, text: notes.append((level, text))):
        short = "" if captions.short == captions.long else captions.short
        for text in (key, captions.long, short):
            at += file.write(text.encode(errors="surrogateescape"))
            starts.append(at)
    offsets = at + file.write(bytes(-at % 8))
    file.write(np.array(starts, "<i8").tobytes())
    begin = offsets + 8 * len(starts)
    said = json.dumps(notes).encode()
    said += b" " * (-len(said) % 8)
    file.write(said)
    file.write(np.array([len(starts) // 3, offsets, begin], "<i8").tobytes())


class FolderState(NamedTuple):
    """What the captions of a folder depend on."""

    digest: str
    """SHA-256 of names, and of size and times of change of the files that are no pictures."""
    pictures: int
    """Files whose name is a picture's."""
    changed: int
    """Nanoseconds since 1970 of the latest change of a file that is no picture."""


def folder_state(root: Path) -> FolderState:
    """List a folder, links followed; what cannot be listed or looked at is left to whoever reads it."""
    digest, pictures, changed = hashlib.sha256(str(_VERSION).encode()), 0, 0
    folders, seen = [os.path.realpath(root)], set[Any]()
    while folders:
        folder = folders.pop()
        try:
            if (identity := os.stat(folder)[1:3]) in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            digest.update(f"{folder}: {error.errno}\n".encode(errors="surrogateescape"))
            continue
        for entry in entries:
            line = entry.path
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(PICTURES):
                pictures += 1
            else:
                try:
                    status = entry.stat()
                    line += f" {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
                    changed = max(changed, status.st_mtime_ns)
                except OSError as error:
                    line += f" {error.errno}"
            digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return FolderState(digest.hexdigest(), pictures, changed)
