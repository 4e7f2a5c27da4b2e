"""Files of a sample in a folder: their bytes. No pipe is waited for, nothing too large is read."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from millrace.engine.data.captions import Captions, captions_of, check_size
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.util.transient import retried

MAX_PICTURE_BYTES = 256 * 2**20
"""Files above it are not read."""


def check_picture_size(size: int) -> None:
    """Raises Rejected for a picture of `size` bytes that is too large to be read."""
    if size > MAX_PICTURE_BYTES:
        raise Rejected(Reason.PICTURE_TOO_LARGE, f"the file has {size} bytes")


def read_picture_file(path: Path) -> bytes:
    """Bytes of a picture. Raises Rejected."""
    return _read(path, "")


def read_caption_files(picture: Path, names: Sequence[str]) -> Captions:
    """Captions of a picture out of the caption files with these names beside it. Raises Rejected."""
    files: dict[str, bytes] = {}
    unread: Rejected | None = None
    for name in names:
        kind = os.path.splitext(name)[1].lower()[1:]
        if kind in files:
            raise Rejected(Reason.AMBIGUOUS_CAPTION, f"has {' and '.join(map(ascii, names))}")
        try:
            files[kind] = _read(picture.with_name(name), kind)
        except Rejected as problem:
            if kind == "txt":
                raise
            unread = problem  # it may be mere metadata beside a .txt
    if unread is not None and "txt" not in files:
        raise unread
    return captions_of(files)


def _read(path: Path, caption: str) -> bytes:
    """`caption` is the suffix of a caption file."""
    try:
        return retried(lambda: _read_once(path, caption))
    except OSError as error:
        raise Rejected(Reason.UNREADABLE_FILE, f"{path.name}: {error.strerror or error}") from None


def _read_once(path: Path, caption: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected(Reason.SPECIAL_FILE, f"{path.name} is not a regular file")
        if caption:
            check_size(caption, status.st_size)
        else:
            check_picture_size(status.st_size)
        return file.read(MAX_PICTURE_BYTES)
