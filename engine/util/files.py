"""Atomic writes, and SHA-256 digests of bytes, files and JSON.

Every file that the engine makes is written here, with one guarantee: under its name a reader finds the file
as it was before or the new one whole, also after a kill or a power cut, and never a part of it. Its
permissions are those of the umask.
"""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from millrace.engine.util.errors import UserError

TEMPORARY = ".tmp"
"""How names of files end that are being written, and that a killed process leaves behind."""


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and vanishes when it raises.

    The bytes go to a temporary file in the same folder, under a name that no other process or thread has, on
    any host. The order is fsync of the file, rename, fsync of the folder.

    Args:
        path: in a folder that exists.
        sync: without it there is no fsync, and after a power cut the file may be empty. For files that are
            written in the training step and can be made again.

    Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    # Not tempfile: its files are readable by their owner alone, and stay so after the rename.
    file = open(temporary, "xb")  # noqa: SIM115 - closed before the rename
    try:
        with file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_atomically(path: str | Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write a file of these bytes, or of this text in UTF-8, as `atomic_file` does. Raises OSError."""
    with atomic_file(path, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def is_url(path: str | Path) -> bool:
    """Whether this is for fsspec and no path: it has a scheme."""
    return "://" in str(path)


def require_apart(source_name: str, source: str | Path, output_name: str, output: str | Path) -> None:
    """Raises UserError where what is written would lie in the folder that is read, or the reverse."""
    read, written = (Path(os.path.realpath(path)) for path in (source, output))
    if read == written or read in written.parents or written in read.parents:
        where = "is" if read == written else "lies in" if read in written.parents else "holds"
        raise UserError(
            f"{output_name} {output} {where} {source_name} {source}: what is written would be read as data; "
            f"choose a folder outside of it"
        )


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` (files created, removed, renamed) survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and FUSE file systems know no fsync of folders
            raise
    finally:
        os.close(descriptor)


def sha256(data: bytes | memoryview | Iterable[bytes | memoryview]) -> str:
    """Hexadecimal SHA-256 of bytes, or of chunks of bytes one after the other."""
    digest = hashlib.sha256()
    for chunk in [data] if isinstance(data, bytes | memoryview) else data:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, in bounded memory. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value as JSON, in which the order of keys does not matter."""
    return sha256(json.dumps(value, sort_keys=True).encode())


class HashingFile:
    """A binary file that is read or written from its start to its end, and hashed on the way.

    Attributes:
        bytes: that have passed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, which counts bytes."""
        self._file.write(data)
        self._pass(data)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end of the file."""
        data = self._file.read(size)
        self._pass(data)
        return data

    def sha256(self) -> str:
        """Of the bytes that have passed."""
        return self._digest.hexdigest()

    def _pass(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.bytes += len(data)
