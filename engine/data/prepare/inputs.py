"""Input listing: what there is to read, cut into parts that are read one by one and in any order.

The order of parts depends on names alone; samples follow the order of their parts. What is read as a whole is
a unit: a picture of a folder with its caption files, a tar, a row group of a Parquet file. Its identity is a
hash of the names, sizes, modes and times of its files: mtime, and ctime, which no tool sets back; of a remote
file, of what its store says. So what has changed is known without reading a file.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from millrace.engine.data.names import OTHER_PICTURES, PICTURES, Entry, is_hidden, list_folder
from millrace.engine.data.prepare.folders import read_entries
from millrace.engine.data.prepare.parquet import TableShape, read_row_group, table_shape
from millrace.engine.data.prepare.settings import Settings, readable, relative
from millrace.engine.data.prepare.stored_sample import RawSample
from millrace.engine.data.prepare.tars import read_tar
from millrace.engine.data.reject_reasons import Reject, Rejected
from millrace.engine.data.remote.remote_input import RemoteFolder
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import is_url, sha256

PART_PICTURES = 256
"""Pictures of a part of a folder: what is read again after a kill."""
UNIT_BYTES = 16
_FOOTERS = 16
"""Parquet files whose footers are read at a time."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


class Part(NamedTuple):
    """A piece of the input that one process reads from its beginning to its end."""

    path: Path | str
    """A folder, a tar file or a Parquet file, or the URL of one of these files."""
    name: str
    """Of a file, relative to the input: keys begin with it."""
    weight: int
    """Share of the work: pictures, rows, or bytes of a tar."""
    units: bytes
    """Identities of its units in order, UNIT_BYTES each."""
    packed: bytes = b""
    """Pictures of a folder: pickled, since as objects those of a large folder would fill the memory."""
    group: int = 0
    """Row group of a Parquet file."""
    shape: TableShape | None = None
    """Of a Parquet file."""
    problem: Rejected | None = None
    """Why there is nothing to read."""

    @property
    def entries(self) -> list[Entry]:
        """Pictures of a folder, one a unit."""
        return pickle.loads(self.packed) if self.packed else []

    @property
    def key(self) -> str:
        """Identity of the part."""
        return hashlib.blake2b(self.units, digest_size=16).hexdigest()

    def unit(self, number: int) -> bytes:
        """Identity of a unit."""
        return self.units[number * UNIT_BYTES : (number + 1) * UNIT_BYTES]

    def only(self, numbers: list[int]) -> "Part":
        """The part with these of its units alone."""
        if len(numbers) * UNIT_BYTES == len(self.units):
            return self
        entries = self.entries
        units = b"".join(map(self.unit, numbers))
        return self._replace(
            units=units, packed=pickle.dumps([entries[i] for i in numbers]), weight=len(numbers)
        )


class Inputs(NamedTuple):
    """Everything that is to be read."""

    parts: list[Part]
    samples: int | None
    """How many inputs there are, or None where only reading tells: in tars."""
    digest: str
    """Of the identities of all units."""
    notes: list[str]
    """For people."""
    unit: str
    """What is read as a whole, for people."""
    size: int
    """Bytes of the files with pictures."""


def find_inputs(path: Path | str, settings: Settings) -> Inputs:
    """Parts of `path`: a folder of pictures, of tars or of Parquet files, or one such file. UserError.

    A URL is a str: a tar or a Parquet file, or what holds them. A text file lists URLs of such files.
    """
    if isinstance(path, str):
        return _remote(path, settings)
    if path.is_file():
        if path.suffix == ".txt":
            return _listed(path, settings)
        if path.suffix not in (".tar", ".parquet"):
            raise UserError(f"{path}: give a folder, a .tar or a .parquet file, or a .txt file of URLs")
        files = [path]
        if path.suffix == ".tar":
            return _tars(path.parent, files)
        return _local_tables(path.parent, files, settings)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or file")
    found = _by_suffix(path)
    pictures = [suffix for suffix in (*PICTURES, *OTHER_PICTURES) if suffix in found]
    _refuse_compressed(found)
    tables = found.get(".parquet", [])
    beside = [file for file in tables if file.with_suffix("").is_dir()]  # as img2dataset writes them
    if pictures and (".tar" in found or len(beside) < len(tables)):
        other = found.get(".tar") or [file for file in tables if file not in beside]
        raise UserError(
            f"{path}: holds pictures ({found[pictures[0]][0].name}) and {other[0].name}; "
            "prepare one kind at a time, from folders of their own"
        )
    if ".tar" in found:
        return _with_note(_tars(path, found[".tar"]), tables)
    if pictures:
        return _pictures(path)
    if tables:
        return _local_tables(path, tables, settings)
    raise UserError(f"{path}: holds no pictures ({' '.join(PICTURES)}), .tar or .parquet files")


