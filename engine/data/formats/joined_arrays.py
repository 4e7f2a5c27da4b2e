"""Joined arrays: what the files beside the shards of a data set say, in one file that processes share.

    NAME in the node cache: the arrays, one after another, each of them of all shards in their order

Of a large data set one process of a machine reads and checks the shards' files. Every process maps the
result, so memory holds the pages that are looked at, once a machine. Of a small one each process holds all.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from millrace.engine.util.node_cache import VARIABLE, cached_file

log = logging.getLogger(__name__)

_THREADS = 16
"""Files looked at a time; where they are far away, waiting for them is all that opening does."""


class Column(NamedTuple):
    """One of the arrays."""

    dtype: np.dtype
    """Those whose elements are aligned more widely come first."""
    starts: np.ndarray
    """(shards + 1,) int64: element at which each shard begins, and the end."""


def joined_arrays(
    name: str,
    what: str,
    columns: Sequence[Column],
    read: Callable[[int], Sequence[np.ndarray]],
    mapped: bool,
) -> list[np.ndarray]:
    """The arrays of `columns`, which cannot be written.

    Args:
        name: of the file, with the digest of all that it is made from.
        what: the data set and what of it is joined, for a warning where no file can be written.
        read: what the shard of a number has of each column; from several threads.
        mapped: whether to map a file.

    Raises what `read` raises.
    """
    shards, sizes = len(columns[0].starts) - 1, [int(c.starts[-1]) * c.dtype.itemsize for c in columns]
    begins = np.cumsum([0, *sizes]).tolist()

    def views(data: np.ndarray) -> list[np.ndarray]:
        bounds = zip(begins, begins[1:], columns, strict=False)
        return [data[begin:end].view(column.dtype) for begin, end, column in bounds]

    def write(file: BinaryIO) -> None:
        """Memory holds a few shards' at a time."""
        file.truncate(begins[-1])

        def join(number: int) -> None:
            for begin, column, values in zip(begins, columns, read(number), strict=False):
                _put(file, values, begin + int(column.starts[number]) * column.dtype.itemsize)

        each(join, shards)

    if mapped:
        try:
            path = cached_file(name, begins[-1], write)
            return views(np.memmap(path, np.uint8, "r").view(np.ndarray))
        except OSError as error:
            log.warning(
                "%s cannot be kept for all processes of this machine: %s; each holds its own, set %s to a "
                "folder on a local disk",
                what,
                error,
                VARIABLE,
            )
    data = np.empty(begins[-1], np.uint8)
    arrays = views(data)

    def fill(number: int) -> None:
        for array, column, values in zip(arrays, columns, read(number), strict=True):
            array[column.starts[number] : column.starts[number + 1]] = values

    each(fill, shards)
    data.flags.writeable = False
    return views(data)


def each(action: Callable[[int], None], count: int) -> None:
    """`action` of the numbers below `count`, some at a time; the error of the first that has one."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(action, range(count)):
            pass


def _put(file: BinaryIO, values: np.ndarray, at: int) -> None:
    data = memoryview(values.tobytes())
    while data:
        written = os.pwrite(file.fileno(), data, at)
        data, at = data[written:], at + written
