"""Recaptioning: other captions for the samples of a data set, by key, without touching a picture's bytes.

    FILE ──▶ DATASET/.recaptioning/captions, found by a hash of the key ──▶ changed shards under free numbers
    ──▶ manifest.json, replaced in one rename ──▶ the old shards are removed

Until the rename the data set is the old one, and after it the new one. A shard without changes stays.
"""

import fcntl
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from millrace.engine.data.captions import Captions, checked
from millrace.engine.data.formats.shard_index import Manifest, Shard, bucket_name, read_index, read_manifest
from millrace.engine.data.formats.shard_writer import (
    StoredSample,
    sample_record,
    write_manifest,
    write_shard,
)
from millrace.engine.data.latent_cache import CacheRecord, cache_path, record_of
from millrace.engine.data.prepare.known_items import INDEX
from millrace.engine.data.prepare.parts import key_hash
from millrace.engine.data.prepare.progress import Progress
from millrace.engine.data.prepare.publishing import READY, remove_shards
from millrace.engine.data.prepare.reports import caption_summary, draw_caption_lengths
from millrace.engine.data.prepare.workers import Workers
from millrace.engine.data.reject_reasons import Reason, Rejected
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import atomic_file, sha256_file, write_atomically

WORK = ".recaptioning"
EXAMPLES = 3
"""Keys of each kind that a message names."""
_LINE = np.dtype([("low", "<u8"), ("high", "<u8"), ("offset", "<i8")])
"""Of one line of captions: a hash of its key, and where it begins in the file `captions`."""


class Recaptioned(NamedTuple):
    """What was done."""

    manifest: Manifest
    changed: int
    """Samples with other captions than before."""
    notes: list[str]
    """For people."""


