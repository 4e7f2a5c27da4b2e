"""Shard source: any sample of a folder of shards, from any thread, by reading its bytes alone.

`millrace prepare` makes such folders; `shard_index.py` has their layout. Nothing is kept of what was read but
a few open files.
"""

import errno
import json
import logging
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakSet

import numpy as np
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.formats.joined_index import check_sizes, open_index
from millrace.engine.data.formats.shard_index import Manifest, digests_of, read_keys, read_manifest
from millrace.engine.data.sources.pictures import (
    Captions,
    OpenSource,
    Source,
    UnreadablePicture,
    decode_picture,
)
from millrace.engine.distributed import process_group
from millrace.engine.util.descriptors import raise_limit
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_file
from millrace.engine.util.transient import retried

log = logging.getLogger(__name__)

OPEN_SHARE = 0.5
"""Of the files that a process may have open, those that all its sources keep."""
_OPENING_THREADS = 16
"""Shards whose records are read at a time."""


class Record(NamedTuple):
    """What a shard holds of one sample."""

    picture: bytes
    """A JPEG file."""
    key: str
    captions: Captions
    width: int
    """Of the original, in pixels."""
    height: int


class ShardsSource:
    """The samples of a folder that `millrace prepare` has made, in the order of its manifest.

    Every record carries a CRC-32: one that is damaged raises UnreadablePicture, from `captions` too, and its
    key is then its place. Raises UserError for a folder that is not complete or whose files do not fit its
    manifest. With `verify` the SHA-256 of each tar is computed when it is first touched; UserError where it
    differs.
    """

    def __init__(self, root: str | Path, verify: bool = False) -> None:
        self._root, self._verify = Path(root), verify
        self.root = self._root
        """Folder of the data set."""
        self.manifest: Manifest = read_manifest(root)
        shards = self.manifest.shards
        if process_group.local_rank() == 0:  # once a machine: the others would ask for the same
            check_sizes(self._root, self.manifest)
        self._rows, self.bucket_of = open_index(self._root, self.manifest)
        """`bucket_of` is (N,) int32: index into `buckets` of every sample."""
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.buckets: tuple[tuple[int, int], ...] = self.manifest.buckets
        """(h, w) in pixels, sorted."""
        self.digest: str = self.manifest.digest
        """Which samples these are and their order, by the checksums of the manifest."""
        self._files = _OpenFiles()
        self._last = threading.local()
        self._verified: dict[int, threading.Lock | None] = {i: threading.Lock() for i in range(len(shards))}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._root, self._verify)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> tuple[int, int]:
        """(number of the shard in the manifest, row in it) of a sample."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def stored_size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of the stored picture."""
        row = self._rows[index]
        return int(row["width"]), int(row["height"])

    def stored_sizes(self, indices: np.ndarray) -> np.ndarray:
        """(n, 2) int64: the same of many."""
        rows = self._rows[indices]
        return np.stack([rows["width"], rows["height"]], 1).astype(np.int64)

    def key(self, index: int) -> str:
        try:
            return self.record(index).key
        except UnreadablePicture:
            return self._name(index)

    def key_alone(self, index: int) -> str:
        """As `key`, of a record whose checksum is not computed because its picture is not read."""
        shard, row = self.place(index)[0], self._rows[index]
        offset, size = int(row["json_offset"]), int(row["json_bytes"])
        try:
            return str(json.loads(retried(lambda: self._files.read(self._path(shard), offset, size)))["key"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return self._name(index)

    def key_digests(self) -> Iterator[np.ndarray]:
        """(n, 2) uint64, `key_digest` of the keys of each shard, in order; where a shard was made without
        them, from its records."""
        count = sum(shard.samples for shard in self.manifest.shards if shard.keys_sha256 is None)
        if count:
            log.info(
                "%s: keys of %d samples are read from its tars; a data set that is prepared now has them in "
                "an index",
                self._root,
                count,
            )
        numbers = range(len(self.manifest.shards))
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            for first in numbers[::_OPENING_THREADS]:  # as many at a time, so that memory is bounded
                yield from threads.map(self._digests_of, numbers[first : first + _OPENING_THREADS])

    def _digests_of(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        if shard.keys_sha256 is not None:
            return read_keys(self._root, shard)
        places = range(*self._starts[number : number + 2].tolist())
        return digests_of(self.key_alone(place) for place in places)

    def captions(self, index: int) -> Captions:
        """Raises UnreadablePicture where the record is damaged."""
        return self.record(index).captions

    def encoded(self, index: int) -> bytes:
        """The stored JPEG file. Raises UnreadablePicture where the record is damaged, its JSON included."""
        return self.record(index).picture

    def image(self, index: int) -> Image.Image:
        where = self._where(index)
        image = decode_picture(self.record(index).picture, where)
        if image.size != self.stored_size(index):
            raise UnreadablePicture(
                where, f"{image.width}x{image.height} pixels, not the {self.stored_size(index)} of the index"
            )
        return image

    def record(self, index: int) -> Record:
        """Everything of a sample, in one read. Raises UnreadablePicture where it is damaged."""
        # Key, captions and picture of a sample are asked for one after another in the same thread.
        last: tuple[int, Record] | None = getattr(self._last, "record", None)
        if last is None or last[0] != index:
            last = self._last.record = index, self._read(index)
        return last[1]

    def _read(self, index: int) -> Record:
        shard, _ = self.place(index)
        row = self._rows[index]
        start, end = int(row["picture_offset"]), int(row["json_offset"]) + int(row["json_bytes"])
        if self._verify:
            self._check_shard(shard)
        try:
            data = retried(lambda: self._files.read(self._path(shard), start, end - start))
        except OSError as error:
            raise UnreadablePicture(self._where(index), error.strerror or str(error)) from None
        if len(data) != end - start:
            raise UnreadablePicture(self._where(index), "the tar file ends before it")
        picture = data[: int(row["picture_bytes"])]
        record = data[int(row["json_offset"]) - start :]
        if zlib.crc32(record, zlib.crc32(picture)) != int(row["crc32"]):
            raise UnreadablePicture(self._where(index), "its bytes are not those that were written (CRC-32)")
        try:
            values = json.loads(record)
            captions = Captions(values["long"], values["short"])
            return Record(picture, values["key"], captions, values["width"], values["height"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UnreadablePicture(self._where(index), "its JSON is not that of a sample") from None

    def _check_shard(self, number: int) -> None:
        """Compare the checksum of a tar, once; other threads that want the shard wait for it."""
        lock = self._verified[number]
        if lock is None:
            return
        with lock:
            if self._verified[number] is not None:
                shard, path = self.manifest.shards[number], self._path(number)
                try:
                    found = sha256_file(path)
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror}; restore it") from None
                if found != shard.sha256:
                    raise UserError(
                        f"{path}: its SHA-256 is not that of the manifest; restore it or run millrace "
                        "prepare again"
                    )
                self._verified[number] = None

    def _path(self, shard: int) -> Path:
        return self._root / self.manifest.shards[shard].file

    def _name(self, index: int) -> str:
        shard, row = self.place(index)
        return f"{self.manifest.shards[shard].file}#{row}"

    def _where(self, index: int) -> str:
        return f"{self._root / self._name(index)}"


class _Descriptor:
    """An open file that closes when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class _OpenFiles:
    """The files that were read last. A file that leaves stays open as long as a thread reads from it.

    Those of all sources share what the process may have open.
    """

    _all: ClassVar[WeakSet[Self]] = WeakSet()

    def __init__(self) -> None:
        self._all.add(self)
        self._budget = int(raise_limit() * OPEN_SHARE)
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file. Raises OSError."""
        file = self._get(path)
        try:
            data = os.pread(file.number, size, offset)
            while data and len(data) < size:  # a signal or a network file system may cut a read short
                more = os.pread(file.number, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError:
            with self._lock:  # a stale handle stays stale: open the file anew when it is tried again
                if self._open.get(path) is file:
                    del self._open[path]
            raise
        return data

    def _get(self, path: Path) -> _Descriptor:
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


def _open(part: Data | Part, data: Data) -> Source:
    return ShardsSource(part.path, data.verify)


ENTRY: OpenSource = _open
