"""Joined index: the rows of all shards of a data set as two arrays, which the processes of a machine share.

    NAME.index in the node cache: (N,) of ROW, then (N,) <i4 buckets, for the N samples in their order

Of a large data set, and of one in a bucket, one process of a machine reads and checks the shards' indexes;
every process maps the result, so opening costs the manifest alone, and memory holds the pages that are looked
at, once a machine. Of a small one on a disk each process keeps the rows themselves.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from millrace.engine.data.formats.byte_store import ByteStore, Place, open_store
from millrace.engine.data.formats.shard_index import ROW, Manifest, Shard, read_index
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256
from millrace.engine.util.node_cache import VARIABLE, cached_file

log = logging.getLogger(__name__)

MAPPED_ROWS = 1 << 16
"""From so many samples on the index is mapped; fewer are read in less time than a lock takes."""
_VERSION = 1
"""Of the joined file."""
_THREADS = 16
"""Files looked at a time; where they are far away, waiting for them is all that opening does."""


class JoinedIndex(NamedTuple):
    """Arrays that cannot be written."""

    rows: np.ndarray
    """(N,) of ROW."""
    bucket_of: np.ndarray
    """(N,) int32: index into the manifest's buckets of every sample."""


def open_index(place: Place, manifest: Manifest) -> JoinedIndex:
    """The index of all samples. Raises UserError for an index that is not the manifest's."""
    store, samples = open_store(place), manifest.samples
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    if samples >= MAPPED_ROWS or store.is_remote:
        name, middle = f"{index_digest(manifest)}.index", samples * ROW.itemsize
        try:
            path = cached_file(name, middle + 4 * samples, lambda file: _write(file, store, manifest, starts))
            joined = np.memmap(path, np.uint8, "r").view(np.ndarray)
            return JoinedIndex(joined[:middle].view(ROW), joined[middle:].view("<i4"))
        except OSError as error:
            log.warning(
                "%s: its index cannot be kept for all processes of this machine: %s; each holds its own, set "
                "%s to a folder on a local disk",
                store.root,
                error,
                VARIABLE,
            )
    rows = np.empty(samples, ROW)

    def read(number: int) -> None:
        rows[starts[number] : starts[number + 1]] = read_index(store, manifest.shards[number])

    _each(read, len(manifest.shards))
    bucket_of = np.concatenate([_buckets(manifest, shard) for shard in manifest.shards])
    rows.flags.writeable = bucket_of.flags.writeable = False
    return JoinedIndex(rows, bucket_of)


def index_digest(manifest: Manifest) -> str:
    """SHA-256 over what the joined index is made from: the checksums of the shards' indexes, in order."""
    lines = [
        f"{shard.index_sha256} {shard.samples} {shard.bucket} {shard.bytes}\n" for shard in manifest.shards
    ]
    return sha256(f"{_VERSION} {ROW.descr}\n{''.join(lines)}".encode())


def check_sizes(place: Place, manifest: Manifest) -> None:
    """Raises UserError for a tar that is not there or has another size than the manifest says."""
    store = open_store(place)

    def check(number: int) -> None:
        shard = manifest.shards[number]
        path = store.where(shard.file)
        try:
            size = store.size(shard.file)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read: {error.strerror}; restore it or run millrace prepare again"
            ) from None
        if size is not None and size != shard.bytes:
            raise UserError(
                f"{path}: has {size} bytes, the manifest says {shard.bytes}; "
                "restore it or run millrace prepare again"
            )

    _each(check, len(manifest.shards))


def _write(file: BinaryIO, store: ByteStore, manifest: Manifest, starts: np.ndarray) -> None:
    """Join the indexes of the shards; memory holds a few shards' at a time."""
    file.truncate(int(starts[-1]) * (ROW.itemsize + 4))

    def join(number: int) -> None:
        shard, start = manifest.shards[number], int(starts[number])
        _put(file, read_index(store, shard), start * ROW.itemsize)
        _put(file, _buckets(manifest, shard), int(starts[-1]) * ROW.itemsize + start * 4)

    _each(join, len(manifest.shards))


def _put(file: BinaryIO, values: np.ndarray, at: int) -> None:
    data = memoryview(values.tobytes())
    while data:
        written = os.pwrite(file.fileno(), data, at)
        data, at = data[written:], at + written


def _buckets(manifest: Manifest, shard: Shard) -> np.ndarray:
    return np.full(shard.samples, manifest.buckets.index(shard.bucket), "<i4")


def _each(action: Callable[[int], None], count: int) -> None:
    """`action` of the numbers below `count`, some at a time; the error of the first that has one."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(action, range(count)):
            pass
