"""Freeing: bytes of converted parts that are in shards go back to the disk while others are still packed.

    shard is there whole ──▶ KEY.rows becomes KEY.packed ──▶ holes in KEY.data

Otherwise the disk would hold everything twice at the end. A part's samples go to many shards, so its file is
not removed but gets holes, which ext4, XFS, Btrfs, ZFS, tmpfs, Lustre and NFS 4.2 have. A call after a kill
plans the same shards while the input is the same, and needs of a packed part what is in no shard yet; after
edits of the input packed parts are forgotten, and read again.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from millrace.engine.data.prepare.parts import PACKED, data_path, rows_path
from millrace.engine.data.prepare.shard_packing import Plan, PlannedShard
from millrace.engine.util.files import sync_folder, write_atomically

_BLOCK = 1 << 16
"""A whole number of any file system's blocks."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def forget_packed(work: Path, identity: str) -> None:
    """Remove the parts that were packed for another input; `identity` is that of this one."""
    marker, parts = work / "packing", work / "parts"
    if not marker.exists() or marker.read_text() == identity:
        return
    for path in parts.glob(f"*{PACKED}"):
        data_path(parts, path.stem).unlink(missing_ok=True)
        path.unlink()
    sync_folder(parts)
    marker.unlink()


def can_free(folder: Path) -> bool:
    """Whether files in `folder` can have holes."""
    path = folder / "holes"
    try:
        with path.open("wb") as file:
            file.write(bytes(2 * _BLOCK))
            file.flush()
            return _punch(file.fileno(), 0, _BLOCK)
    finally:
        path.unlink(missing_ok=True)


class Freeing:
    """What of the parts in `work` is needed no more; `plan` and `files` are those of the shards."""

    def __init__(self, plan: Plan, files: Sequence[Path], work: Path, identity: str) -> None:
        self._rows, self._files, self._parts = plan.rows, files, work / "parts"
        self._order = np.lexsort((plan.rows["offset"], plan.rows["file"]))
        self._file = plan.rows["file"][self._order]
        self._packed, self._new = np.zeros((2, len(plan.rows)), bool)
        write_atomically(work / "packing", identity)

    def free(self, shards: Sequence[PlannedShard]) -> None:
        """The samples of shards that are there whole. Raises OSError."""
        if not shards:
            return
        places = [slice(shard.first, shard.first + len(shard.rows)) for shard in shards]
        for place in places:
            self._packed[place] = self._new[place] = True
        numbers = np.unique(np.concatenate([shard.rows["file"] for shard in shards])).tolist()
        own = [number for number in numbers if self._files[number].parent == self._parts]
        before = [rows_path(self._parts, self._files[number].stem) for number in own]
        for path in before:
            if path.exists():
                path.replace(path.with_suffix(PACKED))
        sync_folder(self._parts)
        for number in own:
            self._punch_file(number)
        for place in places:
            self._new[place] = False

    def _punch_file(self, number: int) -> None:
        """Holes for what is newly packed of a file: one for packed samples that lie end to end, of which some
        may have theirs already, so that no block at their border stays."""
        start, end = np.searchsorted(self._file, [number, number + 1]).tolist()
        some = self._order[start:end]
        rows, packed = self._rows[some], self._packed[some]
        begins = rows["offset"]
        ends = begins + rows["picture_bytes"] + rows["record_bytes"]
        goes_on = packed[1:] & packed[:-1] & (begins[1:] == ends[:-1])
        first = packed & ~np.concatenate([[False], goes_on])
        last = packed & ~np.concatenate([goes_on, [False]])
        runs = np.unique(np.cumsum(first)[self._new[some]]) - 1
        begins, ends = begins[first][runs].tolist(), ends[last][runs].tolist()
        with self._files[number].open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            for begin, end in zip(begins, ends, strict=True):
                # Of the last block the part behind the end of the file belongs to it.
                _punch(file.fileno(), begin, end + _BLOCK if end == size else end)


def _punch(descriptor: int, begin: int, end: int) -> bool:
    """Make a hole in a file, of bytes that read as zeros; False where the file system has none. OSError."""
    if _fallocate()(descriptor, _KEEP_SIZE | _PUNCH_HOLE, begin, end - begin) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_HOLES:
        return False
    raise OSError(number, os.strerror(number))


@cache
def _fallocate() -> "ctypes._FuncPointer":
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function
