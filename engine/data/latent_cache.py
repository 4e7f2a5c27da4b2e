"""Latent cache and text cache: outputs of the frozen encoders, stored beside the shards of a data set.

    DATASET/768x1344/00000.text.safetensors       rows of the captions of the shard's samples
        rows     (S, E) bf16, or int8: row i is then scale[i] * rows[i]; captions end to end, without padding
        scale    (S,) FP32, for int8
        offsets  (U + 1,) int64     caption c has rows offsets[c] to offsets[c + 1]; equal captions are one
        cut      (U,) uint8         whether it was longer than the tower's max_tokens
        long, short  (samples,) int64    which caption; -1 where the sample's record could not be read
    DATASET/768x1344/00000.latents.safetensors    what the autoencoder made of the evaluation view
        moments  (samples, 2, C, h, w)  mean and log-variance in the network's dtype; (samples, 1, C, h, w) of
                                        a network without a posterior
        present  (samples,) uint8       0 where the picture could not be read
    DATASET/text.safetensors, latents.safetensors    what is stored once: `rows` of the empty caption, `cut`;
                                                     constants of the autoencoder

The manifest has, under `caches`, the identity of the network, and size and SHA-256 of every file. Where each
sample's bytes lie is an index that is made from the files, once a machine where the data set is large
(`joined_arrays.py`). So a sample costs one read at an offset of a file that stays open, from any thread.
"""

import json
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from millrace.engine.config.data import CacheKind as Kind
from millrace.engine.data.captions import WhichCaption
from millrace.engine.data.formats.byte_store import LocalFiles
from millrace.engine.data.formats.joined_arrays import Column, each, joined_arrays
from millrace.engine.data.formats.joined_index import MAPPED_ROWS
from millrace.engine.data.formats.mds_text import Tower
from millrace.engine.data.formats.shard_index import Manifest, Shard, read_manifest
from millrace.engine.data.sources.key_subset import KeptSource
from millrace.engine.data.sources.mds import MdsSource
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import Source
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256, sha256_file
from millrace.engine.util.safetensors_file import dtype_code, dtype_of, tensor_bytes

VERSION = 1
_INDEX_VERSION = 1
_LAYOUT = np.dtype([("data", "<i8"), ("scale", "<i8"), ("shape", "<i4", 4), ("dtype", "S8")])
"""Of one file: bytes at which its numbers begin, and its scales if it has such; shape of what has one row or
sample, 0 for dimensions that it lacks; dtype by safetensors' name."""
_CAPTION = np.dtype([("first", "<i8"), ("rows", "<i4"), ("cut", "<i4")])
"""Of one caption: its first row in the file; how many it has, -1 where the record could not be read; 1 if it
was longer than the tower's limit."""


class CachedText(NamedTuple):
    """Rows of one caption."""

    rows: Tensor
    """(n, E) in a floating dtype, or int8."""
    scale: Tensor | None
    """(n,) FP32 for int8: row i is scale[i] * rows[i]."""
    cut: bool
    """Whether the caption was longer than the tower's limit."""


class CacheFile(BaseModel):
    """A file of a cache."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Path in the data set."""
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    of: str = ""
    """SHA-256 of the shard that it was made from."""


class CacheRecord(BaseModel):
    """What the manifest says of one kind of cache; it is there once all shards have it."""

    model_config = ConfigDict(frozen=True)

    version: int = VERSION
    network: dict[str, Any]
    """Identity of the frozen network: what the numbers depend on besides the samples."""
    dtype: str
    """Of the stored numbers."""
    common: CacheFile
    """What is stored once."""
    files: tuple[CacheFile, ...]
    """One for each shard, in the manifest's order."""


def cache_path(shard: Shard, kind: Kind) -> str:
    """Path in the data set of a shard's cache."""
    return f"{shard.file.removesuffix('.tar')}.{kind}.safetensors"


def common_path(kind: Kind) -> str:
    """Path in the data set of what a cache stores once."""
    return f"{kind}.safetensors"


def remake(kind: Kind) -> str:
    """What to do about a cache that cannot be used, for messages."""
    return f"make it again with millrace cache {kind} --replace"


