"""WebDataset input: members of a tar that follow each other and share a name up to the suffix.

    000012.jpg 000012.txt          or .jpeg .png .webp, and .json as beside the pictures of a folder

Memory holds one sample, and of that only files that are not too large to be meant.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from millrace.engine.data.prepare.captions import LIMITS, captions_of, check_size
from millrace.engine.data.prepare.settings import readable
from millrace.engine.data.prepare.stored_sample import MAX_PICTURE_BYTES, RawSample
from millrace.engine.data.prepare.tar_members import Damage, Member, members, read_member
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.data.sources.folder import OTHER_PICTURES, PICTURES


def read_tar(path: Path, name: str) -> Iterator[RawSample | Reject]:
    """Samples and rejects of one tar in order; `name` comes before their keys."""
    try:
        with path.open("rb") as file:
            yield from _samples(file, name)
    except OSError as error:
        yield Reject(name, Reason.UNREADABLE_FILE, error.strerror or str(error))


def _samples(file: BinaryIO, name: str) -> Iterator[RawSample | Reject]:
    group: _Group | None = None
    for item in members(file):
        if isinstance(item, Damage):
            within = ""
            if group is not None:
                # What was begun may have lost a file to the damage; then one reject stands for both.
                if group.complete:
                    yield from group.outcome()
                else:
                    within = f" (within {group.stem})"
                group = None
            yield Reject(name, item.reason, item.detail + within)
            continue
        member = item._replace(name=_without_dots(item.name))
        if member.regular and _is_hidden(member.name):
            continue
        stem, suffix = _split(member.name, group)
        if group is None or group.stem != stem or group.repeats(suffix):
            if group is not None:
                yield from group.outcome()
            group = _Group(stem, f"{name}/{readable(stem)}")
        group.add(member, suffix, file)
    if group is not None:
        yield from group.outcome()


class _Group:
    """Files of one sample as they come."""

    def __init__(self, stem: str, key: str) -> None:
        self.stem, self._key = stem, key
        self.suffixes: set[str] = set()
        """Of the pictures and captions so far."""
        self._picture: bytes | None = None
        self._captions: dict[str, bytes] = {}
        self._problem: Rejected | None = None
        self._unread: Rejected | None = None

    @property
    def complete(self) -> bool:
        """Whether it has a picture and a caption, or a reason why it is rejected anyway."""
        has_caption = bool(self._captions) or self._unread is not None
        return self._problem is not None or (self._picture is not None and has_caption)

    def repeats(self, suffix: str) -> bool:
        """Whether a file with this suffix begins another sample of the same name."""
        return suffix in self.suffixes and self.complete

    def add(self, member: Member, suffix: str, file: BinaryIO) -> None:
        """Read a member of this sample, if it is of use."""
        is_picture = f".{suffix}" in PICTURES + OTHER_PICTURES
        try:
            if _is_unsafe(member.name):
                raise Rejected(Reason.UNSAFE_NAME, f"{member.name!a} leads out of the folder")
            if not member.regular:
                raise Rejected(Reason.SPECIAL_FILE, f"{member.name!a} is a link, a device or sparse")
            if not is_picture and suffix not in LIMITS:
                return  # other components of a sample: masks, classes, embeddings
            if suffix in self.suffixes or (is_picture and self._picture is not None):
                raise Rejected(Reason.DUPLICATE_KEY, "several pictures or captions have this name")
            self.suffixes.add(suffix)
            if suffix in LIMITS:
                self._add_caption(member, suffix, file)
            elif f".{suffix}" in OTHER_PICTURES:
                raise Rejected(Reason.UNSUPPORTED_FORMAT, f".{suffix} is not read")
            elif member.size > MAX_PICTURE_BYTES:
                raise Rejected(Reason.PICTURE_TOO_LARGE, f"the file has {member.size} bytes")
            else:
                self._picture = read_member(file, member)
        except Rejected as problem:
            self._problem = self._problem or problem

    def _add_caption(self, member: Member, suffix: str, file: BinaryIO) -> None:
        try:
            check_size(suffix, member.size)
            self._captions[suffix] = read_member(file, member)
        except Rejected as problem:
            if suffix == "txt":
                raise
            self._unread = problem  # it may be mere metadata beside a .txt

    def outcome(self) -> Iterator[RawSample | Reject]:
        """The sample, or why it is none; nothing for files that belong to no sample."""
        try:
            if self._problem is not None:
                raise self._problem
            if self._picture is None:
                if not self.suffixes:
                    return
                raise Rejected(Reason.MISSING_PICTURE, "there is a caption but no picture of its name")
            if self._unread is not None and not self._captions:
                raise self._unread
            yield RawSample(self._key, self._picture, captions_of(self._captions))
        except Rejected as problem:
            yield Reject(self._key, problem.reason, problem.detail)


def _without_dots(name: str) -> str:
    """`./a.jpg` as `tar cf x.tar .` writes it -> `a.jpg`."""
    while name.startswith("./"):
        name = name[2:]
    return name


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _is_hidden(name: str) -> bool:
    """What systems leave behind: `.DS_Store`, `._0001.jpg`."""
    return name.rpartition("/")[2].startswith(".") and not _is_unsafe(name)


def _split(name: str, group: _Group | None) -> tuple[str, str]:
    """(name of the sample, suffix in lower case).

    As in WebDataset the suffix begins at the first dot of the file's name. Only where that would make a
    picture or caption of no sample the last dot decides: `IMG.2024.jpg` is a picture, but `0001.mask.png`
    after `0001.jpg` belongs to it.
    """
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    stem, suffix = folder + slash + stem, suffix.lower()
    last = suffix.rpartition(".")[2]
    if last != suffix and (f".{last}" in PICTURES + OTHER_PICTURES or last in LIMITS):
        belongs = group is not None and group.stem == stem and group.suffixes
        if not belongs:
            return name[: -len(last) - 1], last
    return stem, suffix
