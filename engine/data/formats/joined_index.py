"""Joined index: the rows of all shards of a data set as two arrays, which the processes of a machine share.

    NAME.index in the node cache: (N,) of ROW, then (N,) <i4 buckets, for the N samples in their order

Of a large data set, and of one in a bucket, they are mapped (`joined_arrays.py`), so opening costs the
manifest alone; of a small one on a disk each process keeps them.
"""

from typing import NamedTuple

import numpy as np

from millrace.engine.data.formats.byte_store import Place, open_store
from millrace.engine.data.formats.joined_arrays import Column, each, joined_arrays
from millrace.engine.data.formats.shard_index import ROW, Manifest, Shard, read_index
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256

MAPPED_ROWS = 1 << 16
"""From so many samples on the index is mapped; fewer are read in less time than a lock takes."""
_VERSION = 1
"""Of the joined file."""


class JoinedIndex(NamedTuple):
    """Arrays that cannot be written."""

    rows: np.ndarray
    """(N,) of ROW."""
    bucket_of: np.ndarray
    """(N,) int32: index into the manifest's buckets of every sample."""


def open_index(place: Place, manifest: Manifest) -> JoinedIndex:
    """The index of all samples. Raises UserError for an index that is not the manifest's."""
    store = open_store(place)
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    rows, bucket_of = joined_arrays(
        f"{index_digest(manifest)}.index",
        f"{store.root}: its index",
        (Column(ROW, starts), Column(np.dtype("<i4"), starts)),
        lambda number: _of_shard(store, manifest, manifest.shards[number]),
        mapped=manifest.samples >= MAPPED_ROWS or store.is_remote,
    )
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

    each(check, len(manifest.shards))


def _of_shard(store: Place, manifest: Manifest, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a shard, and the bucket of each."""
    return read_index(store, shard), np.full(shard.samples, manifest.buckets.index(shard.bucket), "<i4")
