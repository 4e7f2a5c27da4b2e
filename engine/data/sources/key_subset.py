"""Key subset: the pictures of a source that a list of keys names.

The list is a text file with one key a line, as `keys` of batches and messages of the engine write them. It is
how a curated set is trained on without copying pictures.
"""

import itertools
import logging
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from millrace.engine.data.formats.joined_index import MAPPED_ROWS
from millrace.engine.data.formats.shard_index import key_digest
from millrace.engine.data.sources.pictures import (
    Captions,
    Source,
    encoded,
    key_alone,
    key_digests,
    picture_size,
    read_ahead,
    stored_size,
    stored_sizes,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256, sha256_file, write_atomically
from millrace.engine.util.node_cache import cached_file

log = logging.getLogger(__name__)


class Rest:
    """The growing numbers below `count` without a few, as an array that memory never holds.

    Args:
        left_out: (m,) int64, growing.
    """

    def __init__(self, count: int, left_out: np.ndarray) -> None:
        self._count, self.left_out = count - len(left_out), left_out
        self._before = left_out - np.arange(len(left_out))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int | slice | np.ndarray) -> np.ndarray:
        """Numbers, int64, at one or several places."""
        places = np.arange(*place.indices(self._count)) if isinstance(place, slice) else place
        return places + np.searchsorted(self._before, places, side="right")


class _Taken:
    """The elements of `values` at the places `rest`, made when they are asked for."""

    def __init__(self, values: np.ndarray, rest: Rest) -> None:
        self._values, self._rest = values, rest

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, place: int | slice | np.ndarray) -> np.ndarray:
        return self._values[self._rest[place]]


