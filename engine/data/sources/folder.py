"""Folder source: pictures in a folder, each with its caption in a file of the same name beside it.

    cats/0001.jpg   cats/0001.txt     one caption, used as long and short
    cats/0002.webp  cats/0002.json    {"long": "...", "short": "..."} or {"caption": "..."}

Which files are samples is the rule of `names`, what their captions are that of `captions`, as in
`millrace prepare`. Every caption is read and checked when the folder is opened, so a run does not fail on one
a day later; of a large folder by one process of a machine (`caption_store`). Pictures are decoded when their
turn comes.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.formats.caption_store import Note, stored_captions
from millrace.engine.data.names import PICTURES, Entry, list_folder
from millrace.engine.data.prepare.settings import readable
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sample_files import read_caption_files, read_picture_file
from millrace.engine.data.sources.pictures import (
    Captions,
    OpenSource,
    Source,
    UnreadablePicture,
    decode_picture,
    upright_size,
)
from millrace.engine.util.errors import UserError

log = logging.getLogger(__name__)

_REMEDIES = {
    Reason.UNSUPPORTED_FORMAT: "convert it to .png or .jpg or remove it",
    Reason.EMPTY_CAPTION: "write one or remove the picture",
    Reason.MISSING_CAPTION: 'give it one caption, as text in a .txt or as {"caption": "..."} in a .json',
    Reason.AMBIGUOUS_CAPTION: "give it one caption",
    Reason.CAPTION_NOT_UTF8: "save the caption as UTF-8",
    Reason.CAPTION_NOT_JSON: 'write it as {"long": "...", "short": "..."} or as {"caption": "..."}',
    Reason.CAPTION_NOT_TEXT: "make it text",
    Reason.CAPTION_TOO_LONG: "shorten it",
}


class FolderSource:
    """Pictures (.jpg .jpeg .png .webp) below `root`, links followed, in order of their relative path.

    Raises UserError for a folder that is missing or holds no pictures, for pictures of other formats, and for
    captions that are missing, empty, ambiguous, or not text in the forms described above. Captions without a
    picture, auxiliary pictures and other files are counted in the log.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        if not self._root.is_dir():
            raise UserError(f"{root}: no such folder; set data.path to a folder of pictures with captions")
        self._samples = stored_captions(self._root, self._read_all)
        for level, note in self._samples.notes:
            log.log(level, "%s: %s", self._root, note)

    def _read_all(self, note: Note) -> Iterator[tuple[str, Captions]]:
        """Key and captions of each picture."""
        listing = list_folder(self._root)
        alone = [entry for entry in listing.entries if entry.reason is Reason.MISSING_PICTURE]
        found = [entry for entry in listing.entries if entry.reason is not Reason.MISSING_PICTURE]
        if not found and (self._root / "manifest.json").is_file():
            raise UserError(f"{self._root}: holds shards, not pictures; set data.source to shards")
        if not found:
            raise UserError(f"{self._root}: no pictures in this folder; it needs {' '.join(PICTURES)} files")
        for entry in found:
            yield entry.path, self._read(entry)
        if alone:
            said = f"{len(alone)} captions without a picture are left alone, such as {alone[0].path}"
            note(logging.WARNING, said)
        for said in listing.notes():
            note(logging.INFO, said)

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples.key(index)

    def captions(self, index: int) -> Captions:
        return self._samples.captions(index)

    def image(self, index: int) -> Image.Image:
        return decode_picture(self._file(index), str(self._root / self.key(index)))

    def encoded(self, index: int) -> bytes | None:
        """The file of a picture; None where its name is not a JPEG's. Raises UnreadablePicture."""
        is_jpeg = self.key(index).lower().endswith((".jpg", ".jpeg"))
        return self._file(index) if is_jpeg else None

    def header_size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of a picture that is not decoded. Raises UnreadablePicture."""
        return upright_size(self._file(index), str(self._root / self.key(index)))

    def _file(self, index: int) -> bytes:
        path = self._root / self.key(index)
        try:
            return read_picture_file(path)
        except Rejected as problem:
            raise UnreadablePicture(str(path), problem.detail, problem.reason) from None

    def _read(self, entry: Entry) -> Captions:
        path = self._root / entry.path
        try:
            if entry.problem:
                raise Rejected(entry.reason, entry.problem)
            return read_caption_files(path, entry.captions)
        except Rejected as problem:
            of_caption = len(entry.captions) == 1 and not entry.problem
            file = path.with_name(entry.captions[0]) if of_caption else path
            detail = problem.detail
            if problem.reason is Reason.MISSING_CAPTION and not entry.captions and not entry.problem:
                detail = f"has neither {path.stem}.txt nor {path.stem}.json beside it"
            remedy = _REMEDIES.get(problem.reason, "correct or remove it")
            if problem.reason is Reason.MISSING_CAPTION and entry.problem:
                remedy = "rename one of them"
            raise UserError(readable(f"{file}: {detail}; {remedy}")) from None


def _open(part: Data | Part, _data: Data) -> Source:
    return FolderSource(part.path)


ENTRY: OpenSource = _open