def read_part(part: Part, folder: Path | None = None) -> Iterator[tuple[bytes, RawSample | Reject]]:
    """(unit, sample or reject) of a part in order; `folder` is for what is kept of a remote file meanwhile.

    Raises UserError where a remote file cannot be read.
    """
    if part.packed:
        for number, entry in enumerate(part.entries):
            for item in read_entries(part.path, [entry]):
                yield part.unit(number), item
        return
    for item in _read_file(part, folder):
        yield part.units, item


def _read_file(part: Part, folder: Path | None) -> Iterator[RawSample | Reject]:
    if part.problem is not None:
        yield Reject(part.name, part.problem.reason, part.problem.detail)
    elif part.shape is not None:
        yield from read_row_group(part.path, part.name, part.group, part.shape, folder)
    else:
        yield from read_tar(part.path, part.name, folder)


def _pictures(root: Path) -> Inputs:
    entries, _ = listing = list_folder(root)
    parts, size = [], 0
    for start in range(0, len(entries), PART_PICTURES):
        some = tuple(entries[start : start + PART_PICTURES])
        found = [_unit_of_picture(root, entry) for entry in some]
        size += sum(of_one for _, of_one in found)
        units = b"".join(unit for unit, _ in found)
        parts.append(Part(root, "", len(some), units, packed=pickle.dumps(some)))
    return Inputs(parts, len(entries), _digest(parts), listing.notes(), "pictures", size)


def _tars(root: Path, files: list[Path]) -> Inputs:
    parts = []
    for file in files:
        name = relative(file, root)
        parts.append(Part(file, name, max(1, file.stat().st_size), _unit(name, _status(file))))
    return Inputs(parts, None, _digest(parts), [], "tars", sum(part.weight for part in parts))


def _remote(url: str, settings: Settings) -> Inputs:
    """Tars or Parquet files behind a URL: one, or all below it."""
    url = url.rstrip("/")
    if url.endswith((".tar", ".parquet")):
        return _remote_files(*_parent(url), settings)
    folder = RemoteFolder(url)
    found: dict[str, list[str]] = {}
    for name in folder.names():
        if not any(map(is_hidden, name.split("/"))):
            found.setdefault(_suffix(name), []).append(name)
    _refuse_compressed(found, f"{url}/")
    if ".tar" in found:
        return _with_note(_remote_files(folder, found[".tar"], settings), found.get(".parquet", []))
    if pictures := [suffix for suffix in (*PICTURES, *OTHER_PICTURES) if suffix in found]:
        raise UserError(
            f"{url}: holds pictures ({found[pictures[0]][0]}), which are read from a disk: copy them, or put "
            "them into tars"
        )
    if ".parquet" in found:
        return _remote_files(folder, found[".parquet"], settings)
    raise UserError(f"{url}: holds no .tar or .parquet files")


def _listed(path: Path, settings: Settings) -> Inputs:
    """The URLs in the lines of a text file: tars or Parquet files, in one folder or below it."""
    try:
        urls = sorted({line.strip() for line in path.read_text("utf-8-sig").splitlines()} - {""})
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; give a text file of URLs") from None
    if not urls:
        raise UserError(f"{path}: lists nothing; write a URL of a .tar or .parquet file in each line")
    suffix = ".tar" if urls[0].endswith(".tar") else ".parquet"
    for url in urls:
        if not is_url(url) or not url.endswith(suffix):
            raise UserError(f"{path}: lists {readable(url)!r}, which is no URL of a {suffix} file")
    if len(urls) == 1:
        return _remote_files(*_parent(urls[0]), settings)
    folders = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    common = "/".join(some[0] for some in takewhile(lambda some: len(set(some)) == 1, folders))
    if not common.partition("://")[2]:
        raise UserError(
            f"{path}: {urls[0]} and {urls[-1]} have no folder in common; prepare each place by itself"
        )
    return _remote_files(RemoteFolder(common), [url[len(common) + 1 :] for url in urls], settings)


