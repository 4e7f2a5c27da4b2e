"""MDS source: data sets in the format of MosaicML's streaming library, as PRX and others write them.

    DATASET/index.json  shard.00000.mds ...            one folder
    DATASET/768x1344/index.json  shard.00000.mds ...   or a folder of folders, one for each aspect ratio

Which columns are read is `data.columns`; of the others only text latents may be asked for (`mds_text`).
"""

import io
import json
import re
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from millrace.engine.config import Data
from millrace.engine.config.data import Columns, Part
from millrace.engine.data.captions import Captions, checked
from millrace.engine.data.formats.mds_shards import (
    FILES,
    PIXELS,
    DamagedSample,
    Hashes,
    Shard,
    indexes_below,
    load_library,
    open_index,
)
from millrace.engine.data.formats.mds_text import Tower, has_latents, latent_columns, text_rows
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.data.sources.pictures import (
    OpenSource,
    Source,
    UnreadablePicture,
    decode_picture,
    orientation,
)
from millrace.engine.data.srgb import to_srgb
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256

GRID = 32
"""Edges of a bucket are multiples of it, as PRX's are, unless the folder is named for its size."""
PROBED = 8
"""Pictures of a folder that are looked at to learn its aspect ratio."""
SAME_ASPECT = 1.1
NAMED_ASPECT = 1.25
"""Factors by which aspect ratios in a folder may differ: from each other, and from the size in its name."""


