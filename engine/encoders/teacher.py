"""Teacher: the frozen vision network that the denoiser's features are aligned with; registry of its kinds.

A picture is resized so that the teacher has one patch for each of the denoiser's tokens; a teacher of 16
pixel patches sees a picture of 256 pixels and 16 x 16 tokens as it is, one of 14 pixels sees 224.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from millrace.engine.config import Alignment, AttentionAlignment
from millrace.engine.config import Teacher as TeacherConfig
from millrace.engine.encoders.pretrained import NetworkSize, Settings, weights_digest
from millrace.engine.encoders.side_stream import SideStream, use_after
from millrace.engine.util import registry
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256_json, write_atomically
from millrace.kernels.support.packed import to_device

Grid = tuple[int, int]
"""Rows and columns of the denoiser's tokens of one picture."""
QueriesKeys = tuple[Tensor, Tensor]

KEY = "alignment.teacher.path"
_CACHE_FORMAT = 1


class TeacherFeatures:
    """What the teacher made of a batch; on CUDA it may still be computing, on a stream of its own.

    Reading an attribute makes the current stream, not the host, wait for it.
    """

    def __init__(self, tokens: Tensor, attention: list[QueriesKeys], ready: torch.cuda.Event | None) -> None:
        self._tokens, self._attention, self._ready = tokens, attention, ready

    @property
    def tokens(self) -> Tensor:
        """(T, D) in the teacher's dtype, one row for each of the denoiser's tokens, in the layout's order."""
        self._wait()
        return self._tokens

    @property
    def attention(self) -> list[QueriesKeys]:
        """Queries and keys (T, heads, dim / heads) of each aligned layer; empty if none is."""
        self._wait()
        return self._attention

    def _wait(self) -> None:
        use_after(self._ready, (self._tokens, *(x for pair in self._attention for x in pair)))
        self._ready = None


class Teacher(ABC):
    """Turns pictures into one row of features for each of the denoiser's tokens.

    Attributes:
        patch: edge in pixels of what one row is about.
        dim: D, features of a row.
        identity: everything that the features depend on besides the picture.
    """

    def __init__(
        self, config: TeacherConfig, patch: int, dim: int, network: nn.Module, name: str, device: torch.device
    ) -> None:
        self.config, self.patch, self.dim, self.device = config, patch, dim, device
        self.identity = f"{name}, weights {weights_digest(network)}, {config.dtype}, {config.resize}"
        self._cache: _Cache | None = None
        self._side = SideStream(device)

    @abstractmethod
    def _compute(self, pictures: Tensor) -> tuple[Tensor, list[QueriesKeys]]:
        """Tokens (B, n, D), and queries and keys (B, n, heads, d), of resized pictures (B, 3, h, w)."""

    def keep_features(self, data: str) -> None:
        """Use the cache that the configuration names, for the data set that `data` identifies.

        Raises UserError if the folder is another teacher's, another data set's, or cannot be used.
        """
        if self.config.cache:
            self._cache = _Cache(Path(self.config.cache), self.identity, data)

    @torch.no_grad()
    def features(
        self, images: Sequence[Tensor], grids: Sequence[Grid], keys: Sequence[str]
    ) -> TeacherFeatures:
        """Features of a batch.

        Args:
            images: B pictures (3, h, w) FP32 in [-1, 1] on the device; one size goes through together.
            grids: of their tokens.
            keys: their names in the data set, for the cache.
        """
        stored = [self._stored(*one) for one in zip(images, grids, keys, strict=True)]
        groups: dict[tuple[torch.Size, Grid], list[int]] = {}
        for i, (image, grid) in enumerate(zip(images, grids, strict=True)):
            if stored[i] is None:
                groups.setdefault((image.shape, grid), []).append(i)
        rows: list[list[Tensor]] = [[] if found is None else [found] for found in stored]
        with self._side.after_current([*images, *(found for found in stored if found is not None)]):
            for (_, grid), members in groups.items():
                tokens, attention = self._compute(self._fit(torch.stack([images[i] for i in members]), grid))
                parts = [tokens, *(x for pair in attention for x in pair)]
                for place, i in enumerate(members):
                    rows[i] = [part[place] for part in parts]
                    if self._cache is not None:
                        self._cache.put(keys[i], grid, images[i].shape, tokens[place])
            # Pictures with all their parts end to end; a cache holds tokens alone, and there is no attention.
            packed = [torch.cat(parts) for parts in zip(*rows, strict=True)]
            ready = self._side.event()
        pairs = list(zip(packed[1::2], packed[2::2], strict=True))
        return TeacherFeatures(packed[0], pairs, ready)

    def _stored(self, image: Tensor, grid: Grid, key: str) -> Tensor | None:
        if self._cache is None:
            return None
        found = self._cache.get(key, grid, image.shape)
        return None if found is None else to_device(found, self.device)

    def _fit(self, pictures: Tensor, grid: Grid) -> Tensor:
        """Pictures (B, 3, h, w) resized to one patch for each token of `grid`."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        if tuple(pictures.shape[2:]) == size:
            return pictures
        if self.config.resize == "nearest":
            return F.interpolate(pictures, size=size, mode="nearest")
        return F.interpolate(pictures, size=size, mode="bicubic", antialias=True)


class PublishedVision(NamedTuple):
    """Published weights of a vision network."""

    source: str
    """Hub id."""
    size: NetworkSize
    """Work of one patch."""
    shape: Settings
    """Settings of its configuration's class."""