def _parent(url: str) -> tuple[RemoteFolder, list[str]]:
    folder, _, name = url.rpartition("/")
    return RemoteFolder(folder), [name]


def _remote_files(folder: RemoteFolder, names: list[str], settings: Settings) -> Inputs:
    """Parts of files of one kind below a URL."""
    shown = [readable(unquote(name) if folder.url.startswith("http") else name) for name in names]
    found = list(zip(shown, map(folder.files.address, names), folder.statuses(names), strict=True))
    found.sort(key=lambda some: some[0].split("/"))  # as paths are
    size = sum(status.size for _, _, status in found)
    if _suffix(names[0]) == ".parquet":
        return _tables([(url, name, status) for name, url, status in found], size, settings)
    parts = [Part(url, name, max(1, status.size), _unit(name, status)) for name, url, status in found]
    return Inputs(parts, None, _digest(parts), [], "tars", size)


def _tables(files: list[tuple[Path | str, str, object]], size: int, settings: Settings) -> Inputs:
    """Parts of Parquet files of `size` bytes: where they lie, their names, and what changes with them."""
    parts, notes = [], []

    def shape_of(path: Path | str) -> TableShape | Rejected:
        try:
            return table_shape(path, settings)
        except Rejected as problem:
            return problem

    with ThreadPoolExecutor(_FOOTERS) as threads:
        shapes = list(threads.map(shape_of, [path for path, _, _ in files]))
    for (file, name, status), shape in zip(files, shapes, strict=True):
        if isinstance(shape, Rejected):
            parts.append(Part(file, name, 1, _unit(name, status), problem=shape))
            continue
        notes += shape.notes(file)
        for group, rows in enumerate(shape.rows):
            if rows:
                parts.append(Part(file, name, rows, _unit(name, status, group), group=group, shape=shape))
    if not parts:
        raise UserError(f"{files[0][0]}: has no rows")
    return Inputs(parts, sum(part.weight for part in parts), _digest(parts), notes, "row groups", size)


def _local_tables(root: Path, files: list[Path], settings: Settings) -> Inputs:
    found = [(file, relative(file, root), _status(file)) for file in files]
    return _tables(found, sum(map(_size, (status for _, _, status in found))), settings)


def _unit_of_picture(root: Path, entry: Entry) -> tuple[bytes, int]:
    """Identity of a picture with its captions, and bytes of its file."""
    path = os.path.join(root, entry.path)
    folder, status = os.path.dirname(path), _status(path)
    beside = [_status(os.path.join(folder, name)) for name in entry.captions]
    return _unit(tuple(entry), status, *beside), _size(status)


def _unit(*values: object) -> bytes:
    return hashlib.blake2b(repr(values).encode("utf-8", "backslashreplace"), digest_size=UNIT_BYTES).digest()


def _status(path: str | Path) -> tuple[int, ...]:
    """What changes with the file, or the number of the error."""
    try:
        status = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode


def _size(status: tuple[int, ...]) -> int:
    """Bytes of a file by its status; 0 where there is none."""
    return status[0] if len(status) > 1 else 0


def _digest(parts: list[Part]) -> str:
    return sha256(part.units for part in parts)


def _refuse_compressed(found: Mapping[str, Sequence[Path | str]], base: str = "") -> None:
    for suffix in COMPRESSED:
        if suffix in found:
            raise UserError(
                f"{base}{found[suffix][0]}: is compressed; unpack it to .tar (pictures do not shrink)"
            )


def _with_note(tars: Inputs, tables: Sequence[Path | str]) -> Inputs:
    """Of tars that have Parquet files beside them, as img2dataset writes those."""
    if tables:
        tars.notes.append(f"{len(tables)} .parquet files beside the tars are not read")
    return tars


def _suffix(name: str) -> str:
    lower = name.lower()
    packed = next((suffix for suffix in COMPRESSED if lower.endswith(suffix)), None)
    return packed or os.path.splitext(lower)[1]


def _by_suffix(root: Path) -> dict[str, list[Path]]:
    """Tars and Parquet files below `root`, sorted, and the first picture of each suffix."""
    found: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for name, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(folder for folder in folders if not is_hidden(folder))
        for file in sorted(file for file in files if not is_hidden(file)):
            suffix = _suffix(file)
            some = found.setdefault(suffix, [])
            if suffix in (".tar", ".parquet") or not some:
                some.append(Path(name, file))
    return {suffix: sorted(paths) for suffix, paths in found.items()}
