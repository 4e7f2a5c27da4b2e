"""Folder input: samples of a folder of pictures with a caption file beside each, as `FolderSource` reads it.

What that source refuses in one line is here one reject among many, and reading goes on.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from millrace.engine.data.prepare.captions import captions_of, check_size
from millrace.engine.data.prepare.settings import readable
from millrace.engine.data.prepare.stored_sample import MAX_PICTURE_BYTES, RawSample
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.data.sources.folder import OTHER_PICTURES, PICTURES


class Entry(NamedTuple):
    """A picture of the folder, or a folder that cannot be read."""

    path: str
    """Relative to the folder."""
    captions: tuple[str, ...]
    """Names of the caption files beside it."""
    problem: str = ""
    """Why there is nothing to read."""


def list_folder(root: Path) -> list[Entry]:
    """All pictures below `root`, links followed, in order of their relative path."""
    found: list[Entry] = []
    seen: set[str] = set()

    def unlisted(error: OSError) -> None:
        found.append(Entry(_relative(Path(error.filename), root), (), error.strerror or str(error)))

    for name, folders, files in os.walk(root, followlinks=True, onerror=unlisted):
        folder = Path(name)
        folders.sort()  # which of several links to one folder is read must not depend on the disk
        real = os.path.realpath(folder)
        if real in seen:
            found.append(Entry(_relative(folder, root), (), "a link to a folder that is read already"))
            folders.clear()
            continue
        seen.add(real)
        captions: dict[str, list[str]] = {}
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in (".txt", ".json"):
                captions.setdefault(stem, []).append(file)
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in PICTURES + OTHER_PICTURES:
                beside = tuple(sorted(captions.get(stem, ())))
                found.append(Entry(_relative(folder / file, root), beside))
    return sorted(found)


def read_entries(root: Path, entries: list[Entry]) -> Iterator[RawSample | Reject]:
    """Samples and rejects of `entries`, in order."""
    for entry in entries:
        key = readable(entry.path)
        try:
            yield _read(root / entry.path, key, entry)
        except Rejected as problem:
            yield Reject(key, problem.reason, problem.detail)


def _read(path: Path, key: str, entry: Entry) -> RawSample:
    if entry.problem:
        raise Rejected(Reason.UNREADABLE_FILE, entry.problem)
    suffix = path.suffix.lower()
    if suffix in OTHER_PICTURES:
        raise Rejected(Reason.UNSUPPORTED_FORMAT, f"{suffix} is not read")
    if len(entry.captions) > 1:
        raise Rejected(Reason.AMBIGUOUS_CAPTION, f"has {' and '.join(map(readable, entry.captions))}")
    files = {}
    for name in entry.captions:
        kind = Path(name).suffix.lower()[1:]
        files[kind] = read_file(path.with_name(name), kind)
    captions = captions_of(files)
    return RawSample(key, read_file(path), captions)


def read_file(path: Path, caption: str = "") -> bytes:
    """Bytes of a file that is one, and not too large: a picture or, with its suffix, a caption file.

    Raises Rejected. Does not wait for pipes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected(Reason.SPECIAL_FILE, f"{readable(path.name)} is not a regular file")
            if caption:
                check_size(caption, status.st_size)
            elif status.st_size > MAX_PICTURE_BYTES:
                raise Rejected(Reason.PICTURE_TOO_LARGE, f"the file has {status.st_size} bytes")
            return file.read(MAX_PICTURE_BYTES)
    except OSError as error:
        raise Rejected(Reason.UNREADABLE_FILE, f"{readable(path.name)}: {error.strerror or error}") from None


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
