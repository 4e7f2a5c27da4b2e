"""Shard writer: the same samples give the same bytes, and a file is there whole or not at all.

A shard's tar appears last, after its indexes, and manifest.json after all shards; so what has a manifest
is complete.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from millrace.engine.data.formats.shard_index import (
    BLOCK,
    ROW,
    Manifest,
    Shard,
    bucket_name,
    key_digest,
    padded,
)
from millrace.engine.data.sources.pictures import Captions
from millrace.engine.util.files import HashingFile, atomic_file, sha256, write_atomically

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
    """Write shard `number` of a bucket (h, w): .npy, .keys, .idx and at last .tar, each replacing what is
    there.

    `first` is the number of the first sample in the whole data set. Memory holds one sample at a time.
    Raises ValueError for no samples, OSError where nothing can be written.
    """
    tar = root / bucket_name(bucket) / f"{number:05d}.tar"
    tar.parent.mkdir(parents=True, exist_ok=True)
    rows, lines, keys = [], [], bytearray()
    with atomic_file(tar) as opened:
        file = HashingFile(opened)

        def put(name: str, data: bytes) -> int:
            """Add a member; where its data begin."""
            file.write(_header(name, len(data)))
            start = file.bytes
            file.write(data)
            file.write(bytes(padded(len(data)) - len(data)))
            return start

        for place, sample in enumerate(samples):
            name = f"{first + place:09d}"
            crc = zlib.crc32(sample.record, zlib.crc32(sample.picture))
            at = put(f"{name}.jpg", sample.picture)
            json_at = put(f"{name}.json", sample.record)
            rows.append(
                (at, len(sample.picture), json_at, len(sample.record), sample.width, sample.height, crc)
            )
            keys += key_digest(json.loads(sample.record)["key"])
            lines.append(
                f"jpg {at} {len(sample.picture)} {name}.jpg json {json_at} {len(sample.record)} {name}.json\n"
            )
        if not rows:
            raise ValueError(f"{tar}: a shard without samples")
        file.write(END)
        index = io.BytesIO()
        np.lib.format.write_array(index, np.array(rows, ROW), version=(1, 0), allow_pickle=False)
        write_atomically(tar.with_suffix(".npy"), index.getvalue())
        write_atomically(tar.with_suffix(".keys"), bytes(keys))
        write_atomically(tar.with_suffix(".idx"), f"{INDEX_VERSION} {len(rows)}\n{''.join(lines)}")
    return Shard(
        file=f"{tar.parent.name}/{tar.name}",
        bucket=bucket,
        samples=len(rows),
        bytes=file.bytes,
        sha256=file.sha256(),
        index_sha256=sha256(index.getvalue()),
        keys_sha256=sha256(bytes(keys)),
    )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json, replacing the one that is there."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_atomically(root / "manifest.json", text)


def _header(name: str, size: int) -> bytes:
    """A tar header that says nothing of when and by whom."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)
