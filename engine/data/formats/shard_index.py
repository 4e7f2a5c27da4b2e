"""Shard manifest and indexes: manifest.json of a data set of shards, and one index a shard.

    DATASET/manifest.json         the shards in the order that numbers the samples, counts, checksums
    DATASET/768x1344/00000.tar    pictures 768 high and 1344 wide or larger: 000000123.jpg 000000123.json ...
    DATASET/768x1344/00000.idx    the same tar for DALI's reader
    DATASET/768x1344/00000.npy    (samples,) of ROW: where each file lies in the tar
    DATASET/768x1344/00000.keys   (samples, 2) <u8: `key_digest` of each sample's key; older sets have none

Both are checked completely when they are read, so nothing that comes later meets an offset outside a file.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from millrace.engine.data.formats.byte_store import Place, open_store
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256

FORMAT = "millrace shards"
VERSION = 1
BLOCK = 512
"""Bytes of a tar block: a header is one, data is padded to a multiple of it."""
ROW = np.dtype(
    [
        ("picture_offset", "<i8"),
        ("picture_bytes", "<i8"),
        ("json_offset", "<i8"),
        ("json_bytes", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("crc32", "<u4"),
    ]
)
"""Of one sample: offset and size in bytes of the data (not the header) of its two files in the tar; size in
pixels of the stored picture; CRC-32 of the picture's bytes followed by the JSON's."""


class Shard(BaseModel):
    """One tar file of the manifest."""

    model_config = ConfigDict(frozen=True, extra="allow")

    file: str = Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*/[0-9]{5,}\.tar$")
    """Path in the data set: `HxW/number.tar`."""
    bucket: tuple[int, int]
    """(h, w) in pixels."""
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    """Size of the tar."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the tar."""
    index_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the .npy file."""
    keys_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Of the .keys file; None where a shard was made without one."""

    @model_validator(mode="after")
    def _folder(self) -> "Shard":
        if self.file.split("/")[0] != bucket_name(self.bucket):
            raise ValueError(f"{self.file} does not lie in the folder of its bucket {list(self.bucket)}")
        return self