class KeptSource:
    """The pictures of `source` at the places `kept` (n,) int64, which grow and may be a mapped file."""

    def __init__(self, source: Source, kept: np.ndarray | Rest) -> None:
        self.whole, self.kept = source, kept
        self.sources = [source]

    def __len__(self) -> int:
        return len(self.kept)

    def key(self, index: int) -> str:
        return self.whole.key(self._place(index))

    def key_alone(self, index: int) -> str:
        """As `key`, of a picture that is not read."""
        return key_alone(self.whole, self._place(index))

    def captions(self, index: int) -> Captions:
        return self.whole.captions(self._place(index))

    def image(self, index: int) -> Image.Image:
        return self.whole.image(self._place(index))

    def encoded(self, index: int) -> bytes | None:
        return encoded(self.whole, self._place(index))

    def stored_size(self, index: int) -> tuple[int, int] | None:
        return stored_size(self.whole, self._place(index))

    def read_ahead(self, indices: Sequence[int], keys: bool = False) -> None:
        read_ahead(self.whole, self.kept[np.asarray(indices)].tolist(), keys)

    def header_size(self, index: int) -> tuple[int, int]:
        return picture_size(self.whole, self._place(index))

    def stored_sizes(self, indices: np.ndarray) -> np.ndarray | None:
        return stored_sizes(self.whole, self.kept[indices])

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Those of the whole; AttributeError where it has none."""
        return self.whole.buckets

    @property
    def bucket_of(self) -> np.ndarray | _Taken:
        """(n,) int32: index into `buckets` of every picture."""
        whole = self.whole.bucket_of
        return _Taken(whole, self.kept) if isinstance(self.kept, Rest) else whole[self.kept]

    def key_digests(self) -> Iterator[np.ndarray]:
        """(m, 2) uint64, `key_digest` of the keys of all pictures, in order and in parts."""
        first = start = 0
        for part in key_digests(self.whole):
            start += len(part)
            end = bisect_left(self.kept, start)
            yield part[self.kept[first:end] - (start - len(part))]
            first = end

    def _place(self, index: int) -> int:
        return int(self.kept[index])


def keep_listed(source: Source, path: str | Path) -> KeptSource:
    """The pictures of `source` that the file `path` lists. Empty lines are passed over.

    Keys are compared by their digests, which shards have in an index. Of a large data set one process of a
    machine looks them up and all map what it has found.

    Raises UserError for a file that cannot be read or lists nothing, a key that the source does not have, and
    a key that comes twice; the message names file, line and key.
    """
    path = Path(path)
    if len(source) >= MAPPED_ROWS and hasattr(source, "digest") and path.is_file():
        try:
            name = f"{sha256(f'{source.digest} {sha256_file(path)}'.encode())}.kept"
            found = cached_file(name, None, lambda file: file.write(_places(source, path).tobytes()))
            return KeptSource(source, np.memmap(found, np.int64, "r").view(np.ndarray))
        except OSError as error:
            log.warning("%s: what it lists cannot be kept for all processes of this machine: %s", path, error)
    return KeptSource(source, _places(source, path))


def _places(source: Source, path: Path) -> np.ndarray:
    """(n,) int64, growing: places in `source` of the keys that a file lists."""
    digests, lines = _read(path)
    if not len(lines):
        raise UserError(f"{path}: lists no keys; write one key a line, or set data.keys to null")
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first line comes first
    digests, lines = digests[order], lines[order]
    repeats = 1 + np.flatnonzero((digests[1:] == digests[:-1]).all(1))
    places = np.full(len(lines), -1)
    start = 0
    for part in key_digests(source):
        _look_up(digests, part, start, places)
        start += len(part)
    missing = np.setdiff1d(np.flatnonzero(places < 0), repeats)
    _refuse(source, path, lines, missing, repeats)
    return np.sort(places)


def _look_up(listed: np.ndarray, digests: np.ndarray, start: int, places: np.ndarray) -> None:
    """Note in `places` (n,) where those of the sorted `listed` (n, 2) are that are among `digests` (m, 2),
    whose first is at place `start`."""
    at = np.searchsorted(listed[:, 0], digests[:, 0])
    rest = np.arange(len(digests))
    while len(rest):  # once, but for digests of which the first half is equal
        rest = rest[at[rest] < len(listed)]
        rest = rest[listed[at[rest], 0] == digests[rest, 0]]
        hits = rest[listed[at[rest], 1] == digests[rest, 1]]
        places[at[hits]] = start + hits
        at[rest] += 1


def _refuse(source: Source, path: Path, lines: np.ndarray, missing: np.ndarray, repeats: np.ndarray) -> None:
    """Raise UserError for the first line of the file that is missing or a repeat; indices into `lines`."""
    wrong = np.concatenate([missing, repeats])
    if not len(wrong):
        return
    first = wrong[np.argmin(lines[wrong])]
    line = int(lines[first])
    with path.open(encoding="utf-8-sig") as file:
        key = next(itertools.islice(file, line - 1, None)).strip()
    if first in missing:
        raise UserError(
            f"{path}: line {line}: no picture has the key {key!r} (the first of {len(source)} is "
            f"{source.key(0)!r}); correct or remove the line"
        )
    while first in repeats:
        first -= 1
    raise UserError(f"{path}: line {line}: {key!r} is in line {lines[first]} already; remove one")


def write_keys(path: str | Path, keys: Iterable[str]) -> None:
    """Write the file that `keep_listed` reads."""
    write_atomically(path, "".join(f"{key}\n" for key in keys))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of the keys that a file lists: (n, 2) digests and (n,) numbers of their lines, from 1."""
    digests, lines = bytearray(), array("q")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if key := line.strip():
                    digests += key_digest(key)
                    lines.append(number)
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not UTF-8 at byte {_undecodable(path)}; save the list of keys as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct data.keys") from None
    return np.frombuffer(bytes(digests), "<u8").reshape(-1, 2), np.array(lines, np.int64)


def _undecodable(path: Path) -> int:
    """Offset of the first byte of a file that is not UTF-8."""
    start = 0
    with path.open("rb") as file:
        for line in file:  # no byte of a longer character is that of a line's end
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return start + error.start
            start += len(line)
    return start
