"""Sharded tensors of a checkpoint: each rank writes the ranges it holds, any rank reads those it wants.

Under ZeRO a rank owns a contiguous range of every flattened tensor, all of it, or nothing. `write_shard`
puts one rank's ranges into one safetensors file (key `name@start`); `CheckpointReader` assembles any range
of a tensor from the files that cover it. No pickle, and no communication between ranks.

    tensor "w", 10 elements      [0 1 2 3 4 5 6 | 7 8 9]     written by 2 ranks
                                 [0 1 2 | 3 4 5 | 6 7 8 9]   read by 3

The safetensors library cannot write these files: it moves every CUDA tensor to the host at once, and cannot
hash or fsync what it writes.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from millrace.engine.checkpoint.damage import BadElements, bad_elements, describe, total
from millrace.engine.checkpoint.manifest import (
    META,
    DamagedCheckpoint,
    FileRecord,
    PieceRecord,
    ShardIndex,
    TensorRecord,
    check_digest,
    check_size,
    declare,
    read_manifest,
    read_small,
    shard_name,
    verify_file,
)
from millrace.engine.checkpoint.meta_format import current_meta
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import HashingFile, atomic_file
from millrace.engine.util.safetensors_file import dtype_code, dtype_of, tensor_bytes, write_safetensors

_CHUNK = 2**24
"""Bytes that are checked at a time; a multiple of every element's size."""
_KEPT_OPEN = 64
"""Shards that stay open in `CheckpointReader.kept_open`."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + data.numel()) of the flattened tensor `name` of full shape `shape`.

    `data` is 1-D, on any device; it may be empty, which still makes the tensor known.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


def write_shard(path: Path, pieces: Iterable[Piece], shard: int) -> ShardIndex:
    """Write the pieces of one rank to `path` (fsync included), copying to the host one piece at a time.

    What it returns says, too, which elements are bad: they are counted as they pass, and written all the
    same. Raises RuntimeError for a piece that does not fit its tensor, OSError if the disk refuses.
    """
    tensors: dict[str, TensorRecord] = {}
    filled: list[tuple[TensorRecord, Piece]] = []
    for piece in pieces:
        record = declare(tensors, piece.name, tuple(piece.shape), _code(piece))
        stop = piece.start + piece.data.numel()
        if piece.data.dim() != 1 or not 0 <= piece.start <= stop <= record.numel:
            raise RuntimeError(
                f"{piece.name}: a piece is a 1-D range inside [0, {record.numel}), this one starts at "
                f"{piece.start} and has shape {tuple(piece.data.shape)}"
            )
        if piece.data.numel():
            filled.append((record, piece))

    names = {_key(piece): piece.name for _, piece in filled}
    bad: list[dict[str, BadElements]] = []

    def look(key: str, values: Tensor) -> None:
        if found := bad_elements(names[key], values):
            bad.append({names[key]: found})

    with atomic_file(path) as opened:
        file = HashingFile(opened)
        offsets = write_safetensors(file, {_key(piece): piece.data for _, piece in filled}, look=look)
    for record, piece in filled:
        record.pieces.append(PieceRecord(shard, piece.start, piece.data.numel(), offsets[_key(piece)]))
    return ShardIndex(FileRecord(file.bytes, file.sha256()), tensors, total(bad))


def _key(piece: Piece) -> str:
    return f"{piece.name}@{piece.start}"


def _code(piece: Piece) -> str:
    try:
        return dtype_code(piece.data.dtype)
    except ValueError as error:
        raise RuntimeError(f"{piece.name}: {error}") from None


class CheckpointReader:
    """A published checkpoint, read by name and range on the CPU.

    Opening always checks the manifest against its seal, and `meta.json` against the manifest; `verify` also
    reads every shard once for its sha256. Raises DamagedCheckpoint, or UserError for another format version.
    No file stays open between calls but in `kept_open`, so the folder may be pruned while a reader exists.
    """

    meta: dict[str, Any]
    """What the writer gave as `meta`, as JSON returns it (tuples are lists), brought to the newest format."""
    written_by: str
    """Version of Millrace."""
    step: int

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self._open: OrderedDict[str, BinaryIO] | None = None
        self._manifest = read_manifest(self.folder)
        self.step, self.world_size = self._manifest.step, self._manifest.world_size
        verify_file(self.folder, META, self._manifest.files[META])
        try:
            values = json.loads(read_small(self.folder, META))
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpoint(self.folder, META, f"is not JSON: {error}") from None
        self.meta, self.written_by = current_meta(values, self.folder)
        if verify:
            self.verify()

    def verify(self, share: int = 0, of: int = 1, sound: bool = False) -> None:
        """Check size and sha256 of every `of`-th file, from file number `share` on; the default is all files.

        With `verify(rank, world_size)` on every rank each file is read by one of them. `sound` also refuses
        bad elements (`damage.py`) in any tensor.
        """
        for name, record in list(self._manifest.files.items())[share::of]:
            if name == META:
                verify_file(self.folder, name, record)
            else:
                self._verify_shard(name, record, sound)

    def _verify_shard(self, name: str, record: FileRecord, sound: bool) -> None:
        """Read a shard once, for its sha256 and for its elements."""
        check_size(self.folder, name, record)
        bad: list[dict[str, BadElements]] = []
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, record.bytes)))

        def pass_on(file: BinaryIO, size: int) -> Iterator[memoryview]:
            while size:
                part = buffer[: min(size, len(buffer))]
                if file.readinto(part) < len(part):
                    raise DamagedCheckpoint(self.folder, name, f"ends {size} bytes too early")
                digest.update(part)
                size -= len(part)
                yield part

        in_header = None
        try:
            with open(self.folder / name, "rb") as file:
                (head,) = pass_on(file, 8)
                begin, at = 8 + int.from_bytes(head, "little"), 8
                for offset, size, tensor in self._held_by(name):
                    for _ in pass_on(file, offset - at):
                        pass
                    for part in pass_on(file, size):
                        values = torch.frombuffer(part, dtype=self.dtype(tensor))
                        if found := bad_elements(tensor, values):
                            bad.append({tensor: found})
                    if offset < begin:
                        in_header = tensor
                    at = offset + size
                for _ in pass_on(file, record.bytes - at):
                    pass
        except OSError as error:
            raise DamagedCheckpoint(self.folder, name, f"cannot be read: {error.strerror}") from None
        check_digest(self.folder, name, record, digest.hexdigest())
        if in_header:
            raise DamagedCheckpoint(self.folder, name, f"has its header where {in_header} should be")
        if bad and sound:
            raise DamagedCheckpoint(
                self.folder, name, f"holds a damaged training state: {describe(total(bad))}"
            )

    def _held_by(self, file: str) -> list[tuple[int, int, str]]:
        """(first byte, bytes, tensor) of each piece in a shard, in the order of the bytes."""
        held = []
        for name, record in self._manifest.tensors.items():
            width = dtype_of(record.dtype).itemsize
            held += [
                (piece.offset, piece.count * width, name)
                for piece in record.pieces
                if shard_name(piece.shard, self._manifest.world_size) == file
            ]
        return sorted(held)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return list(self._manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self._record(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return dtype_of(self._record(name).dtype)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in its full shape."""
        return self.read(name).reshape(self.shape(name))

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Elements [start, start + count) of the flattened tensor, 1-D; by default all from `start` on.

        Raises UserError for an unknown name, ValueError for a range outside the tensor, DamagedCheckpoint if
        a shard is shorter than it was (possible without `verify` only).
        """
        record = self._record(name)
        stop = record.numel if count is None else start + count
        if not 0 <= start <= stop <= record.numel:
            raise ValueError(f"{name}: range [{start}, {stop}) lies outside [0, {record.numel})")
        result = torch.empty(stop - start, dtype=self.dtype(name))
        width = result.element_size()
        for piece in record.pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.count)
            if low < high:
                self._read_into(
                    tensor_bytes(result[low - start : high - start]), piece, (low - piece.start) * width
                )
        return result

    def _read_into(self, target: memoryview, piece: PieceRecord, skip: int) -> None:
        """Fill `target` with the bytes of `piece` after its first `skip`."""
        name = shard_name(piece.shard, self._manifest.world_size)
        try:
            with self._file(name) as file:
                file.seek(piece.offset + skip)
                found = file.readinto(target)
        except OSError as error:
            raise DamagedCheckpoint(self.folder, name, f"cannot be read: {error.strerror}") from None
        if found != len(target):
            raise DamagedCheckpoint(self.folder, name, f"ends {len(target) - found} bytes too early")

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """In this block the shards that were read last stay open: what a rank resumes from mostly lies in
        one, and each of its tensors would cost an open, on a file system that all ranks ask at once."""
        if self._open is not None:
            yield
            return
        self._open = OrderedDict()
        try:
            yield
        finally:
            while self._open:
                self._open.popitem()[1].close()
            self._open = None

    @contextmanager
    def _file(self, name: str) -> Iterator[BinaryIO]:
        if self._open is None:
            with open(self.folder / name, "rb") as file:
                yield file
            return
        if name not in self._open:
            self._open[name] = open(self.folder / name, "rb")  # noqa: SIM115 closed by `kept_open`
            if len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        yield self._open[name]

    def _record(self, name: str) -> TensorRecord:
        try:
            return self._manifest.tensors[name]
        except KeyError:
            raise UserError(
                f"{self.folder} holds no tensor {name!r}: a run with another model or optimizer wrote it"
            ) from None
