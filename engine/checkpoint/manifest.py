"""Checkpoint manifest: what a checkpoint folder holds, and the proof that it still holds exactly that.

    step-00000100/
        shard-00000-of-00002.safetensors    pieces of tensors, one file per rank that wrote
        shard-00001-of-00002.safetensors
        meta.json                           everything that is not a tensor
        manifest.json                       bytes and sha256 of the files above; where each tensor lies
        manifest.sha256                     seal of the manifest, as `sha256sum -c manifest.sha256` reads it

The seal covers the manifest and the manifest covers the rest, so a changed, lost or shortened file is found
and named, whichever it is. In the manifest a tensor is

    "exp_avg/final.weight": {"shape": [64, 1792], "dtype": "F32", "pieces": [[0, 0, 90000, 712], ...]}

with one `[shard, first element, elements, byte offset in the shard]` for each contiguous range of the
flattened tensor. Ranges, not ranks: a reader at any world size takes the elements it wants.
"""

import json
import math
import os
import stat
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from millrace.engine.checkpoint.damage import BadElements
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256, sha256_file, write_atomically
from millrace.engine.util.safetensors_file import dtype_of

FORMAT = 1
MANIFEST, SEAL, META = "manifest.json", "manifest.sha256", "meta.json"
LARGEST = 2**30
"""Bytes of the largest file that is read whole. A manifest takes about 40 for each piece: 4 tensors for each
of 2,000 parameters, held by 1,024 processes, are 330 MB."""


class DamagedCheckpoint(UserError):
    """A published checkpoint is not what was written: its `folder`, the `file` at fault and the `problem`."""

    def __init__(self, folder: Path, file: str, problem: str) -> None:
        super().__init__(
            f"{folder} is damaged: {file} {problem}; restore the file or take another checkpoint"
        )
        self.folder, self.file, self.problem = folder, file, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.file, self.problem)  # ranks send it to each other


class FileRecord(NamedTuple):
    """Size and checksum of a file."""

    bytes: int
    sha256: str


class PieceRecord(NamedTuple):
    """Elements [start, start + count) of a flattened tensor, `offset` bytes into the file of `shard`."""

    shard: int
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class TensorRecord:
    """A logical tensor and where its elements lie."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, I64, ..."""
    pieces: list[PieceRecord] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, object]:
        return {"shape": self.shape, "dtype": self.dtype, "pieces": self.pieces}

    @classmethod
    def from_json(cls, values: dict) -> "TensorRecord":
        return cls(
            tuple(values["shape"]), values["dtype"], [PieceRecord(*piece) for piece in values["pieces"]]
        )


@dataclass(frozen=True)
class ShardIndex:
    """What one rank wrote; it travels to rank 0 as a small JSON file beside the shard."""

    file: FileRecord
    tensors: dict[str, TensorRecord]
    bad: dict[str, BadElements] = field(default_factory=dict)
    """By tensor; not in the file, because then there is no checkpoint."""

    def to_json(self) -> str:
        tensors = {name: record.to_json() for name, record in self.tensors.items()}
        return json.dumps({"file": self.file, "tensors": tensors})

    @classmethod
    def from_json(cls, text: str) -> "ShardIndex":
        values = json.loads(text)
        tensors = {name: TensorRecord.from_json(record) for name, record in values["tensors"].items()}
        return cls(FileRecord(*values["file"]), tensors)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds."""

    step: int
    world_size: int
    """Ranks that wrote, hence the number of shards."""
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    def to_json(self) -> str:
        """JSON with one file or tensor a line, so that `cat` and `grep` show it well."""
        files = _one_per_line({name: record._asdict() for name, record in self.files.items()})
        tensors = _one_per_line({name: record.to_json() for name, record in self.tensors.items()})
        head = f'"format": {FORMAT},\n"step": {self.step},\n"world_size": {self.world_size}'
        return f'{{\n{head},\n"files": {files},\n"tensors": {tensors}\n}}\n'


def _one_per_line(values: dict[str, object]) -> str:
    return (
        "{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        + "\n}"
    )


def shard_name(rank: int, world_size: int) -> str:
    """File that rank `rank` of `world_size` writes."""
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def declare(tensors: dict[str, TensorRecord], name: str, shape: tuple[int, ...], dtype: str) -> TensorRecord:
    """The record of `name`, added if it is new; RuntimeError if it is known with another shape or dtype."""
    record = tensors.setdefault(name, TensorRecord(shape, dtype))
    if (record.shape, record.dtype) != (shape, dtype):
        raise RuntimeError(f"{name}: one piece says {record.dtype} {record.shape}, another {dtype} {shape}")
    return record


def merge(indices: list[ShardIndex]) -> dict[str, TensorRecord]:
    """Tensors of all shards by name, each with its pieces in order.

    Raises RuntimeError, naming the tensor, unless its pieces tile [0, numel) without gap or overlap: a state
    that was handed over incomplete must never be published.
    """
    merged: dict[str, TensorRecord] = {}
    for index in indices:
        for name, part in index.tensors.items():
            declare(merged, name, part.shape, part.dtype).pieces.extend(part.pieces)
    for name, record in merged.items():
        record.pieces.sort(key=lambda piece: piece.start)
        if problem := _untiled(record):
            raise RuntimeError(f"{name}: {problem}")
    return dict(sorted(merged.items()))


def _untiled(record: TensorRecord) -> str | None:
    """What is wrong where the pieces, in their order, do not tile [0, numel)."""
    covered = 0
    for piece in record.pieces:
        if piece.start != covered:
            problem = "held by no rank" if piece.start > covered else "handed over twice"
            low, high = sorted((covered, piece.start))
            return f"elements [{low}, {high}) of {record.numel} are {problem}"
        covered += piece.count
    if covered != record.numel:
        low, high = sorted((covered, record.numel))
        problem = "held by no rank" if covered < record.numel else "outside the tensor"
        return f"elements [{low}, {high}) of {record.numel} are {problem}"
    return None


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write a file that is on disk when this returns. Raises OSError."""
    write_atomically(path, content)
    return FileRecord(len(content), sha256(content))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its seal. Raises OSError."""
    record = write_file(folder / MANIFEST, manifest.to_json().encode())
    write_file(folder / SEAL, _seal(record.sha256))


def _seal(sha256: str) -> bytes:
    return f"{sha256}  {MANIFEST}\n".encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after a check that it describes a whole checkpoint.

    Whoever reads by it gets for every tensor all elements, each once, out of the data of a file that it
    lists; `verify_file` then shows whether the files are those. Raises DamagedCheckpoint if the manifest does
    not match its seal or describes something else, UserError for another format.
    """
    data, seal = read_small(folder, MANIFEST), read_small(folder, SEAL)
    found = sha256(data)
    if seal != _seal(found):
        raise DamagedCheckpoint(folder, MANIFEST, f"has sha256 {found}, which {SEAL} does not confirm")
    try:
        values = json.loads(data)
        version = values["format"]
        if version == FORMAT:
            files = {name: FileRecord(**record) for name, record in values["files"].items()}
            tensors = {name: TensorRecord.from_json(record) for name, record in values["tensors"].items()}
            manifest = Manifest(values["step"], values["world_size"], files, tensors)
            _check(manifest)
            return manifest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedCheckpoint(folder, MANIFEST, f"does not describe a checkpoint: {problem}") from None
    raise UserError(
        f"{folder}: checkpoint format {version}, but this version reads format {FORMAT}; "
        "use the version of millrace that wrote it"
    )