class _Layout(NamedTuple):
    """Where the numbers of a file are."""

    data: int
    scale: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Cache(ABC):
    """The files of one kind of cache of one data set. Any thread may read.

    Args:
        root: folder of the data set.
        manifest: of it, which names the cache.
        verify: compare the SHA-256 of each file when it is first touched.

    Raises UserError for a record that does not fit the shards, and for files that are not those that were
    written: by their size and index here, by their checksum and length from reading.
    """

    kind: ClassVar[Kind]
    entry: ClassVar[np.dtype]
    """What the index has of a sample."""

    def __init__(self, root: Path, manifest: Manifest, verify: bool = False) -> None:
        self.root, self.verify = root, verify
        self.shards = manifest.shards
        self.record = record_of(root, manifest, self.kind)
        if self.record is None:
            raise UserError(
                f"{root}: has no {self.kind} cache; make it with millrace cache {self.kind}, or take "
                f"{self.kind} out of data.cached"
            )
        self._store, self._known = LocalFiles(root), dict[int, _Layout]()
        self._unverified = {number: threading.Lock() for number in range(len(self.shards))} if verify else {}
        path = _compare(root, self.record.common, self.kind, verify)
        self.common, self.metadata = _tensors(path, self.kind)
        if problem := self._problem_of_common():
            raise _damaged(path, self.kind, problem)
        if process_group.local_rank() == 0:  # once a machine: the others would ask for the same
            each(lambda n: _compare(root, self.record.files[n], self.kind, False), len(self.shards))
        self._starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._layouts, self._entries = joined_arrays(
            f"{self._digest()}.{self.kind}",
            f"{root}: the index of its {self.kind} cache",
            (Column(_LAYOUT, np.arange(len(self.shards) + 1)), Column(self.entry, self._starts)),
            self._index,
            mapped=manifest.samples >= MAPPED_ROWS,
        )

    def _problem_of_common(self) -> str | None:
        """What is wrong with `common`, if anything."""
        return None

    @abstractmethod
    def _problem(self, tensors: dict[str, Tensor], samples: int) -> str | None:
        """What is wrong with the tensors of a shard's file, if anything."""

    @abstractmethod
    def _entries_of(self, tensors: dict[str, Tensor]) -> tuple[str, np.ndarray]:
        """Name of the tensor that holds the numbers, and (samples,) of `entry`."""

    def _digest(self) -> str:
        """SHA-256 over what the index is made from."""
        files = zip(self.record.files, self.shards, strict=True)
        lines = [f"{file.sha256} {file.bytes} {shard.samples}\n" for file, shard in files]
        about = f"{_INDEX_VERSION} {_LAYOUT.descr} {self.entry.descr}"
        return sha256(f"{about} {self.record.common.sha256}\n{''.join(lines)}".encode())

    def _index(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """What the index has of a shard: (1,) of _LAYOUT and (samples,) of `entry`."""
        path = _compare(self.root, self.record.files[number], self.kind, False)
        tensors, _ = _tensors(path, self.kind)
        if problem := self._problem(tensors, self.shards[number].samples):
            raise _damaged(path, self.kind, problem)
        name, entries = self._entries_of(tensors)
        begins, shape = _begins(path), tensors[name].shape[1:]
        padded = (*shape, *[0] * (4 - len(shape)))
        code = dtype_code(tensors[name].dtype).encode()
        return np.array([(begins[name], begins.get("scale", -1), padded, code)], _LAYOUT), entries

    def _layout(self, number: int) -> _Layout:
        found = self._known.get(number)
        if found is None:
            row = self._layouts[number]
            shape = tuple(n for n in row["shape"].tolist() if n)
            dtype = dtype_of(row["dtype"].decode())
            found = self._known[number] = _Layout(int(row["data"]), int(row["scale"]), shape, dtype)
        return found

    def _read(self, number: int, begin: int, first: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`shape` numbers of the file of shard `number`, after `first` others from byte `begin` on."""
        file = self.record.files[number]
        self._verify(number, file)
        tensor = torch.empty(*shape, dtype=dtype)
        try:
            count = self._store.read_into(file.file, begin + first * dtype.itemsize, tensor_bytes(tensor))
        except OSError as error:
            raise _unreadable(self.root / file.file, self.kind, error) from None
        if count != tensor.nbytes:
            raise _damaged(self.root / file.file, self.kind, "it ends before its last sample")
        return tensor

    def _verify(self, number: int, file: CacheFile) -> None:
        """Compare the checksum of a file, once; other threads that want it wait."""
        lock = self._unverified.get(number)
        if lock is None:
            return
        with lock:
            if number in self._unverified:
                _compare(self.root, file, self.kind, True)
                del self._unverified[number]


class TextCache(Cache):
    """Rows of captions."""

    kind = "text"
    entry = np.dtype([("long", _CAPTION), ("short", _CAPTION)])

    def __init__(self, root: Path, manifest: Manifest, verify: bool = False) -> None:
        super().__init__(root, manifest, verify)
        self.empty = CachedText(self.common["rows"], None, bool(self.common["cut"][0]))

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return self.common["rows"].shape[1]

    def rows(self, place: tuple[int, int], which: Literal["long", "short"]) -> CachedText | None:
        """Rows of a caption of the sample at (shard, row); None where its record could not be read."""
        number, row = place
        first, count, cut = self._entries[which][self._starts[number] + row].item()
        if count < 0:
            return None
        data, scale, shape, dtype = self._layout(number)
        rows = self._read(number, data, first * math.prod(shape), (count, *shape), dtype)
        scales = None if scale < 0 else self._read(number, scale, first, (count,), torch.float32)
        return CachedText(rows, scales, bool(cut))

    def _entries_of(self, tensors: dict[str, Tensor]) -> tuple[str, np.ndarray]:
        offsets, cut = tensors["offsets"].numpy(), tensors["cut"].numpy()
        captions = np.zeros(len(cut) + 1, _CAPTION)
        captions["first"], captions["cut"][:-1] = offsets, cut
        captions["rows"] = np.diff(offsets, append=offsets[-1] - 1)  # the last is -1, at which -1 points
        entries = np.empty(len(tensors["long"]), self.entry)
        for which in ("long", "short"):
            entries[which] = captions[tensors[which].numpy()]
        return "rows", entries

    def _problem_of_common(self) -> str | None:
        rows, cut = (self.common.get(name, torch.empty(0)) for name in ("rows", "cut"))
        return None if rows.ndim == 2 and len(cut) == 1 else "not what millrace cache writes"

    def _problem(self, tensors: dict[str, Tensor], samples: int) -> str | None:
        wanted = {"rows", "offsets", "cut", "long", "short"} | ({"scale"} & set(tensors))
        if not wanted <= set(tensors):
            return f"lacks {sorted(wanted - set(tensors))}"
        rows, offsets, count = tensors["rows"], tensors["offsets"], len(tensors["cut"])
        indices = torch.cat([tensors["long"], tensors["short"]])
        sound = (
            rows.ndim == 2
            and rows.shape[1] == self.dim
            and (rows.dtype == torch.int8) == ("scale" in tensors)
            and ("scale" not in tensors or tensors["scale"].shape == rows.shape[:1])
            and offsets.shape == (count + 1,)
            and len(tensors["long"]) == len(tensors["short"]) == samples
            and int(indices.min()) >= -1
            and int(indices.max()) < count
            and int(offsets[0]) == 0
            and int(offsets[-1]) == len(rows)
            and bool((offsets.diff() >= 0).all())
        )
        return None if sound else "its captions do not fit its rows or the shard"


class LatentCache(Cache):
    """Posteriors of pictures."""

    kind = "latents"
    entry = np.dtype(np.uint8)
    """Whether the picture could be read."""

    def moments(self, place: tuple[int, int]) -> Tensor | None:
        """(2 or 1, C, h, w) of the sample at (shard, row); None where its picture could not be read."""
        number, row = place
        if not self._entries[self._starts[number] + row]:
            return None
        data, _, shape, dtype = self._layout(number)
        return self._read(number, data, row * math.prod(shape), shape, dtype)

    def _entries_of(self, tensors: dict[str, Tensor]) -> tuple[str, np.ndarray]:
        return "moments", tensors["present"].numpy()

    def _problem(self, tensors: dict[str, Tensor], samples: int) -> str | None:
        if not {"moments", "present"} <= set(tensors):
            return "lacks moments or present"
        moments, present = tensors["moments"], tensors["present"]
        sound = moments.ndim == 5 and len(moments) == len(present) == samples and moments.shape[1] in (1, 2)
        return None if sound else "its latents do not fit the shard"


def record_of(root: Path, manifest: Manifest, kind: Kind) -> CacheRecord | None:
    """What the manifest says of a cache, checked against the shards; None if it has none. Or UserError."""
    values = manifest.caches.get(kind)
    if values is None:
        return None
    where = f"{root}: its {kind} cache"
    try:
        record = CacheRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {remake(kind)}"
        ) from None
    if record.version != VERSION:
        raise UserError(f"{where} is of version {record.version}, this is for {VERSION}; {remake(kind)}")
    made_from = [(file.file, file.of) for file in record.files]
    if made_from != [(cache_path(shard, kind), shard.sha256) for shard in manifest.shards]:
        raise UserError(f"{where} was made from other shards; {remake(kind)}")
    return record


def cache_problems(root: Path) -> list[str]:
    """What is wrong with the caches of the data set `root`, a line each: every byte of every file is compared
    with the manifest."""
    manifest, found = read_manifest(root), []
    for kind in get_args(Kind):
        try:
            record = record_of(root, manifest, kind)
        except UserError as error:
            found.append(str(error))
            continue
        for file in () if record is None else (record.common, *record.files):
            try:
                _compare(root, file, kind, True)
            except UserError as error:
                found.append(str(error))
    return found


def _compare(root: Path, file: CacheFile, kind: Kind, verify: bool) -> Path:
    """Path of a file of the size, and if `verify` with the checksum, that the manifest says. Or UserError."""
    path = root / file.file
    try:
        size = path.stat().st_size
        if size != file.bytes:
            raise _damaged(path, kind, f"has {size} bytes, the manifest says {file.bytes}")
        if verify and sha256_file(path) != file.sha256:
            raise _damaged(path, kind, "its SHA-256 is not that of the manifest")
    except OSError as error:
        raise _unreadable(path, kind, error) from None
    return path


def _damaged(path: Path, kind: Kind, problem: str) -> UserError:
    return UserError(f"{path}: damaged: {problem}; {remake(kind)}")


def _unreadable(path: Path, kind: Kind, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror}; {remake(kind)}")


def _tensors(path: Path, kind: Kind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file over its mapped bytes, and the texts of its header. Raises UserError."""
    try:
        with safe_open(path, "pt") as held:
            return {name: held.get_tensor(name) for name in held.keys()}, held.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise _damaged(path, kind, " ".join(str(error).split())[:200]) from None


def _begins(path: Path) -> dict[str, int]:
    """Byte at which each tensor of a file begins that `_tensors` has read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + tensor["data_offsets"][0] for name, tensor in header.items()}


class Caches:
    """The caches of all shards in a source. Any thread may read.

    Args:
        source: of the training stream.
        kinds: those to use, as `data.cached`.
        verify: compare the checksum of each file when it is first touched.
        tower: whose rows are taken of MDS shards that have text latents; None takes none.

    In a mixture a part without a cache is left to the networks. Raises UserError where no part has one, and
    for caches that do not fit their shards.
    """

    def __init__(
        self, source: Source, kinds: tuple[Kind, ...], verify: bool = False, tower: Tower | None = None
    ) -> None:
        self._source, self._tower = source, tower
        self._text: dict[int, TextCache] = {}
        self._latents: dict[int, LatentCache] = {}
        held = list(_leaves(source))
        folders = {id(leaf): leaf for leaf in held if isinstance(leaf, ShardsSource)}
        self._mds: dict[int, MdsSource] = {}
        self._complete: dict[str, bool] = {}
        for kind in kinds:
            caches = self._text if kind == "text" else self._latents
            made = TextCache if kind == "text" else LatentCache
            for key, leaf in folders.items():
                if kind in leaf.manifest.caches or len(held) == 1:
                    caches[key] = made(leaf.root, leaf.manifest, verify)
            if kind == "text" and tower:
                self._mds = {
                    id(leaf): leaf
                    for leaf in held
                    if isinstance(leaf, MdsSource) and (leaf.has_latents or len(held) == 1)
                }
                for leaf in self._mds.values():
                    leaf.require_rows(tower)
            if not caches and not (kind == "text" and self._mds):
                roots = ", ".join(str(leaf.root) for leaf in folders.values()) or "no shards"
                raise UserError(
                    f"data.cached has {kind}, but no part of the data has such a cache ({roots}); make it "
                    f"with millrace cache {kind}, or take {kind} out of data.cached"
                )
            self._complete[kind] = all(id(leaf) in caches for leaf in held)

    def of(self, kind: Kind) -> list[Cache]:
        """The caches of one kind, of shards."""
        return list((self._text if kind == "text" else self._latents).values())

    @property
    def mds(self) -> list[MdsSource]:
        """MDS data sets whose text latents are used."""
        return list(self._mds.values())

    def complete(self, kind: Kind) -> bool:
        """Whether every picture lies in a part that has this kind."""
        return self._complete.get(kind, False)

    def text(self, picture: int, which: WhichCaption) -> CachedText | None:
        """Rows of a caption of a picture, or of the empty caption."""
        leaf, index = leaf_of(self._source, picture)
        if self._tower and id(leaf) in self._mds:
            if which == "empty":
                return None  # PRX stores no rows of it
            rows = leaf.rows(index, which, self._tower)
            return CachedText(rows, None, len(rows) == self._tower.max_tokens)
        cache = self._text.get(id(leaf))
        if cache is None:
            return None
        return cache.empty if which == "empty" else cache.rows(leaf.place(index), which)

    def moments(self, picture: int) -> Tensor | None:
        """What the autoencoder made of a picture, (2 or 1, C, h, w)."""
        leaf, index = leaf_of(self._source, picture)
        cache = self._latents.get(id(leaf))
        return None if cache is None else cache.moments(leaf.place(index))


def _leaves(source: Source) -> list[Source]:
    if isinstance(source, MixtureSource):
        return [leaf for part in source.sources for leaf in _leaves(part)]
    return _leaves(source.whole) if isinstance(source, KeptSource) else [source]


def leaf_of(source: Source, index: int) -> tuple[Source, int]:
    """The source that is no part or subset of others, and the index in it, of picture `index`."""
    while True:
        if isinstance(source, MixtureSource):
            part = int(np.searchsorted(source.offsets, index, side="right")) - 1
            source, index = source.sources[part], index - int(source.offsets[part])
        elif isinstance(source, KeptSource):
            source, index = source.whole, int(source.kept[index])
        else:
            return source, index