def recaption(root: Path, captions: Path, workers: int) -> Recaptioned:
    """Give the samples of the data set `root` the captions of the file `captions`.

    Raises UserError for a file that is neither JSONL nor Parquet with keys and captions, for a data set that
    is not complete or is being changed, and where nothing can be written.
    """
    manifest = read_manifest(root)
    if (root / ".preparing").exists() or (root / READY).exists():
        raise UserError(f"{root}: is being made or brought up to date; let millrace prepare end first")
    work = root / WORK
    try:
        work.mkdir(exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{root}: another millrace prepare is writing it; wait for its end") from None
            done = _recaption(root, work, manifest, captions, workers)
            shutil.rmtree(work)
        return done
    except OSError as error:
        where = error.filename or root
        raise UserError(f"{where}: cannot be read or written: {error.strerror or error}") from None


def _recaption(root: Path, work: Path, manifest: Manifest, captions: Path, workers: int) -> Recaptioned:
    lines, notes = _spool(captions, work)
    digest = sha256_file(work / "captions")
    results: dict[int, _Result] = {}
    tasks, firsts, taken = [], 0, {shard.file for shard in manifest.shards}
    numbers: dict[tuple[int, int], int] = {}
    for place, shard in enumerate(manifest.shards):
        number = numbers.get(shard.bucket, 0)
        while f"{bucket_name(shard.bucket)}/{number:05d}.tar" in taken:
            number += 1
        numbers[shard.bucket] = number + 1
        tasks.append((root, shard, number, firsts, digest))
        firsts += shard.samples
        if (found := _load(work, shard, digest)) and (found.shard is None or _is_whole(root, found.shard)):
            results[place] = found
    waiting = [place for place in range(len(tasks)) if place not in results]
    progress = Progress("recaptioning", manifest.samples, 0, 1.0)
    try:
        with Workers(min(workers, len(waiting)), progress.report) as pool:
            for at, result in pool.run(recaption_shard, (tasks[place] for place in waiting)):
                results[waiting[at]] = result
                samples = manifest.shards[waiting[at]].samples
                progress.finish_part(samples, samples)
    finally:
        progress.close()
    in_order = [results[place] for place in range(len(tasks))]
    matched = np.zeros(len(lines), bool)
    for result in in_order:
        matched[result.lines] = True
    if not matched.all():
        keys = [_line(work / "captions", int(at))["key"] for at in lines["offset"][~matched][:EXAMPLES]]
        notes.append(f"{(~matched).sum():,} keys are not in the data set, such as {', '.join(keys)}")
    without = manifest.samples - sum(len(result.lines) for result in in_order)
    if without:
        notes.append(f"{without:,} samples have no line in {captions} and keep their captions")
    long = np.concatenate([result.long for result in in_order])
    short = np.concatenate([result.short for result in in_order])
    changed = sum(result.changed for result in in_order)
    if not changed:  # perhaps since an earlier call ended right after the rename
        remove_shards(root, taken)
        draw_caption_lengths(long, short, root / "caption_lengths.png")
        return Recaptioned(manifest, 0, notes)
    shards = [result.shard or shard for result, shard in zip(in_order, manifest.shards, strict=True)]
    caches = dict(manifest.caches)
    if "latents" in caches and (record := _moved_latents(root, manifest, shards)) is not None:
        caches["latents"] = record.model_dump(mode="json")
    if "text" in caches:
        notes.append(f"its text cache is stale; make it again with millrace cache text --dataset {root}")
    new = manifest.model_copy(
        update={
            "shards": tuple(shards),
            "caches": caches,
            "caption_characters": {"long": caption_summary(long), "short": caption_summary(short)},
            "settings": manifest.settings | {"captions": digest},
        }
    )
    write_manifest(root, new)
    remove_shards(root, {shard.file for shard in shards})
    (root / INDEX).unlink(missing_ok=True)  # the input does not have these captions
    draw_caption_lengths(long, short, root / "caption_lengths.png")
    return Recaptioned(new, changed, notes)


class _Result(NamedTuple):
    """What became of a shard."""

    shard: Shard | None
    """The new one, or None where no caption has changed."""
    changed: int
    lines: np.ndarray
    """int64: sorted lines of captions that belong to its samples."""
    long: np.ndarray
    """(samples,) int32: lengths of the captions in characters."""
    short: np.ndarray


def recaption_shard(
    root: Path, shard: Shard, number: int, first: int, digest: str, report: Callable[[int, int], None]
) -> _Result:
    """Write the shard under another number if any of its captions changes, and last what was done."""
    work = root / WORK
    lines, index = np.load(work / "lines.npy", mmap_mode="r"), read_index(root, shard)
    records, found, lengths, changed = [], [], [], 0
    with (root / shard.file).open("rb") as tar, (work / "captions").open("rb") as captions:

        def read(at: Any, size: Any) -> bytes:
            tar.seek(int(at))
            return tar.read(int(size))

        for row in index:
            record = read(row["json_offset"], row["json_bytes"])
            values = _values(record, root / shard.file)
            line = _find(lines, key_hash(values["key"]))
            if line is not None:
                found.append(line)
                captions.seek(int(lines["offset"][line]))
                given = json.loads(captions.readline())
                both = Captions(given.get("long", values["long"]), given.get("short", values["short"]))
                if both != (values["long"], values["short"]):
                    record = sample_record(values["key"], both, values["width"], values["height"])
                    changed += 1
                    values |= {"long": both.long, "short": both.short}
            records.append(record)
            lengths.append((len(values["long"]), len(values["short"])))
            report(1, 0)

        def samples() -> Iterator[StoredSample]:
            for row, record in zip(index, records, strict=True):
                picture = read(row["picture_offset"], row["picture_bytes"])
                old = read(row["json_offset"], row["json_bytes"])
                if zlib.crc32(old, zlib.crc32(picture)) != int(row["crc32"]):
                    at = int(row["picture_offset"])
                    raise UserError(
                        f"{root / shard.file}: the sample at byte {at} is damaged; restore the file"
                    )
                yield StoredSample(picture, record, int(row["width"]), int(row["height"]))

        new = write_shard(root, shard.bucket, number, samples(), first) if changed else None
    long, short = np.array(lengths, np.int32).T
    result = _Result(new, changed, np.array(found, np.int64), long, short)
    file = io.BytesIO()
    values = {"digest": digest, "changed": changed, "shard": new and new.model_dump(mode="json")}
    np.savez(file, lines=result.lines, long=long, short=short, values=json.dumps(values))
    write_atomically(_done_path(work, shard), file.getvalue())
    return result


def _load(work: Path, shard: Shard, digest: str) -> _Result | None:
    """What `recaption_shard` has made with the same captions, if it came to its end."""
    try:
        with np.load(_done_path(work, shard), allow_pickle=False) as held:
            values = json.loads(str(held["values"]))
            if values["digest"] != digest:
                return None
            new = values["shard"] and Shard.model_validate(values["shard"])
            return _Result(new, values["changed"], held["lines"], held["long"], held["short"])
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _done_path(work: Path, shard: Shard) -> Path:
    return work / f"{shard.sha256[:32]}.npz"


def _is_whole(root: Path, shard: Shard) -> bool:
    tar = root / shard.file
    return tar.is_file() and tar.stat().st_size == shard.bytes and tar.with_suffix(".idx").is_file()


def _find(lines: np.ndarray, key: bytes) -> int | None:
    low, high = (int(half) for half in np.frombuffer(key, "<u8"))
    at = int(np.searchsorted(lines["low"], np.uint64(low)))
    while at < len(lines) and int(lines["low"][at]) == low:
        if int(lines["high"][at]) == high:
            return at
        at += 1
    return None


def _values(record: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(record)
        if all(isinstance(values[name], str) for name in ("key", "long", "short")):
            return values
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: a record is damaged; restore the file")


def _moved_latents(root: Path, manifest: Manifest, shards: list[Shard]) -> CacheRecord | None:
    """The record of the latents, which belong to the new shards too: the pictures are the same."""
    try:
        record = record_of(root, manifest, "latents")
    except UserError:
        return None  # they are stale already
    files = []
    for file, old, new in zip(record.files, manifest.shards, shards, strict=True):
        if new.file != old.file:
            target = root / cache_path(new, "latents")
            target.unlink(missing_ok=True)
            try:
                os.link(root / file.file, target)
            except OSError:  # a file system without links
                with (root / file.file).open("rb") as held, atomic_file(target) as copy:
                    shutil.copyfileobj(held, copy)
            file = file.model_copy(update={"file": cache_path(new, "latents"), "of": new.sha256})
        files.append(file)
    return record.model_copy(update={"files": tuple(files)})


def _spool(captions: Path, work: Path) -> tuple[np.ndarray, list[str]]:
    """Write the captions to `work` as lines of JSON, and their hashes, sorted; notes of what is left out."""
    offsets, hashes, bad = [], bytearray(), []
    with atomic_file(work / "captions") as file:
        at = 0
        for where, values in _read(captions):
            try:
                line = _checked(values)
            except Rejected as problem:
                bad.append(f"{where} ({problem.detail})" if len(bad) < EXAMPLES else "")
                continue
            data = json.dumps(line).encode() + b"\n"
            file.write(data)
            offsets.append(at)
            hashes += key_hash(line["key"])
            at += len(data)
    if not offsets:
        raise UserError(f"{captions}: has no line with a key and a caption" + (f": {bad[0]}" if bad else ""))
    lines = np.empty(len(offsets), _LINE)
    lines["low"], lines["high"] = np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2).T
    lines["offset"] = offsets
    lines = lines[np.lexsort((lines["offset"], lines["high"], lines["low"]))]
    again = np.zeros(len(lines), bool)
    again[1:] = (lines["low"][1:] == lines["low"][:-1]) & (lines["high"][1:] == lines["high"][:-1])
    notes = []
    if bad:
        notes.append(f"{len(bad):,} lines cannot be used, such as {', '.join(filter(None, bad))}")
    if again.any():
        keys = [_line(work / "captions", int(at))["key"] for at in lines["offset"][again][:EXAMPLES]]
        notes.append(f"{again.sum():,} lines repeat a key, such as {', '.join(keys)}; the first one counts")
    lines = lines[~again]
    with atomic_file(work / "lines.npy") as file:
        np.save(file, lines)
    return lines, notes


def _read(path: Path) -> Iterator[tuple[str, object]]:
    """(place, values) of every line of a JSONL file or row of a Parquet file."""
    if path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("reading Parquet files needs pyarrow: pip install pyarrow") from None
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = [n for n in ("key", "long", "short", "caption") if n in file.schema_arrow.names]
                number = 0
                for batch in file.iter_batches(1024, columns=names):
                    for values in batch.to_pylist():
                        yield f"row {number}", {n: v for n, v in values.items() if v is not None}
                        number += 1
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError):
                    yield f"line {number}", None


def _checked(values: object) -> dict[str, str]:
    """`key` and one or both of `long` and `short`. Raises Rejected."""
    if not isinstance(values, dict) or not isinstance(values.get("key"), str):
        raise Rejected(Reason.MISSING_CAPTION, "no key")
    key = values["key"]
    given = {"long": values["caption"], "short": values["caption"]} if "caption" in values else {}
    given |= {name: values[name] for name in ("long", "short") if name in values}
    if not given:
        raise Rejected(Reason.MISSING_CAPTION, "no caption")
    return {"key": key} | {name: checked(value, f'"{name}"') for name, value in given.items()}


def _line(path: Path, offset: int) -> dict[str, str]:
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())
