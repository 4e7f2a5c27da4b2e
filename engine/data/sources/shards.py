"""Shard source: any sample of a data set of shards, from any thread, by reading its bytes alone.

`millrace prepare` makes such folders, on a disk or copied to a bucket; `shard_index.py` has their layout, and
`byte_store.py` is where their bytes lie.
"""

import json
import logging
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part, Remote
from millrace.engine.data.formats.byte_store import ByteStore, Span, open_store
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
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_file

log = logging.getLogger(__name__)

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
    """The samples of a data set that `millrace prepare` has made, in the order of its manifest.

    Every record carries a CRC-32: one that is damaged raises UnreadablePicture, from `captions` too, and its
    key is then its place. Raises UserError for a data set that is not complete or whose files do not fit its
    manifest, and from reading where a remote store cannot be reached. With `verify` the SHA-256 of each tar
    is computed when it is first touched; UserError where it differs.

    Args:
        root: a folder, or a URL for fsspec.
        remote: how a URL is read; None is the defaults.
    """

    def __init__(self, root: str | Path, verify: bool = False, remote: Remote | None = None) -> None:
        self._store: ByteStore = open_store(root, remote)
        self._verify, self._remote = verify, remote
        self.root: Path | str = self._store.root
        """Folder or URL of the data set."""
        self.ahead = self._store.ahead
        """Samples that `read_ahead` should be told of before they are read; 0 where it does nothing."""
        if verify and self._store.is_remote:
            raise UserError(
                f"{self.root}: data.verify reads whole files, which for those of a bucket would be each of "
                "them once a process; set it to false: the CRC-32 of every sample is compared anyway"
            )
        self.manifest: Manifest = read_manifest(self._store)
        shards = self.manifest.shards
        if process_group.local_rank() == 0:  # once a machine: the others would ask for the same
            check_sizes(self._store, self.manifest)
        self._store.expect(sum(shard.bytes for shard in shards))
        self._rows, self.bucket_of = open_index(self._store, self.manifest)
        """`bucket_of` is (N,) int32: index into `buckets` of every sample."""
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.buckets: tuple[tuple[int, int], ...] = self.manifest.buckets
        """(h, w) in pixels, sorted."""
        self.digest: str = self.manifest.digest
        """Which samples these are and their order, by the checksums of the manifest."""
        self._last = threading.local()
        self._verified: dict[int, threading.Lock | None] = {i: threading.Lock() for i in range(len(shards))}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self._verify, self._remote)

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
        try:
            return str(json.loads(self._store.read(self._record_span(index)))["key"])
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
                self.root,
                count,
            )
        numbers = range(len(self.manifest.shards))
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            for first in numbers[::_OPENING_THREADS]:  # as many at a time, so that memory is bounded
                yield from threads.map(self._digests_of, numbers[first : first + _OPENING_THREADS])

    def _digests_of(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        if shard.keys_sha256 is not None:
            return read_keys(self._store, shard)
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

    def read_ahead(self, indices: Sequence[int], keys: bool = False) -> None:
        """Begin to read samples that will be asked for, each once and in about this order; with `keys` those
        of which `key_alone` will be."""
        self._store.read_ahead(map(self._record_span if keys else self._span, indices))

    def forget_ahead(self) -> None:
        """Nobody asks for what was read ahead."""
        self._store.forget()

    def _span(self, index: int) -> Span:
        """Both files of a sample."""
        shard, row = self.manifest.shards[self.place(index)[0]], self._rows[index]
        start, end = int(row["picture_offset"]), int(row["json_offset"]) + int(row["json_bytes"])
        return Span(shard.file, start, end - start, shard.sha256, shard.bytes, partial(_is_sound, row))

    def _record_span(self, index: int) -> Span:
        """The JSON of a sample."""
        shard, row = self.manifest.shards[self.place(index)[0]], self._rows[index]
        start, size = int(row["json_offset"]), int(row["json_bytes"])
        return Span(shard.file, start, size, shard.sha256, shard.bytes, _is_json)

    def _read(self, index: int) -> Record:
        span = self._span(index)
        if self._verify:
            self._check_shard(self.place(index)[0])
        try:
            data = self._store.read(span)
        except OSError as error:
            raise UnreadablePicture(self._where(index), error.strerror or str(error)) from None
        if len(data) != span.size:
            raise UnreadablePicture(self._where(index), "the tar file ends before it")
        row = self._rows[index]
        picture, record = _files_of(row, data)
        if not _is_sound(row, data):
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
                shard = self.manifest.shards[number]
                path = self._store.where(shard.file)
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

    def _name(self, index: int) -> str:
        shard, row = self.place(index)
        return f"{self.manifest.shards[shard].file}#{row}"

    def _where(self, index: int) -> str:
        return self._store.where(self._name(index))


def _files_of(row: np.void, data: bytes) -> tuple[bytes, bytes]:
    """Picture and JSON of a sample, in what its span holds."""
    return data[: int(row["picture_bytes"])], data[int(row["json_offset"]) - int(row["picture_offset"]) :]


def _is_sound(row: np.void, data: bytes) -> bool:
    """Whether the span of a sample holds the bytes that were written."""
    picture, record = _files_of(row, data)
    return zlib.crc32(record, zlib.crc32(picture)) == int(row["crc32"])


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _open(part: Data | Part, data: Data) -> Source:
    return ShardsSource(part.path, data.verify, data.remote)


ENTRY: OpenSource = _open