class MdsSource:
    """The samples of all folders, sorted by name, in the order of their index.

    Keys are `folder/shard/number in the shard`. A sample whose captions are both empty counts as unreadable;
    where one is, the other takes its place. Raises UserError where the library is missing, for indexes that
    cannot be used, for shards that are missing, compressed or of another size than the index says, and for
    columns that are not there, with a list of those that are.

    Args:
        root: folder with an index, or folder of folders with one each.
        columns: names of the columns that hold the picture and the captions.
        resolution: buckets are brought to the area of this square, in pixels.
        verify: compare each shard with the hashes in its index when it is first read.
    """

    def __init__(
        self, root: str | Path, columns: Columns, resolution: int = 256, *, verify: bool = False
    ) -> None:
        self.root = Path(root)
        self._made_with = (root, columns, resolution, verify)
        self._resolution = resolution
        self._library = load_library()
        self._indexes = indexes_below(self.root)
        self._shards: list[Shard] = []
        index_of: list[int] = []
        described: list[str] = []
        for number, path in enumerate(self._indexes):
            shards, content = open_index(path, columns, self._library)
            self._shards += shards
            index_of += [number] * len(shards)
            described.append(json.dumps([path.relative_to(self.root).as_posix(), content]))
        described.append(columns.model_dump_json())
        self._index_of_shard = np.array(index_of)
        self._samples = np.array([shard.reader.samples for shard in self._shards])
        self._ends = np.cumsum(self._samples)
        self.digest = sha256("".join(described).encode())
        """SHA-256 of all indexes (with the hashes, or else the sizes, of the shards) and of the columns."""
        self.has_latents = any(map(has_latents, self._shards))
        """Whether text latents of some tower are stored beside captions."""
        self._hashes = Hashes(self._library) if verify else None
        self._recent = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self._made_with)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{shard.path.relative_to(self.root).with_suffix('').as_posix()}/{row}"

    def captions(self, index: int) -> Captions:
        """Both captions without white space around them. Raises UnreadablePicture where both are empty."""
        found = list(self._captions(index).values())
        return Captions(found[0], found[-1])

    def rows(self, index: int, which: Literal["long", "short"], tower: Tower) -> Tensor:
        """(n, E) rows of a caption, as PRX stores them. Raises UnreadablePicture, and UserError where the
        shard has no rows of this tower."""
        shard, _ = self._find(index)
        captions = list(self._captions(index))
        columns = latent_columns(shard, captions[0 if which == "long" else -1], tower)
        try:
            return text_rows(self._library, shard, self._columns(index), columns, tower)
        except DamagedSample as error:
            raise UnreadablePicture(self._where(index), str(error)) from error

    def require_rows(self, tower: Tower) -> None:
        """Raises UserError unless every shard has rows of this tower, those of the first sample as wanted."""
        for shard in self._shards:
            for caption in (shard.long, shard.short):
                latent_columns(shard, caption, tower)
        try:
            self.rows(0, "long", tower)
        except UnreadablePicture as problem:
            raise UserError(
                f"{problem}; set conditioning.text to another tower, or take text out of data.cached"
            ) from None

    def _captions(self, index: int) -> dict[int, str]:
        """Captions with ink by the place of their column, the long one first. Raises UnreadablePicture."""
        shard, _ = self._find(index)
        columns = self._columns(index)
        found = {}
        for place in (shard.long, shard.short):
            try:
                found[place] = checked(columns[place], f"its {shard.reader.column_names[place]}")
            except Rejected as problem:
                if problem.reason is not Reason.EMPTY_CAPTION:
                    raise UnreadablePicture(self._where(index), problem.detail, problem.reason) from None
        if not found:
            raise UnreadablePicture(self._where(index), "its captions are empty", Reason.EMPTY_CAPTION)
        return found

    def image(self, index: int) -> Image.Image:
        data, encoding = self._picture(index)
        if encoding in FILES:
            return decode_picture(data, self._where(index))
        try:
            return to_srgb(self._library.decode(encoding, data), self._where(index))
        except Exception as error:  # pixels that do not fit their size, an unknown mode
            raise UnreadablePicture(self._where(index), str(error)) from error

    def encoded(self, index: int) -> bytes | None:
        """The stored JPEG, PNG or WebP file; None where pixels are stored. Raises UnreadablePicture."""
        data, encoding = self._picture(index)
        return data if encoding in FILES else None

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Sizes (h, w) in pixels, about resolution^2 in area, one for each aspect ratio that has a folder;
        empty where a folder mixes aspect ratios."""
        return self._buckets[0]

    @property
    def bucket_of(self) -> np.ndarray:
        """(N,) int32: place of every sample's size in `buckets`."""
        return self._buckets[1]

    @cached_property
    def _buckets(self) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
        sizes = [self._size_of(number) for number in range(len(self._indexes))]
        found = {size for size in sizes if size}
        if None in sizes:
            return (), np.zeros(len(self), np.int32)
        buckets = tuple(sorted(found))
        of_index = np.array([buckets.index(size) for size in sizes if size], np.int32)
        return buckets, np.repeat(of_index[self._index_of_shard], self._samples)

    def _size_of(self, number: int) -> tuple[int, int] | None:
        """Size (h, w) that the pictures of one index are trained at; None where their aspects differ."""
        shards = np.flatnonzero(self._index_of_shard == number)
        first, last = self._ends[shards[0]] - self._samples[shards[0]], self._ends[shards[-1]] - 1
        seen = []
        for index in np.unique(np.linspace(first, last, PROBED).round().astype(int)).tolist():
            try:
                seen.append(self.header_size(index))
            except UnreadablePicture:
                continue  # reported when its turn comes
        if not seen:
            return None
        if named := self._named_size(number, seen):
            return named
        aspects = [width / height for width, height in seen]
        if max(aspects) > SAME_ASPECT * min(aspects):
            return None
        stored_w, stored_h = np.min(seen, axis=0).tolist()
        root = float(np.median(aspects)) ** 0.5
        return _edge(self._resolution / root, stored_h), _edge(self._resolution * root, stored_w)

    def _named_size(self, number: int, seen: list[tuple[int, int]]) -> tuple[int, int] | None:
        """(h, w) in a folder's name, in either order, where all pictures `seen` are of its aspect."""
        path = self._indexes[number]
        name = path.parent.name if path.name == "index.json" else path.stem
        for a, b in re.findall(r"(\d+)x(\d+)", name):
            for h, w in ((int(a), int(b)), (int(b), int(a))):
                near = h * w and 0.75 < h * w / self._resolution**2 < 1.33
                if near and all(_belongs(size, (h, w)) for size in seen):
                    return h, w
        return None

    def header_size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of a picture, upright, that is not decoded. Raises UnreadablePicture."""
        data, encoding = self._picture(index)
        try:
            if encoding == PIXELS:
                width, height = np.frombuffer(data[:8], np.uint32).tolist()
                return width, height
            with Image.open(io.BytesIO(data)) as picture:
                width, height = picture.size
                turned = orientation(picture) >= 5
        except Exception as error:  # corrupt files make Pillow raise nearly every built-in exception
            raise UnreadablePicture(self._where(index), str(error)) from error
        return (height, width) if turned else (width, height)

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], int(index - self._ends[shard] + self._samples[shard])

    def _where(self, index: int) -> str:
        return f"{self.root}: {self.key(index)}"

    def _picture(self, index: int) -> tuple[bytes, str]:
        """The picture as it is stored, and how it is stored. Raises UnreadablePicture."""
        self.captions(index)  # a sample that cannot be used is told by its picture
        shard, _ = self._find(index)
        return self._columns(index)[shard.image], shard.encoding

    def _columns(self, index: int) -> list[bytes]:
        """All columns of a sample as they are stored."""
        # A thread asks for picture and captions of a sample one after the other: one read is enough.
        recent = self._recent
        if getattr(recent, "index", None) != index:
            shard, row = self._find(index)
            if self._hashes:
                self._hashes.check(shard)
            try:
                recent.index, recent.columns = index, shard.read(row)
            except DamagedSample as error:
                recent.index = None
                raise UnreadablePicture(self._where(index), str(error)) from error
        return recent.columns


def _belongs(stored: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a picture (width, height) is of the aspect of a folder named for `size` (h, w).

    One that covers it may differ more: buckets of small pictures lie far apart, and crops take the rest away.
    """
    (width, height), (h, w) = stored, size
    apart = (width * h) / (height * w)
    most = NAMED_ASPECT if width >= w and height >= h else SAME_ASPECT
    return 1 / most < apart < most


def _edge(wanted: float, stored: int) -> int:
    """The multiple of GRID nearest to `wanted` pixels; the one below where only that fits what is stored."""
    nearest = max(GRID, round(wanted / GRID) * GRID)
    fits = stored // GRID * GRID
    return fits if fits < nearest and stored > 0.9 * wanted else nearest


def _again(kind: type[MdsSource], made_with: tuple[Any, ...]) -> MdsSource:
    """Open a data set once more, in another process."""
    *where, verify = made_with
    return kind(*where, verify=verify)


def _open(part: Data | Part, data: Data) -> Source:
    return MdsSource(part.path, part.columns, data.resolution, verify=data.verify)


ENTRY: OpenSource = _open
