"""MDS shard files (MosaicML streaming): their indexes, and the columns of one sample as they are stored.

The library's own readers are used, one for each shard. They read where the file lies: no copy, no shared
memory, no other process.
"""

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from millrace.engine.config.data import Columns
from millrace.engine.data.names import is_hidden
from millrace.engine.util.errors import UserError
from millrace.engine.util.transient import retried

IMAGE = ("image", "jpg", "jpeg", "img")
LONG = ("caption_long", "long_caption", "long", "caption", "captions", "prompt", "text")
SHORT = ("caption_short", "short_caption", "short", "caption", "captions", "prompt", "text")
"""Columns that are taken where `data.columns` names none: the first that is there."""
FILES = ("bytes", "jpeg", "png")
"""Encodings of a picture that store a whole file."""
PIXELS = "pil"
"""The encoding that stores mode, size and pixels."""


class Library(NamedTuple):
    """What is used of mosaicml-streaming."""

    reader_from_json: Callable[[str, None, dict[str, Any]], Any]
    reader: type
    decode: Callable[[str, bytes], Any]
    is_hash: Callable[[str], bool]
    hash: Callable[[str, bytes], str]


class DamagedSample(Exception):
    """The stored bytes are not those of a sample."""


@dataclass(frozen=True)
class Shard:
    """One shard; `image`, `long` and `short` are the places of these columns among all."""

    path: Path
    reader: Any
    image: int
    long: int
    short: int

    @property
    def encoding(self) -> str:
        """How the picture is stored: one of FILES, or PIXELS."""
        return self.reader.column_encodings[self.image]

    def read(self, row: int) -> list[bytes]:
        """All columns of sample `row`. Raises DamagedSample."""
        try:
            data = retried(lambda: self.reader.get_sample_data(row))
            sizes = self.reader.column_sizes
            at = 4 * sum(not size for size in sizes)
            stored = iter(np.frombuffer(data[:at], np.uint32).tolist())
            columns = []
            for size in sizes:
                length = size or next(stored)
                columns.append(data[at : at + length])
                at += length
        except OSError as error:
            raise DamagedSample(error.strerror or str(error)) from error
        except (ValueError, IndexError, StopIteration) as error:
            raise DamagedSample("the shard is damaged here") from error
        if at != len(data):
            raise DamagedSample(f"the shard is damaged here: {len(data)} bytes that should be {at}")
        return columns


class Hashes:
    """Compares each shard with the hashes in its index when it is first read, in any thread."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._checked: set[Path] = set()
        self._lock = threading.Lock()

    def check(self, shard: Shard) -> None:
        """Raises UserError for a shard that differs, or whose index has no hashes."""
        if shard.path in self._checked:
            return
        with self._lock:
            if shard.path in self._checked:
                return
            hashes = shard.reader.raw_data.hashes
            if not hashes:
                raise UserError(
                    f"{shard.path}: its index has no hashes; set data.verify to false, or write the data set "
                    "with MDSWriter(hashes=['xxh64'])"
                )
            data = shard.path.read_bytes()
            for name, expected in hashes.items():
                if not self._library.is_hash(name):
                    raise UserError(f"{shard.path}: its index has a hash {name!r} that is unknown here")
                if self._library.hash(name, data) != expected:
                    raise UserError(f"{shard.path}: its {name} is not that in its index; copy it again")
            self._checked.add(shard.path)


def indexes_below(root: Path) -> list[Path]:
    """The indexes of a data set: `index.json` or `*_index.json` in the folder, or `index.json` in every
    folder in it; sorted."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set data.path to a folder of MDS shards")
    for pattern in ("index.json", "*_index.json", "*/index.json"):
        found = [path for path in root.glob(pattern) if not is_hidden(path.relative_to(root).as_posix())]
        if found:
            return sorted(found)
    raise UserError(f"{root}: neither index.json nor folders with one; set data.path to MDS shards")


def open_index(path: Path, columns: Columns, library: Library) -> tuple[list[Shard], Any]:
    """Shards of one index that have samples, and what the index says. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        readers = [library.reader_from_json(str(path.parent), None, entry) for entry in content["shards"]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct it") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: not an index of MDS shards ({error!r}); write the data set again") from None
    if any(not isinstance(reader, library.reader) for reader in readers):
        raise UserError(f"{path}: its shards are not MDS; write them with streaming.MDSWriter")
    readers = [reader for reader in readers if reader.samples]
    if not readers:
        raise UserError(f"{path}: lists no samples; remove the folder or write the data set again")
    return [_shard(reader, path, columns) for reader in readers], content


def _shard(reader: Any, index: Path, columns: Columns) -> Shard:
    path = index.parent / reader.raw_data.basename
    try:
        size = path.stat().st_size
    except OSError as error:
        packed = reader.zip_data and index.parent / reader.zip_data.basename
        if packed and packed.is_file():
            raise UserError(
                f"{packed}: compressed with {reader.compression}; unpack it to {path.name} beside it"
            ) from None
        raise UserError(f"{path}: {error.strerror}, but {index.name} lists it; copy it again") from None
    if size != reader.raw_data.bytes:
        raise UserError(f"{path}: {size} bytes, but {index.name} says {reader.raw_data.bytes}; copy it again")
    image = _place(reader, index, "image", columns.image, IMAGE, (*FILES, PIXELS))
    long = _place(reader, index, "long", columns.long, LONG, ("str",))
    short = _place(reader, index, "short", columns.short, SHORT, ("str",), other=long)
    return Shard(path, reader, image, long, short)


def _place(
    reader: Any,
    index: Path,
    role: str,
    name: str | None,
    usual: tuple[str, ...],
    encodings: tuple[str, ...],
    other: int | None = None,
) -> int:
    """Which column is the picture or a caption; `other` if none is named and none of the usual is there."""
    names = reader.column_names
    there = [column for column in ((name,) if name else usual) if column in names]
    if not there and not name and other is not None:
        return other
    has = ", ".join(f"{a} ({b})" for a, b in zip(names, reader.column_encodings, strict=True))
    if not there:
        wanted = f"no column {name!r}" if name else f"none of the columns {', '.join(usual)}"
        raise UserError(f"{index}: {wanted}; set data.columns.{role} to one of these: {has}")
    place = names.index(there[0])
    if reader.column_encodings[place] not in encodings:
        raise UserError(
            f"{index}: column {there[0]!r} is stored as {reader.column_encodings[place]!r}, not as "
            f"{' or '.join(encodings)}; set data.columns.{role} to another one of these: {has}"
        )
    return place


def load_library() -> Library:
    """Import mosaicml-streaming; raises UserError where it is missing.

    The top of the library imports its ready-made vision data sets, and they torchvision, which has no build
    for a torch without CUDA. None of them is needed here.
    """
    name = "streaming.vision"
    left_out = name not in sys.modules
    if left_out:
        sys.modules[name] = ModuleType(name)
    try:
        from streaming.base.format import reader_from_json
        from streaming.base.format.mds import MDSReader
        from streaming.base.format.mds.encodings import mds_decode
        from streaming.base.hashing import get_hash, is_hash
    except ImportError as error:
        raise UserError(
            f"data.source mds: {error}; pip install --no-deps mosaicml-streaming==0.13.0, then "
            "pip install --editable '.[mds]'"
        ) from None
    finally:
        if left_out:
            del sys.modules[name]
    return Library(reader_from_json, MDSReader, mds_decode, is_hash, get_hash)
