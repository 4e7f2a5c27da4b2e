"""Folder input: samples of a folder of pictures with caption files beside them, as `FolderSource` reads it.

What that source refuses in one line is here one reject among many, and reading goes on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from millrace.engine.data.names import Entry
from millrace.engine.data.prepare.settings import readable
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.reject_reasons import Reject, Rejected
from millrace.engine.data.sample_files import read_caption_files, read_picture_file


def read_entries(root: Path, entries: Sequence[Entry]) -> Iterator[RawSample | Reject]:
    """Samples and rejects of `entries`, in order."""
    for entry in entries:
        key, path = readable(entry.path), root / entry.path
        try:
            if entry.problem:
                raise Rejected(entry.reason, entry.problem)
            captions = read_caption_files(path, entry.captions)
            yield RawSample(key, read_picture_file(path), captions)
        except Rejected as problem:
            yield Reject(key, problem.reason, readable(problem.detail))
