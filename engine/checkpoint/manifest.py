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
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256, sha256_file, write_atomically

FORMAT = 1
MANIFEST, SEAL, META = "manifest.json", "manifest.sha256", "meta.json"


class DamagedCheckpoint(UserError):
    """A published checkpoint is not what was written: its `folder`, the `file` at fault and the `problem`."""

    def __init__(self, folder: Path, file: str, problem: str) -> None:
        super().__init__(
            f"{folder} is damaged: {file} {problem}; restore the file or take another checkpoint"
        )
        self.folder, self.file, self.problem = folder, file, problem


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
        covered = 0
        for piece in record.pieces:
            if piece.start != covered:
                problem = "held by no rank" if piece.start > covered else "handed over twice"
                low, high = sorted((covered, piece.start))
                raise RuntimeError(f"{name}: elements [{low}, {high}) of {record.numel} are {problem}")
            covered += piece.count
        if covered != record.numel:
            raise RuntimeError(
                f"{name}: elements [{covered}, {record.numel}) of {record.numel} are held by no rank"
            )
    return dict(sorted(merged.items()))


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
    """Raises DamagedCheckpoint if the manifest does not match its seal, UserError for another format."""
    data, seal = _read(folder, MANIFEST), _read(folder, SEAL)
    found = sha256(data)
    if seal != _seal(found):
        raise DamagedCheckpoint(folder, MANIFEST, f"has sha256 {found}, which {SEAL} does not confirm")
    values = json.loads(data)
    if values["format"] != FORMAT:
        raise UserError(
            f"{folder}: checkpoint format {values['format']}, but this version reads format {FORMAT}; "
            "use the version of millrace that wrote it"
        )
    files = {name: FileRecord(**record) for name, record in values["files"].items()}
    tensors = {name: TensorRecord.from_json(record) for name, record in values["tensors"].items()}
    return Manifest(values["step"], values["world_size"], files, tensors)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(folder, name, f"cannot be read: {error.strerror}") from None


def verify_file(folder: Path, name: str, record: FileRecord) -> None:
    """Read a file once. Raises DamagedCheckpoint with expected and found if its size or sha256 is wrong."""
    try:
        size = os.path.getsize(folder / name)
        if size != record.bytes:
            raise DamagedCheckpoint(folder, name, f"has {size} bytes, expected {record.bytes}")
        found = sha256_file(folder / name)
    except OSError as error:
        raise DamagedCheckpoint(folder, name, f"cannot be read: {error.strerror}") from None
    if found != record.sha256:
        raise DamagedCheckpoint(folder, name, f"has sha256 {found}, expected {record.sha256}")
