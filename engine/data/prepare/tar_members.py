"""Tar reader that survives damage: the members of a tar file one after another.

Python's tarfile takes a header that is damaged for the end of the archive and says nothing; here damage is an
item of its own and reading goes on at the next header that is whole. Nothing is ever extracted. Headers of
one block are parsed by tarfile; this file knows what follows what, and bounds what is read.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from millrace.engine.data.formats.shard_index import BLOCK, padded
from millrace.engine.data.reject_reasons import Reason

MAX_NAME_BYTES = 2**16
"""Of a GNU long name or a pax header; a path has at most 4096 bytes."""
_SCAN = 2**20


class Member(NamedTuple):
    """A file, link, device or anything else that is no folder."""

    name: str
    """Bytes that are no UTF-8 as surrogates."""
    offset: int
    """Of its data in the tar."""
    size: int
    """Bytes of data."""
    regular: bool
    """Whether it is a file with content of its own."""


class Damage(NamedTuple):
    """A part of the tar from which nothing can be had."""

    reason: Reason
    detail: str


def members(file: BinaryIO) -> Iterator[Member | Damage]:
    """Members in order, folders left out. Raises OSError where the file cannot be read."""
    size = file.seek(0, os.SEEK_END)
    offset, ended, extra = 0, False, _Extra()
    while offset + BLOCK <= size:
        block = _read(file, offset, BLOCK)
        if not any(block):
            offset, ended = offset + BLOCK, True
            continue
        ended = False
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.InvalidHeaderError("the size is negative")
            start = offset + BLOCK
            length = header.size if extra.size is None else extra.size
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX):
                if header.size > MAX_NAME_BYTES:
                    raise tarfile.InvalidHeaderError(f"a name of {header.size} bytes")
                length = header.size
            elif not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
                length = 0  # links, folders and devices have no data, whatever their size says
        except (tarfile.HeaderError, ValueError) as error:
            found = _next_header(file, offset + BLOCK, size)
            yield Damage(Reason.CORRUPT_TAR, f"damaged from byte {offset} to {found} of {size}: {error}")
            offset, extra, ended = found, _Extra(), found == size
            continue
        if start + length > size:
            name = ascii(extra.name or header.name)
            yield Damage(
                Reason.TRUNCATED_TAR, f"ends within {name}, {start + length - size} bytes are missing"
            )
            return
        offset = start + padded(length)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            extra.name = _read(file, start, length).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extra.take_pax(_read(file, start, length))
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if header.type != tarfile.DIRTYPE:
                regular = header.isreg() and header.type != tarfile.GNUTYPE_SPARSE and not extra.sparse
                yield Member(extra.name or header.name, start, length, regular)
            extra = _Extra()
    if not ended:
        yield Damage(Reason.TRUNCATED_TAR, f"ends at byte {size} without the two empty blocks of an end")


def read_member(file: BinaryIO, member: Member) -> bytes:
    """All data of a member."""
    return _read(file, member.offset, member.size)


_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class _Extra:
    """What headers before a member's own say of it."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.sparse = False

    def take_pax(self, data: bytes) -> None:
        """Records of the form b"30 path=..." + newline, the number being the length of the whole."""
        while data:
            digits, _, _ = data.partition(b" ")
            if not digits.isdigit() or not len(digits) < int(digits[:9]) <= len(data):
                return
            record, data = data[: int(digits[:9])], data[int(digits[:9]) :]
            key, _, value = record[len(digits) + 1 :].rstrip(b"\n").partition(b"=")
            if key == b"path":
                self.name = value.decode("utf-8", "surrogateescape")
            elif key == b"size" and value.isdigit() and len(value) < 19:
                self.size = int(value)
            elif key.startswith(b"GNU.sparse"):
                self.sparse = True


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise OSError(None, "the file became shorter while it was read")
    return data


def _next_header(file: BinaryIO, offset: int, size: int) -> int:
    """Where the next block begins that is a whole header or, if there is none, the end of the file."""
    while offset + BLOCK <= size:
        chunk = _read(file, offset, min(_SCAN, (size - offset) // BLOCK * BLOCK))
        for start in range(0, len(chunk), BLOCK):
            block = chunk[start : start + BLOCK]
            if block[257:262] == b"ustar":
                try:
                    tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                    return offset + start
                except (tarfile.HeaderError, ValueError):
                    continue
        offset += len(chunk)
    return size
