"""WebDataset input: members of a tar that share a name, by the rule of `names`, in any order.

    000012.jpg 000012.txt          or .jpeg .png .webp, and .json as beside the pictures of a folder

A first pass reads the headers alone, so that a sample whose files lie far from each other is found, and one
whose mask sorts first. Memory holds a record for each member (about half a kilobyte), and of their data one
sample, of that only files that are not too large to be meant.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from millrace.engine.data.captions import captions_of, check_size
from millrace.engine.data.first_bytes import kind_of
from millrace.engine.data.names import Place, Role, is_hidden, places
from millrace.engine.data.prepare.settings import readable
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.prepare.tar_members import Damage, Member, members, read_member
from millrace.engine.data.reject_reasons import Reason, Reject, Rejected
from millrace.engine.data.remote.remote_input import open_input
from millrace.engine.data.sample_files import check_picture_size


def read_tar(path: Path | str, name: str, folder: Path | None = None) -> Iterator[RawSample | Reject]:
    """Samples and rejects of one tar, in the order of their first files; `name` comes before their keys.

    `folder` is for what is kept of a remote one while it is read. Raises UserError where that cannot be read.
    """
    try:
        with open_input(path, folder) as file:
            found = _index(file, name)
            file.seek(0)
            if all(isinstance(item, Reject) for item in found) and (kind := kind_of(file.read(512))):
                found = [Reject(name, Reason.CORRUPT_TAR, f"not a tar but {kind.name}")] if found else []
            for item in found:
                if isinstance(item, Reject):
                    yield item
                elif item.complete or not item.lost:
                    yield from item.outcome(file)
    except OSError as error:
        yield Reject(name, Reason.UNREADABLE_FILE, error.strerror or str(error))


class _Group:
    """Files of one sample, by their headers."""

    def __init__(self, stem: str, key: str) -> None:
        self.stem, self._key = stem, key
        self._picture: Member | None = None
        self._captions: dict[str, Member] = {}
        self._problem: Rejected | None = None
        self.lost = False
        """Whether bytes behind it are damaged: where it is not complete, their reject stands for both."""

    @property
    def complete(self) -> bool:
        """Whether it has a picture and a caption, or a reason why it is rejected anyway."""
        return self._problem is not None or (self._picture is not None and bool(self._captions))

    def repeats(self, place: Place) -> bool:
        """Whether this file begins another sample of the same name."""
        if place.role is Role.PICTURE:
            known = self._picture is not None and self._picture.name.lower().endswith(place.suffix)
        else:
            known = place.suffix in self._captions
        return known and self.complete

    def add(self, member: Member, place: Place) -> None:
        """Take a picture or a caption into this sample."""
        try:
            if _is_unsafe(member.name):
                raise Rejected(Reason.UNSAFE_NAME, f"{member.name!a} leads out of the folder")
            if not member.regular:
                raise Rejected(Reason.SPECIAL_FILE, f"{member.name!a} is a link, a device or sparse")
            if place.role is Role.UNREAD:
                what = place.suffix or "a name without suffix"
                raise Rejected(Reason.UNSUPPORTED_FORMAT, f"{what} is not read")
            if place.role is Role.PICTURE:
                if self._picture is not None:
                    raise Rejected(Reason.DUPLICATE_KEY, "several pictures have this name")
                self._picture = member
                check_picture_size(member.size)
            elif self._captions.setdefault(place.suffix, member) is not member:
                raise Rejected(Reason.DUPLICATE_KEY, "several captions have this name")
        except Rejected as problem:
            self._problem = self._problem or problem

    def outcome(self, file: BinaryIO) -> Iterator[RawSample | Reject]:
        """The sample, or why it is none."""
        try:
            if self._problem is not None:
                raise self._problem
            if self._picture is None:
                raise Rejected(Reason.MISSING_PICTURE, "there is a caption but no picture of its name")
            captions = captions_of(self._caption_files(file))
            yield RawSample(self._key, read_member(file, self._picture), captions)
        except Rejected as problem:
            yield Reject(self._key, problem.reason, problem.detail)

    def _caption_files(self, file: BinaryIO) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        unread: Rejected | None = None
        for suffix, member in self._captions.items():
            try:
                check_size(suffix[1:], member.size)
                found[suffix[1:]] = read_member(file, member)
            except Rejected as problem:
                if suffix == ".txt":
                    raise
                unread = problem  # it may be mere metadata beside a .txt
        if unread is not None and not found:
            raise unread
        return found


def _index(file: BinaryIO, name: str) -> list[_Group | Reject]:
    """Samples as their headers have them, and rejects for damage, in order."""
    there: list[Member | Damage] = []
    for item in members(file):
        if isinstance(item, Damage):
            there.append(item)
        else:
            member = item._replace(name=_without_dots(item.name))
            if _is_unsafe(member.name) or not member.regular or not is_hidden(member.name):
                there.append(member)
    where = iter(places([item.name for item in there if isinstance(item, Member)]))
    found = [item if isinstance(item, Damage) else (item, next(where)) for item in there]

    latest: dict[str, _Group] = {}
    last: _Group | None = None
    ordered: list[_Group | Reject] = []
    for item in found:
        if isinstance(item, Damage):
            within = ""
            if last is not None and not last.complete:
                within, last.lost = f" (within {last.stem})", True
            ordered.append(Reject(name, item.reason, item.detail + within))
            last = None
            continue
        member, place = item
        if place.role in (Role.AUXILIARY, Role.OTHER) and member.regular and not _is_unsafe(member.name):
            continue
        group = latest.get(place.stem)
        if group is None or group.repeats(place):
            group = latest[place.stem] = _Group(place.stem, f"{name}/{readable(place.stem)}")
            ordered.append(group)
        group.add(member, place)
        last = group
    return ordered


def _without_dots(name: str) -> str:
    """`./a.jpg` as `tar cf x.tar .` writes it -> `a.jpg`."""
    while name.startswith("./"):
        name = name[2:]
    return name


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")
