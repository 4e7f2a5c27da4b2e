"""Key subset: the pictures of a source that a list of keys names.

The list is a text file with one key a line, as `keys` of batches and messages of the engine write them. It is
how a curated set is trained on without copying pictures.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from millrace.engine.data.sources.pictures import Captions, Source, encoded, keys_of, stored_size
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically


class KeptSource:
    """The pictures of `source` at the places `kept`, in the source's order."""

    def __init__(self, source: Source, kept: list[int]) -> None:
        self.whole, self.kept = source, sorted(kept)
        self.sources = [source]

    def __len__(self) -> int:
        return len(self.kept)

    def key(self, index: int) -> str:
        return self.whole.key(self.kept[index])

    def captions(self, index: int) -> Captions:
        return self.whole.captions(self.kept[index])

    def image(self, index: int) -> Image.Image:
        return self.whole.image(self.kept[index])

    def encoded(self, index: int) -> bytes | None:
        return encoded(self.whole, self.kept[index])

    def stored_size(self, index: int) -> tuple[int, int] | None:
        return stored_size(self.whole, self.kept[index])

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Those of the whole; AttributeError where it has none."""
        return self.whole.buckets

    @property
    def bucket_of(self) -> np.ndarray:
        """(n,) int32: index into `buckets` of every picture."""
        return self.whole.bucket_of[self.kept]


def keep_listed(source: Source, path: str | Path) -> KeptSource:
    """The pictures of `source` that the file `path` lists. Empty lines are passed over.

    Raises UserError for a file that cannot be read or lists nothing, a key that the source does not have, and
    a key that comes twice; the message names file, line and key.
    """
    places = {key: i for i, key in enumerate(keys_of(source))}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read(Path(path)).splitlines(), 1):
        key = line.strip()
        if not key:
            continue
        if key not in places:
            raise UserError(
                f"{path}: line {number}: no picture has the key {key!r} (the first of {len(source)} is "
                f"{source.key(0)!r}); correct or remove the line"
            )
        if key in lines:
            raise UserError(f"{path}: line {number}: {key!r} is in line {lines[key]} already; remove one")
        lines[key] = number
    if not lines:
        raise UserError(f"{path}: lists no keys; write one key a line, or set data.keys to null")
    return KeptSource(source, [places[key] for key in lines])


def write_keys(path: str | Path, keys: Iterable[str]) -> None:
    """Write the file that `keep_listed` reads."""
    write_atomically(path, "".join(f"{key}\n" for key in keys))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the list of keys as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct data.keys") from None