class Manifest(BaseModel):
    """manifest.json. Keys that this version does not know are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: str = FORMAT
    version: int = VERSION
    resolution: int = Field(ge=1)
    """Edge in pixels of the square with the area of a bucket."""
    aspect: str = Field(pattern="^(mixed|square)$")
    patch: int = Field(ge=1)
    """Edges of buckets are multiples of this many pixels."""
    buckets: tuple[tuple[int, int], ...]
    """(h, w) of the buckets that have samples, sorted."""
    shards: tuple[Shard, ...] = Field(min_length=1)
    """Sample i of the data set counts through them in this order."""
    counts: dict[str, int] = {}
    """seen: samples of the input; samples: those in the shards; rejected: those that are not;
    unusable_profiles: samples with a colour profile that cannot be used, taken as sRGB."""
    histogram: dict[str, int] = {}
    """Samples by bucket `HxW`."""
    rejects: dict[str, int] = {}
    """Inputs that are not in the shards, by reason."""
    reject_examples: dict[str, list[str]] = {}
    """Keys of the first few of each reason; rejects.jsonl has all."""
    caption_characters: dict[str, dict[str, float]] = {}
    """Of long and short captions: min, median, mean, p95, p99, max."""
    settings: dict[str, Any] = {}
    """With which the data set was made."""
    caches: dict[str, Any] = {}
    """Text embeddings and latents beside the shards."""

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.format != FORMAT or self.version != VERSION:
            raise ValueError(
                f"it is {self.format!r} version {self.version}; this is for {FORMAT!r} version {VERSION}"
            )
        if sorted({shard.bucket for shard in self.shards}) != list(self.buckets):
            raise ValueError("buckets are not those of the shards, sorted")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is named twice")
        return self

    @property
    def samples(self) -> int:
        """Of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of all shards in order: which samples the data set has, and their
        numbers. Caches do not change it."""
        lines = [f"{shard.file} {shard.samples} {shard.sha256}\n" for shard in self.shards]
        return sha256("".join(lines).encode())


def beside(shard: Shard, suffix: str) -> str:
    """Path in the data set of what lies beside a tar, with the same name but for the suffix."""
    return shard.file.removesuffix(".tar") + suffix


def bucket_name(bucket: tuple[int, int]) -> str:
    """Folder of a bucket (h, w): `HxW`."""
    return f"{bucket[0]}x{bucket[1]}"


def read_manifest(place: Place) -> Manifest:
    """manifest.json of a data set. Raises UserError."""
    store = open_store(place)
    path = store.where("manifest.json")
    if not store.is_remote and not Path(store.root).is_dir():
        raise UserError(
            f"{store.root}: no such folder; set data.path to a folder that millrace prepare has made"
        )
    try:
        values = json.loads(store.whole("manifest.json"))
    except FileNotFoundError:
        raise UserError(
            f"{store.root}: there is no manifest.json, so this is no data set of shards or not a complete "
            "one; run millrace prepare (again) to make it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct or restore it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {_one_line(error)}; restore it") from None
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise UserError(
            f"{path}: {where}: {_one_line(first['msg'])}; restore it or run millrace prepare again"
        ) from None


def read_index(place: Place, shard: Shard) -> np.ndarray:
    """(samples,) of ROW of one shard, every row checked against the size of the tar. Raises UserError."""
    store, file = open_store(place), beside(shard, ".npy")

    def refuse(reason: str) -> UserError:
        return UserError(f"{store.where(file)}: {reason}; restore it or run millrace prepare again")

    try:
        data = store.whole(file)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    if sha256(data) != shard.index_sha256:
        raise refuse("its SHA-256 is not that of the manifest")
    return parse_index(data, shard, refuse)


def parse_index(data: bytes, shard: Shard, refuse: Any) -> np.ndarray:
    """The rows in the bytes of a .npy file; `refuse(reason)` makes the error that is raised."""
    # Not by np.load: it reads the header with Python's parser, which several threads at a time upset
    # ("AST constructor recursion depth mismatch" in Python 3.11).
    length = int.from_bytes(data[8:10], "little")
    header, body = data[: 10 + length], data[10 + length :]
    expected = _npy_header(shard.samples)
    if header[:8] != expected[:8] or header[10:].rstrip() != expected[10:].rstrip():
        raise refuse(f"not an index of {shard.samples} samples, which the manifest says the shard has")
    if len(body) != shard.samples * ROW.itemsize:
        raise refuse(f"has {len(body)} bytes of rows, not {shard.samples * ROW.itemsize}")
    rows = np.frombuffer(body, ROW)
    fields = {name: rows[name].astype(np.int64) for name in ROW.names}
    picture, end = fields["picture_offset"], fields["picture_offset"] + padded(fields["picture_bytes"])
    after = fields["json_offset"] + padded(fields["json_bytes"])
    starts = np.concatenate([[0], after[:-1]])
    sound = (
        (fields["picture_bytes"] > 0).all()
        and (fields["json_bytes"] > 0).all()
        and max(fields["picture_bytes"].max(), fields["json_bytes"].max()) <= shard.bytes
        and (fields["width"] > 0).all()
        and (fields["height"] > 0).all()
        and (picture == starts + BLOCK).all()
        and (fields["json_offset"] == end + BLOCK).all()
        and after[-1] <= shard.bytes
    )
    if not sound:
        raise refuse("its offsets do not fit the tar file")
    return rows


def key_digest(key: str) -> bytes:
    """16 bytes of BLAKE2b that stand for a key: a list of keys is compared by them."""
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()


def digests_of(keys: Iterable[str]) -> np.ndarray:
    """(n, 2) uint64 of the digests of keys."""
    return np.frombuffer(b"".join(map(key_digest, keys)), "<u8").reshape(-1, 2)


def read_keys(place: Place, shard: Shard) -> np.ndarray:
    """(samples, 2) uint64, `key_digest` of the keys of a shard that has them. Raises UserError."""
    store, file = open_store(place), beside(shard, ".keys")
    path = store.where(file)
    try:
        data = store.whole(file)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; restore it or run millrace prepare again"
        ) from None
    if sha256(data) != shard.keys_sha256 or len(data) != 16 * shard.samples:
        raise UserError(
            f"{path}: its SHA-256 is not that of the manifest; restore it or run millrace prepare again"
        )
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def _npy_header(samples: int) -> bytes:
    """What a .npy file of (samples,) of ROW begins with; white space at its end differs between versions."""
    header = io.BytesIO()
    values = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(header, values)
    return header.getvalue()


def padded(size: Any) -> Any:
    """A size in bytes, or an array of them, rounded up to whole tar blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
