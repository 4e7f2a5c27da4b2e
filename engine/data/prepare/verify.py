"""Verification of a data set of shards: every byte of every file against the manifest, and every record."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from millrace.engine.data.formats.shard_index import BLOCK, Shard, read_index, read_keys, read_manifest
from millrace.engine.data.formats.shard_writer import INDEX_VERSION
from millrace.engine.data.prepare.progress import Progress
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import HashingFile


def verify(root: Path, threads: int) -> list[str]:
    """What is wrong with the data set `root`, a line each; empty if nothing is.

    Raises UserError where there is no manifest to compare with.
    """
    manifest = read_manifest(root)
    progress = Progress("verifying", manifest.samples, 0, 1.0)

    def check(shard: Shard) -> list[str]:
        return list(_problems(root, shard))

    try:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            problems = []
            for shard, found in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
                problems += found
                progress.report(shard.samples, 0)
                progress.finish_part(shard.samples, shard.samples)
            return problems
    finally:
        progress.close()


def _problems(root: Path, shard: Shard) -> list[str]:
    path = root / shard.file
    try:
        rows = read_index(root, shard)
        if shard.keys_sha256 is not None:
            read_keys(root, shard)
    except UserError as error:
        return [str(error)]
    found = []
    try:
        digest, damaged, names = _read_shard(path, rows)
        if digest != shard.sha256:
            where = f"; damaged records: {', '.join(map(str, damaged[:10]))}" if damaged else ""
            found.append(f"{path}: its SHA-256 is not that of the manifest{where}")
        elif path.with_suffix(".idx").read_text() != _dali_index(rows, names):
            found.append(f"{path.with_suffix('.idx')}: is not the index of its tar")
    except (OSError, ValueError) as error:
        found.append(f"{path}: cannot be read: {error}")
    return found


def _read_shard(path: Path, rows: np.ndarray) -> tuple[str, list[int], list[str]]:
    """SHA-256 of a tar, rows whose record does not have its CRC-32, and names of the samples."""
    damaged, names = [], []
    with path.open("rb") as opened:
        file, at = HashingFile(opened), 0
        for number, row in enumerate(rows):
            header = file.read(int(row["picture_offset"]) - at)[-BLOCK:]
            names.append(header[:100].rstrip(b"\0").decode("ascii", "replace").removesuffix(".jpg"))
            picture = file.read(int(row["picture_bytes"]))
            file.read(int(row["json_offset"] - row["picture_offset"] - row["picture_bytes"]))
            record = file.read(int(row["json_bytes"]))
            at = int(row["json_offset"] + row["json_bytes"])
            if zlib.crc32(record, zlib.crc32(picture)) != int(row["crc32"]):
                damaged.append(number)
        while file.read(1 << 20):
            pass
    return file.sha256(), damaged, names


def _dali_index(rows: np.ndarray, names: list[str]) -> str:
    """What the .idx file of a tar must say."""
    lines = [f"{INDEX_VERSION} {len(rows)}\n"]
    for row, name in zip(rows, names, strict=True):
        picture = f"jpg {row['picture_offset']} {row['picture_bytes']} {name}.jpg"
        lines.append(f"{picture} json {row['json_offset']} {row['json_bytes']} {name}.json\n")
    return "".join(lines)
