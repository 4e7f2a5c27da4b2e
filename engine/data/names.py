"""File names: the one rule by which files become samples, in a folder as in a tar.

    cats/0001.jpg   cats/0001.txt   cats/0001.json    one sample: picture, caption, and metadata or captions
    cats/0001.mask.png   cats/0001.depth.png          auxiliary: they belong to cats/0001, wherever they sort
    cats/photo v1.3.jpg  cats/photo v1.3.txt          a sample: a caption of its own name is there
    ._0001.jpg   .thumbnails/0001.jpg                 left alone: what begins with a dot, file or folder

A name ends at its last dot, unless what comes before a dot further left is the name of a sample. Everything
else is a leftover, and every leftover has a reason.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from millrace.engine.data.reject_reasons import Reason

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_OTHERS = """
.gif .bmp .tif .tiff .avif .heic .heif .hif .jxl .jp2 .j2k .jpx .jfif .jpe .jif .jps .apng .mpo .tga .ico .psd
.svg .ppm .pgm .pnm .exr .hdr .dds .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf
"""
OTHER_PICTURES = frozenset(_OTHERS.split())
"""Pictures by their name that are not read: skipping them would train on less than is there."""
CAPTIONS = (".txt", ".json")


class Role(StrEnum):
    """What a file is to the sample that it is of."""

    PICTURE = "picture"
    CAPTION = "caption"
    UNREAD = "unread"
    """A picture of a format that is not read, or a file without suffix that a caption stands beside."""
    AUXILIARY = "auxiliary"
    """A part that is not used: a mask, a depth map, another text."""
    OTHER = "other"
    """Of no sample."""


class Place(NamedTuple):
    """Where a file belongs."""

    stem: str
    """Name of the sample, with its folder; of OTHER, its own name without suffix."""
    suffix: str
    """What follows, in lower case, with its dot; empty where there is none."""
    role: Role


def is_hidden(name: str) -> bool:
    """Whether a file of a relative path, or a folder on its way, begins with a dot: `._1.jpg`, `.git/x`."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def places(names: Sequence[str]) -> list[Place]:
    """Where each of the files belongs, given all of them; their order does not matter.

    Names are relative paths of files that are not hidden.
    """
    split = [_split(name) for name in names]
    captions = {stem for stem, suffix in split if suffix in CAPTIONS}
    pictures = {stem for stem, suffix in split if suffix in PICTURES or suffix in OTHER_PICTURES}
    found = []
    for stem, suffix in split:
        is_picture = suffix in PICTURES or suffix in OTHER_PICTURES
        is_caption = suffix in CAPTIONS
        whole = stem in captions and stem in pictures
        if not whole and (owner := _owner(stem, captions, pictures, is_caption)):
            found.append(Place(owner, stem[len(owner) :].lower() + suffix, Role.AUXILIARY))
        elif is_caption:
            found.append(Place(stem, suffix, Role.CAPTION))
        elif suffix in PICTURES:
            found.append(Place(stem, suffix, Role.PICTURE))
        elif is_picture or (not suffix and stem in captions and stem not in pictures):
            found.append(Place(stem, suffix, Role.UNREAD))
        elif stem in pictures:
            found.append(Place(stem, suffix, Role.AUXILIARY))
        else:
            found.append(Place(stem, suffix, Role.OTHER))
    return found