class VisionEntry(ABC):
    """A kind of vision network (`alignment.teacher.kind`): all that the engine asks of it.

    Its module in `encoders/vision/` has the kind's name.

    Attributes:
        patch: edge in pixels of what one feature is about.
        large: the published ViT-L, which is the default teacher; None where nothing is published.
        base: the published ViT-B, which is the default of perceptual losses.
    """

    patch: int
    large: PublishedVision | None = None
    base: PublishedVision | None = None

    @abstractmethod
    def open_teacher(
        self, config: TeacherConfig, device: torch.device, attention: AttentionAlignment | None
    ) -> Teacher:
        """As the function `open_teacher`, without a cache."""

    def size_of(self, source: str) -> NetworkSize:
        """Of the network of a local folder or a hub id that was fetched before, by its configuration alone.
        Raises OSError or ValueError where that cannot be read."""
        raise ValueError(f"{source!r} does not say its size")

    @abstractmethod
    def tiny(self, folder: Path) -> Path:
        """Save a small network of the same class with random weights, for `--smoke` and tests."""

    def random_teacher(
        self, config: TeacherConfig, device: torch.device, attention: AttentionAlignment | None
    ) -> Teacher:
        """The published ViT-L with random weights, for benchmarks. Raises ValueError if `large` is None."""
        raise ValueError(f"{type(self).__name__} has no published ViT-L")


def vision_entry(kind: str) -> VisionEntry:
    """The entry of a kind."""
    return registry.entry("encoders.vision", kind)


def open_teacher(
    config: TeacherConfig,
    device: torch.device,
    attention: AttentionAlignment | None = None,
    data: str = "",
) -> Teacher:
    """The teacher that the configuration names, frozen, on `device`.

    Args:
        config: of the teacher.
        attention: which of its layers are aligned, if any.
        data: what identifies the data set and how its pictures are cut, for the cache.

    Raises UserError if weights, layers, heads or cache do not fit.
    """
    teacher = vision_entry(config.kind).open_teacher(config, device, attention)
    teacher.keep_features(data)
    return teacher


def teacher_of(config: Alignment, device: torch.device, data: str) -> Teacher | None:
    """The teacher that an alignment needs, as of `open_teacher`; None where nothing is aligned."""
    return open_teacher(config.teacher, device, config.attention, data) if config.active else None


class _Cache:
    """Features on disk, one file a picture, of one teacher and one data set. Processes may share it."""

    def __init__(self, folder: Path, teacher: str, data: str) -> None:
        self.folder = folder
        header = {"format": _CACHE_FORMAT, "teacher": teacher, "data": data}
        path = folder / "cache.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, json.dumps(header, indent=2))
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot use alignment.teacher.cache {str(folder)!r}: {error}; name another folder"
            ) from None
        for what in header:
            if not isinstance(found, dict) or found.get(what) != header[what]:
                theirs = found.get(what) if isinstance(found, dict) else found
                raise UserError(
                    f"alignment.teacher.cache {str(folder)!r} is of the {what} {theirs!r}, not of "
                    f"{header[what]!r}; name another folder"
                )

    def _path(self, key: str, grid: Grid, shape: torch.Size) -> Path:
        name = sha256_json([key, *grid, *shape[1:]])
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str, grid: Grid, shape: torch.Size) -> Tensor | None:
        """Tokens (n, D) on the host of picture `key` of this shape, or None."""
        path = self._path(key, grid, shape)
        if not path.exists():
            return None
        try:
            return load_file(path)["tokens"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"unreadable features in alignment.teacher.cache: {path}: {error}; delete that file"
            ) from None

    def put(self, key: str, grid: Grid, shape: torch.Size, tokens: Tensor) -> None:
        """Keep tokens (n, D). Waits for the device: the cost of a picture's first visit."""
        path = self._path(key, grid, shape)
        content = save({"tokens": tokens.cpu().contiguous()})
        try:
            path.parent.mkdir(exist_ok=True)
            # Without fsync: one file a picture, in the training step, of what can be made again.
            write_atomically(path, content, sync=False)
        except OSError as error:
            raise UserError(
                f"cannot write to alignment.teacher.cache: {path}: {error.strerror}; free space or grant "
                "access there, or name another folder"
            ) from None
