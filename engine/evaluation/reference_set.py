"""Reference set: pictures that samples are compared with, and captions that samples are made for."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.data import Source, evaluation_view, open_source
from millrace.engine.data.crop import output_size
from millrace.engine.data.names import PICTURES
from millrace.engine.data.public_sets import require_published
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.data.sources.pictures import (
    UnreadablePicture,
    key_alone,
    picture_size,
    read_ahead,
    read_picture,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256
from millrace.engine.util.randomness import Purpose, epoch_order

_ORDER_SEED = 0
"""Reference pictures are the same for runs of any seed, so that their statistics can be shared."""
_LOOKED_AT = 16
"""Pictures whose pixels the digest of a reference holds."""
_KEYS_AHEAD = 1024
"""Keys that a source which is far away reads together."""


class Pictures:
    """A folder of pictures without captions, in order of their relative path."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._keys = sorted(path.relative_to(root).as_posix() for path in _files(root) if _is_picture(path))
        if not self._keys:
            raise UserError(f"{root}: no pictures in this folder; it needs {' '.join(PICTURES)} files")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def image(self, index: int) -> Image.Image:
        return read_picture(self._root / self._keys[index])


class Reference:
    """Reference pictures in their order, and captions.

    Args:
        config: with `evaluation` and `data` of the model that is evaluated.
        edge: of a token in pixels.
        source: of `config.data`, if it is open already.
    """

    def __init__(self, config: Config, edge: int, source: Source | None = None) -> None:
        section = config.evaluation
        self._config, self._data, self._edge = section, config.data, edge
        self._pictures: Source | Pictures
        if section.reference is None:
            self._pictures = self._captioned = source or open_source(config.data)
            self.name = f"data ({config.data.source})"
        else:
            root = Path(section.reference)
            if not root.is_dir():
                require_published(root)
                raise UserError(f"{root}: no such folder; set evaluation.reference to a folder of pictures")
            self.name = str(root)
            if _has_captions(root):
                self._pictures = self._captioned = FolderSource(root)
            else:
                self._pictures, self._captioned = Pictures(root), source or open_source(config.data)
        data = config.data
        where = section.reference if section.reference is not None else data.path
        self.folder = where if section.reference is not None or data.source != "mixture" else None
        """Where the pictures lie, None where that is not one folder."""
        self._own_captions = self._pictures is self._captioned
        self.count = min(section.reference_samples or section.samples, len(self._pictures))
        order = epoch_order(_ORDER_SEED, 0, len(self._pictures), Purpose.ORDER)
        self._order = order[: self.count].copy()  # of a large set the rest is not kept
        self._caption_order = self._order
        if not self._own_captions:
            self._caption_order = epoch_order(_ORDER_SEED, 0, len(self._captioned), Purpose.ORDER)
        self._identity = ""

    def view(self, place: int) -> Tensor:
        """Reference picture `place` < `count`, as training sees it without chance: uint8 (3, h, w).

        Raises UserError for a picture that cannot be read, or is smaller than its crop.
        """
        picture = int(self._order[place])
        view = evaluation_view(self._image(picture), self._data, self._edge, self._pictures.key(picture))
        return levels(view)

    def views(self, places: Sequence[int]) -> list[Tensor]:
        """As `view`, of several, which a source that is far away reads together."""
        read_ahead(self._pictures, self._order[list(places)].tolist())
        return list(map(self.view, places))

    def caption(self, sample: int) -> str:
        """Of sample number `sample`."""
        return getattr(self._captioned.captions(self._captioned_picture(sample)), self._config.caption)

    def size(self, sample: int) -> tuple[int, int]:
        """Height and width of sample number `sample`: with mixed aspects those of the picture that its
        caption is of, whose header is read where its source has no index of sizes."""
        resolution = self._data.resolution
        if self._data.aspect == "square":
            return resolution, resolution
        picture = self._captioned_picture(sample)
        return output_size(*picture_size(self._captioned, picture), self._data, self._edge)

    def identity(self) -> str:
        """What the reference pictures are: their names in order, how they are cut, and pixels of some. The
        first call reads the names."""
        if not self._identity:
            digest, data = sha256(self._description()), self._data
            whole = ", whole" if data.crop == "none" else ""
            self._identity = f"{self.count} pictures {digest[:32]}, {data.aspect} {data.resolution}{whole}"
        return self._identity

    def _description(self) -> Iterator[bytes]:
        for place in range(self.count):
            if place % _KEYS_AHEAD == 0:
                some = self._order[place : place + _KEYS_AHEAD].tolist()
                read_ahead(self._pictures, some, keys=True)
            yield key_alone(self._pictures, int(self._order[place])).encode() + b"\0"
        for place in sorted({i * self.count // _LOOKED_AT for i in range(_LOOKED_AT)}):
            view = self.view(place)
            yield str(tuple(view.shape)).encode() + view.numpy().tobytes()

    def _captioned_picture(self, sample: int) -> int:
        # Captions of the reference pictures go with those that are compared with; others are all used.
        captions = self.count if self._own_captions else len(self._captioned)
        return int(self._caption_order[sample % captions])

    def _image(self, picture: int) -> Image.Image:
        try:
            return self._pictures.image(picture)
        except UnreadablePicture as problem:
            raise UserError(f"reference picture {problem}; repair or remove it") from None


def levels(picture: Tensor) -> Tensor:
    """Pictures in [-1, 1] as the uint8 that a file holds; what is outside is clipped."""
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _files(root: Path) -> list[Path]:
    return [Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _has_captions(root: Path) -> bool:
    """Whether a picture has a caption file beside it; then each must have one."""
    files = _files(root)
    captions = {path.with_suffix("") for path in files if path.suffix.lower() in (".txt", ".json")}
    return any(path.with_suffix("") in captions for path in files if _is_picture(path))