def _split(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def _owner(stem: str, captions: set[str], pictures: set[str], is_caption: bool) -> str | None:
    """The longest name before a dot of `stem`'s file that is a sample's: a caption needs its picture.

    What follows that dot begins with a letter, as `mask` does: `v1.3.jpg` is no part of `v1.jpg`.
    """
    folder, slash, file = stem.rpartition("/")
    while "." in file:
        file, _, part = file.rpartition(".")
        name = folder + slash + file
        if file and part[:1].isalpha() and (name in pictures or (name in captions and not is_caption)):
            return name
    return None


class Entry(NamedTuple):
    """A sample of a folder, or something in it that is none."""

    path: str
    """Of the picture, or of what is none, relative to the folder."""
    captions: tuple[str, ...]
    """Names of the caption files beside it."""
    problem: str = ""
    """Why there is nothing to read."""
    reason: Reason = Reason.UNREADABLE_FILE
    """The kind of problem."""


class Listing(NamedTuple):
    """All of a folder."""

    entries: list[Entry]
    """In order of their path."""
    left_alone: Counter[str]
    """Files that are of no use, by what they are."""

    def notes(self) -> list[str]:
        """For people: one line for what is left alone, or none."""
        if not self.left_alone:
            return []
        kinds = ", ".join(f"{count:,} {what}" for what, count in self.left_alone.most_common(8))
        more = len(self.left_alone) - 8
        return [f"left alone: {kinds}" + (f" and {more} other kinds" if more > 0 else "")]


def list_folder(root: Path) -> Listing:
    """Everything below `root`, links followed, without what begins with a dot."""
    found: list[Entry] = []
    left: Counter[str] = Counter()
    seen: set[str] = set()

    def unlisted(error: OSError) -> None:
        problem = f"cannot be listed: {error.strerror or error}"
        found.append(Entry(_relative(Path(error.filename), root), (), problem))

    for name, folders, files in os.walk(root, followlinks=True, onerror=unlisted):
        folder = Path(name)
        left["hidden"] += sum(map(is_hidden, (*files, *folders)))
        folders[:] = sorted(sub for sub in folders if not is_hidden(sub))  # not in the order of the disk
        real = os.path.realpath(folder)
        if real in seen:
            found.append(Entry(_relative(folder, root), (), "a link to a folder that is read already"))
            folders.clear()
            continue
        seen.add(real)
        names = sorted(file for file in files if not is_hidden(file))
        shards = {*folders, *(os.path.splitext(file)[0] for file in names if file.endswith(".parquet"))}
        prefix = "" if folder == root else f"{_relative(folder, root)}/"
        found += (entry._replace(path=prefix + entry.path) for entry in _entries(names, shards, left))
    return Listing(sorted(found), +left)


def _entries(names: list[str], shards: set[str], left: Counter[str]) -> Iterator[Entry]:
    """Samples and leftovers of one folder; what is left alone is added to `left`."""
    where = places(names)
    captions: dict[str, list[str]] = {}
    with_picture: set[str] = set()
    for file, place in zip(names, where, strict=True):
        if place.role is Role.CAPTION:
            captions.setdefault(place.stem, []).append(file)
        elif place.role in (Role.PICTURE, Role.UNREAD):
            with_picture.add(place.stem)
    forms = {_form(stem): files[0] for stem, files in captions.items() if not stem.isascii()}
    for file, place in zip(names, where, strict=True):
        match place.role:
            case Role.PICTURE if place.stem not in captions and (other := forms.get(_form(place.stem))):
                problem = f"its caption {other!a} spells the name in another Unicode form (NFC and NFD)"
                yield Entry(file, (), problem, Reason.MISSING_CAPTION)
            case Role.PICTURE:
                yield Entry(file, tuple(captions.get(place.stem, ())))
            case Role.UNREAD:
                beside = tuple(captions.get(place.stem, ()))
                yield Entry(file, beside, _unread(place.suffix), Reason.UNSUPPORTED_FORMAT)
            case Role.CAPTION if place.stem not in with_picture:
                if place.suffix == ".json" and place.stem.removesuffix("_stats") in shards:
                    left["_stats.json of img2dataset"] += 1
                else:
                    problem = "there is a caption but no picture of its name"
                    yield Entry(file, (), problem, Reason.MISSING_PICTURE)
            case Role.AUXILIARY:
                left[f"auxiliary {place.suffix or 'without suffix'}"] += 1
            case Role.OTHER:
                left[place.suffix or "without suffix"] += 1


def _form(stem: str) -> str:
    """A name as other systems may spell it: macOS takes accents off their letters, Linux does not."""
    return unicodedata.normalize("NFC", stem)


def _unread(suffix: str) -> str:
    return f"{suffix} is not read" if suffix else "a name without suffix is not read"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