def _check(manifest: Manifest) -> None:
    """Raise ValueError, or TypeError, unless the manifest is one that `write_manifest` could have written."""
    ranks = manifest.world_size
    _require_counts(manifest.step, ranks)
    shards = [shard_name(rank, ranks) for rank in range(len(manifest.files) - 1)]
    if not shards or len(shards) != ranks or manifest.files.keys() != {META, *shards}:
        raise ValueError(f"its files are not {META} and the shards of {ranks} processes")
    for record in manifest.files.values():
        _require_counts(record.bytes)
        if not isinstance(record.sha256, str):
            raise TypeError("a checksum is not text")
    taken: list[list[tuple[int, int]]] = [[] for _ in shards]
    for name, record in manifest.tensors.items():
        _require_counts(*record.shape)
        width = dtype_of(record.dtype).itemsize
        for piece in record.pieces:
            _require_counts(*piece)
            if piece.shard >= len(shards):
                raise ValueError(f"{name} lies in shard {piece.shard} of {len(shards)}")
            taken[piece.shard].append((piece.offset, piece.offset + piece.count * width))
        if problem := _untiled(record):
            raise ValueError(f"{name}: {problem}")
    for shard, ranges in zip(shards, taken, strict=True):
        ranges.sort()
        for (_, end), (start, _) in pairwise([(0, 8), *ranges, (manifest.files[shard].bytes, 0)]):
            if start < end:
                raise ValueError(f"tensors overlap, or lie outside the data, at byte {start} of {shard}")


def _require_counts(*values: Any) -> None:
    """Raise TypeError or ValueError unless all are whole numbers of 0 or more."""
    for value in values:
        if type(value) is not int:
            raise TypeError(f"{value!r} is not a whole number")
        if value < 0:
            raise ValueError(f"{value} is negative")


def read_small(folder: Path, name: str) -> bytes:
    """All of a file of no more than LARGEST bytes. Raises DamagedCheckpoint."""
    try:
        if _size(folder / name) > LARGEST:
            raise DamagedCheckpoint(folder, name, f"is larger than {LARGEST} bytes")
        return (folder / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(folder, name, f"cannot be read: {error.strerror}") from None


def _size(path: Path) -> int:
    """Bytes of a regular file: a device or a pipe has no end. Raises OSError."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "not a regular file")
    return found.st_size


def check_size(folder: Path, name: str, record: FileRecord) -> None:
    """Raises DamagedCheckpoint with expected and found if a file has not the bytes of its record."""
    try:
        size = _size(folder / name)
    except OSError as error:
        raise DamagedCheckpoint(folder, name, f"cannot be read: {error.strerror}") from None
    if size != record.bytes:
        raise DamagedCheckpoint(folder, name, f"has {size} bytes, expected {record.bytes}")


def check_digest(folder: Path, name: str, record: FileRecord, found: str) -> None:
    """Raises DamagedCheckpoint with expected and found if the sha256 of a file is wrong."""
    if found != record.sha256:
        raise DamagedCheckpoint(folder, name, f"has sha256 {found}, expected {record.sha256}")


def verify_file(folder: Path, name: str, record: FileRecord) -> None:
    """Read a file once. Raises DamagedCheckpoint with expected and found if its size or sha256 is wrong."""
    check_size(folder, name, record)
    try:
        found = sha256_file(folder / name)
    except OSError as error:
        raise DamagedCheckpoint(folder, name, f"cannot be read: {error.strerror}") from None
    check_digest(folder, name, record, found)
