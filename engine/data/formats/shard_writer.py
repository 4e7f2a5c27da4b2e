"""Shard writer: the same samples give the same bytes, and a file is there whole or not at all.

A shard's tar appears last, after its two indexes, and manifest.json after all shards; so what has a manifest
is complete.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_index import (
    BLOCK,
    ROW,
    Manifest,
    Shard,
    bucket_name,
    padded,
)
from millrace.engine.data.sources.pictures import Captions

INDEX_VERSION = "v1.2"
"""Of the format of .idx files, which DALI's tool wds2idx writes."""
END = bytes(2 * BLOCK)
"""Two empty blocks end a tar file."""


class StoredSample(NamedTuple):
    """What a shard holds of one sample."""

    picture: bytes
    """A JPEG file: upright, RGB."""
    record: bytes
    """The JSON that `sample_record` makes."""
    width: int
    """Pixels of the stored picture."""
    height: int


def sample_record(key: str, captions: Captions, width: int, height: int) -> bytes:
    """The JSON beside a picture; width and height are those of the original in pixels, upright."""
    values = {"key": key, "long": captions.long, "short": captions.short, "width": width, "height": height}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def shard_bytes(picture_bytes: int, record_bytes: int) -> int:
    """Bytes that a sample takes in a tar."""
    return 2 * BLOCK + padded(picture_bytes) + padded(record_bytes)


def write_shard(
    root: Path, bucket: tuple[int, int], number: int, samples: Iterable[StoredSample], first: int
) -> Shard:
    """Write shard `number` of a bucket (h, w): .npy, .idx and at last .tar, each replacing what is there.

    `first` is the number of the first sample in the whole data set. Memory holds one sample at a time.
    Raises ValueError for no samples, OSError where nothing can be written.
    """
    tar = root / bucket_name(bucket) / f"{number:05d}.tar"
    tar.parent.mkdir(parents=True, exist_ok=True)
    rows, lines = [], []
    digest, offset = hashlib.sha256(), 0
    with replacing(tar) as file:

        def put(data: bytes) -> None:
            nonlocal offset
            digest.update(data)
            file.write(data)
            offset += len(data)

        def put_file(name: str, data: bytes) -> int:
            put(_header(name, len(data)))
            start = offset
            put(data)
            put(bytes(padded(len(data)) - len(data)))
            return start

        for place, sample in enumerate(samples):
            name = f"{first + place:09d}"
            crc = zlib.crc32(sample.record, zlib.crc32(sample.picture))
            at = put_file(f"{name}.jpg", sample.picture)
            json_at = put_file(f"{name}.json", sample.record)
            rows.append(
                (at, len(sample.picture), json_at, len(sample.record), sample.width, sample.height, crc)
            )
            lines.append(
                f"jpg {at} {len(sample.picture)} {name}.jpg json {json_at} {len(sample.record)} {name}.json\n"
            )
        if not rows:
            raise ValueError(f"{tar}: a shard without samples")
        put(END)
        index = io.BytesIO()
        np.lib.format.write_array(index, np.array(rows, ROW), version=(1, 0), allow_pickle=False)
        write_whole(tar.with_suffix(".npy"), index.getvalue())
        write_whole(tar.with_suffix(".idx"), f"{INDEX_VERSION} {len(rows)}\n{''.join(lines)}".encode())
    return Shard(
        file=f"{tar.parent.name}/{tar.name}",
        bucket=bucket,
        samples=len(rows),
        bytes=offset,
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
    )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json, replacing the one that is there."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_whole(root / "manifest.json", text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, on disk before it does."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _header(name: str, size: int) -> bytes:
    """A tar header that says nothing of when and by whom."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)
