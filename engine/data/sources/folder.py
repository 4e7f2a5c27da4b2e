"""Folder source: pictures in a folder, each with its caption in a file of the same name beside it.

    cats/0001.jpg   cats/0001.txt     one caption, used as long and short
    cats/0002.webp  cats/0002.json    {"long": "...", "short": "..."} or {"caption": "..."}

Every caption is read and checked when the folder is opened, so a run does not fail on one a day later;
pictures are decoded when their turn comes.
"""

import json
import os
from pathlib import Path
from typing import NoReturn

from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.sources.pictures import Captions, OpenSource, Source, read_file, read_picture
from millrace.engine.util.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# Refused by name: skipping them would train on less than the user put in the folder.
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif")


class FolderSource:
    """Pictures (.jpg .jpeg .png .webp) below `root`, links followed, in order of their relative path.

    Raises UserError for a folder that is missing or holds no pictures, for pictures of other formats, and for
    captions that are missing, empty, ambiguous, not UTF-8 or not the JSON described above.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        if not self._root.is_dir():
            raise UserError(f"{root}: no such folder; set data.path to a folder of pictures with captions")
        found = dict(sorted(_walk(self._root)))
        if not found:
            raise UserError(f"{root}: no pictures in this folder; it needs {' '.join(PICTURES)} files")
        self._keys = list(found)
        self._captions = [read_captions(path) for path in found.values()]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def captions(self, index: int) -> Captions:
        return self._captions[index]

    def image(self, index: int) -> Image.Image:
        return read_picture(self._root / self._keys[index])

    def encoded(self, index: int) -> bytes | None:
        """The file of a picture; None where its name is not a JPEG's. Raises UnreadablePicture."""
        path = self._root / self._keys[index]
        return read_file(path) if path.suffix.lower() in (".jpg", ".jpeg") else None


def _walk(root: Path) -> list[tuple[str, Path]]:
    """(relative path of the picture, path of its caption file) of every picture below `root`, in no order."""
    found: list[tuple[str, Path]] = []
    seen: set[str] = set()
    for name, _, files in os.walk(root, followlinks=True, onerror=_refuse):
        folder = Path(name)
        real = os.path.realpath(folder)
        if real in seen:
            raise UserError(f"{folder}: a link to a folder that is read already; remove the link")
        seen.add(real)
        captions: dict[str, list[str]] = {}
        for file in files:
            stem, suffix = _split(file)
            if suffix in (".txt", ".json"):
                captions.setdefault(stem, []).append(file)
        for file in files:
            stem, suffix = _split(file)
            if suffix in OTHER_PICTURES:
                raise UserError(
                    f"{folder / file}: {suffix} is not read; convert it to .png or .jpg or remove it"
                )
            if suffix in PICTURES:
                beside = captions.get(stem, [])
                if len(beside) != 1:
                    has = " and ".join(sorted(beside)) if beside else f"neither {stem}.txt nor {stem}.json"
                    raise UserError(f"{folder / file}: has {has} beside it; give it one caption file")
                found.append(((folder / file).relative_to(root).as_posix(), folder / beside[0]))
    return found


def _split(file: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(file)
    return stem, suffix.lower()


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be listed: {error.strerror}; correct or remove it")


def read_captions(path: Path) -> Captions:
    """Captions of one .txt or .json file, white space around them removed. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the caption as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct or replace it") from None
    if path.suffix.lower() == ".txt":
        caption = _checked(text, path, "the caption")
        return Captions(caption, caption)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}; correct it") from None
    names = set(values) & {"long", "short", "caption"} if isinstance(values, dict) else set()
    if names == {"caption"}:
        caption = _checked(values["caption"], path, '"caption"')
        return Captions(caption, caption)
    if names == {"long", "short"}:
        return Captions(_checked(values["long"], path, '"long"'), _checked(values["short"], path, '"short"'))
    raise UserError(f'{path}: write it as {{"long": "...", "short": "..."}} or as {{"caption": "..."}}')


def _checked(value: object, path: Path, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{path}: {name} is a {type(value).__name__}; make it text")
    caption = value.strip()
    if not caption:
        raise UserError(f"{path}: {name} is empty; write one or remove the picture")
    return caption


def _open(part: Data | Part, _data: Data) -> Source:
    return FolderSource(part.path)


ENTRY: OpenSource = _open
