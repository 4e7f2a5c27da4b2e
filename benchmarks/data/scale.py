"""Measure how costs of data, checkpoints and logs grow: opening, order, samples, resuming, layouts, metrics.

python -m benchmarks scale                             # 10 k and 1 M samples, a minute
python -m benchmarks scale --rows 10000 1000000 100000000 --output benchmarks/results/scale.json
python -m benchmarks scale --smoke                     # try the program

Data sets are synthetic: indexes, digests of keys and a manifest as `millrace prepare` writes them, beside
tars that are holes of the right size, so 100 M samples take 11 GB while they are measured. Each number is of
a process of its own. Memory is what that process has more than after its imports: `held` of its own, `mapped`
the pages of files that it looked at, which the processes of a machine share, and `peak` of both. `opened` are
the files of the data set that it opened, each time counted, and `read` the bytes that it read by calls.
"""

import argparse
import io
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from millrace.benchmarks.report import recording, scale_report
from millrace.engine.checkpoint.manifest import (
    META,
    FileRecord,
    PieceRecord,
    TensorRecord,
    declare,
    shard_name,
    write_file,
)
from millrace.engine.checkpoint.manifest import Manifest as CheckpointManifest
from millrace.engine.checkpoint.manifest import write_manifest as write_checkpoint_manifest
from millrace.engine.checkpoint.meta_format import stamp
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.train_state import shares
from millrace.engine.cli import run_command
from millrace.engine.config import Data
from millrace.engine.config.loading import load_config
from millrace.engine.data import fingerprint
from millrace.engine.data.crop import buckets, output_size
from millrace.engine.data.dealing import Dealing
from millrace.engine.data.formats.shard_index import (
    BLOCK,
    ROW,
    Manifest,
    Shard,
    bucket_name,
    digests_of,
    padded,
    read_manifest,
)
from millrace.engine.data.formats.shard_writer import write_manifest
from millrace.engine.data.latent_cache import CacheFile, CacheRecord, TextCache, cache_path, common_path
from millrace.engine.data.sources.folder import FolderSource
from millrace.engine.data.sources.key_subset import keep_listed, write_keys
from millrace.engine.data.sources.mixture import order_of
from millrace.engine.data.sources.pictures import UnreadablePicture
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.data.stream import SampleStream
from millrace.engine.evaluation.statistics import FeatureRows, FeatureSums, Statistics
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import LayoutCache, patchify
from millrace.engine.run_log.logs import set_up_logging
from millrace.engine.run_log.sample_log import SampleLog
from millrace.engine.run_log.side_channels import RecordFile
from millrace.engine.util.files import sha256
from millrace.engine.util.node_cache import VARIABLE

log = logging.getLogger("millrace.benchmarks.scale")

PER_SHARD = 5000
LISTED = 100_000
"""Keys in a list, at most a tenth of the samples."""
MOST_CACHED = 10_000_000
"""Samples of a set that gets a text cache, which takes 100 bytes of a disk for each."""
STEP, BATCH = 900_000, 1024
"""Step at which a run is continued, and its global batch."""
PLACES = 100_000
"""Places of the order that are asked for one after another."""
EDGE = 16
"""Of a token in pixels."""


class Measured(NamedTuple):
    """One number of the table."""

    what: str
    size: int
    seconds: float
    held: float
    """MB."""
    mapped: float
    """MB."""
    peak: float
    """MB."""
    opened: int
    """Files, each time counted."""
    read: float
    """MB."""
    note: str = ""


def make_set(root: Path, rows: int) -> None:
    """A data set of `rows` samples in 27 buckets; the first samples i of each shard have the key `k{i}`."""
    sizes = buckets(512, EDGE)
    random, shards, first = np.random.default_rng(0), [], 0
    counts = np.diff(np.linspace(0, rows, len(sizes) + 1).astype(int))
    for bucket, count in zip(sizes, counts.tolist(), strict=True):
        (root / bucket_name(bucket)).mkdir(parents=True)
        for number, start in enumerate(range(0, count, PER_SHARD)):
            n = min(PER_SHARD, count - start)
            shards.append(_make_shard(root, bucket, number, n, first, random))
            first += n
    filled = tuple(sorted({shard.bucket for shard in shards}))
    manifest = Manifest(resolution=512, aspect="mixed", patch=EDGE, buckets=filled, shards=tuple(shards))
    write_manifest(root, manifest)


def _make_shard(
    root: Path, bucket: tuple[int, int], number: int, n: int, first: int, random: np.random.Generator
) -> Shard:
    rows = np.zeros(n, ROW)
    rows["picture_bytes"] = random.integers(20_000, 100_000, n)
    rows["json_bytes"] = random.integers(200, 400, n)
    ends = np.cumsum(2 * BLOCK + padded(rows["picture_bytes"]) + padded(rows["json_bytes"]))
    rows["picture_offset"] = np.concatenate([[0], ends[:-1]]) + BLOCK
    rows["json_offset"] = rows["picture_offset"] + padded(rows["picture_bytes"]) + BLOCK
    rows["height"], rows["width"] = bucket
    keys = random.integers(0, 1 << 63, (n, 2), np.uint64)
    listed = min(n, PER_SHARD // 10)
    keys[:listed] = digests_of(f"k{i}" for i in range(first, first + listed))
    tar = root / bucket_name(bucket) / f"{number:05d}.tar"
    size = int(ends[-1]) + 2 * BLOCK
    with tar.open("wb") as file:
        file.truncate(size)
    with tar.with_suffix(".npy").open("wb") as file:
        np.lib.format.write_array(file, rows, version=(1, 0))
    tar.with_suffix(".keys").write_bytes(keys.tobytes())
    return Shard(
        file=f"{tar.parent.name}/{tar.name}",
        bucket=bucket,
        samples=n,
        bytes=size,
        sha256=sha256(f"{tar}".encode()),
        index_sha256=sha256(tar.with_suffix(".npy").read_bytes()),
        keys_sha256=sha256(keys.tobytes()),
    )


def memory() -> tuple[float, float, float]:
    """MB of this process now: its own, mapped from files; and the most of both until now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped, peak = (float(fields[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile", "VmHWM"))
    return own, mapped, peak


def _bytes_read() -> int:
    """By calls of this process until now; pages of mapped files are not among them."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def _in_process(pipe: Any, what: str, size: int, action: Callable[..., str | None], words: tuple) -> None:
    set_up_logging()
    folders, opened = [str(word) for word in words if isinstance(word, Path)], [0]

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" and any(str(arguments[0]).startswith(folder) for folder in folders):
            opened[0] += 1

    sys.addaudithook(audit)
    before, read = memory(), _bytes_read()
    begun = time.perf_counter()
    note = action(*words)
    seconds = time.perf_counter() - begun
    after, read = memory(), _bytes_read() - read
    if note is not None and ":seconds:" in note:  # what was prepared before does not count
        note, _, own = note.partition(":seconds:")
        seconds = float(own)
    peak = after[2] - before[0] - before[1]
    held, mapped = after[0] - before[0], after[1] - before[1]
    pipe.send(Measured(what, size, seconds, held, mapped, peak, opened[0], read / 1e6, note or ""))


def measured(what: str, size: int, action: Callable[..., str | None], *words: Any) -> Measured:
    """Run `action` in a process of its own; what it returns is a note, after `:seconds:` its own time."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_in_process, args=(there, what, size, action, words))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    log.info("%s, %s: %.4f s, at most %.0f MB %s", what, f"{size:,}", found.seconds, found.peak, found.note)
    return found


_kept: list[Any] = []
"""What a measured action leaves in memory."""


def open_set(root: Path, local_rank: int) -> str:
    """As a process of a job does."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    source = ShardsSource(root)
    _kept.append((source, fingerprint(source)))
    return f"{len(source.manifest.shards)} shards"


def make_text_cache(root: Path) -> None:
    """A cache of captions of 4 rows of 8 numbers, a caption a sample: what grows is the number of files."""
    manifest, files = read_manifest(root), []
    common = save({"rows": torch.zeros(1, 8, dtype=torch.bfloat16), "cut": torch.zeros(1, dtype=torch.uint8)})
    (root / common_path("text")).write_bytes(common)
    for shard in manifest.shards:
        n, name = shard.samples, cache_path(shard, "text")
        tensors = {
            "rows": torch.zeros(4 * n, 8, dtype=torch.bfloat16),
            "offsets": torch.arange(0, 4 * n + 1, 4),
            "cut": torch.zeros(n, dtype=torch.uint8),
            "long": torch.arange(n),
            "short": torch.arange(n),
        }
        data = save(tensors)
        (root / name).write_bytes(data)
        files.append(CacheFile(file=name, bytes=len(data), sha256=sha256(data), of=shard.sha256))
    one = CacheFile(file=common_path("text"), bytes=len(common), sha256=sha256(common))
    record = CacheRecord(network={}, dtype="bfloat16", common=one, files=tuple(files))
    write_manifest(root, manifest.model_copy(update={"caches": {"text": record.model_dump(mode="json")}}))


def open_text_cache(root: Path, local_rank: int) -> str:
    """As a process of a job does, with the source open."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    manifest = ShardsSource(root).manifest
    begun = time.perf_counter()
    _kept.append(TextCache(root, manifest))
    return f"{len(manifest.shards)} files:seconds:{time.perf_counter() - begun}"


def read_captions(root: Path, count: int) -> str:
    """Rows of captions of random samples."""
    source = ShardsSource(root)
    cache = TextCache(root, source.manifest)
    places = [source.place(i) for i in np.random.default_rng(0).integers(0, len(source), count).tolist()]
    begun = time.perf_counter()
    for place in places:
        cache.rows(place, "long")
    seconds = (time.perf_counter() - begun) / count
    return f"{count} captions of {len(source.manifest.shards)} files; seconds of one:seconds:{seconds}"


def open_folder(root: Path) -> None:
    """As a process of a job does."""
    _kept.append(FolderSource(root))


def read_folder(root: Path, count: int) -> str:
    """Captions and decoded pictures of a folder, in the order of training."""
    source = FolderSource(root)
    config = Data(source="folder", path=str(root), aspect="mixed", resolution=64)
    order = order_of(source, config, 0, 0)
    begun = time.perf_counter()
    for place in range(count):
        index = order.picture(place)[0]
        source.captions(index)
        source.image(index)
    seconds = (time.perf_counter() - begun) / count
    return f"{count} pictures; seconds of one:seconds:{seconds}"


def resume_folder(root: Path) -> str:
    """What a process does with an open folder: compare it with the checkpoint's, and start the stream."""
    source = FolderSource(root)
    values = {"resolution": 64, "global_batch": BATCH, "micro_batch": 4, "workers": 0, "loader": "python"}
    config = Data(source="folder", path=str(root), **values)
    begun = time.perf_counter()
    digest = fingerprint(source)
    compared = time.perf_counter() - begun
    stream = SampleStream(
        source,
        config,
        seed=0,
        patch=EDGE,
        caption_drop=0.1,
        rank=1,
        world_size=BATCH // 4,
        first_sample=STEP * BATCH,
    )
    stream._next_places()
    seconds = time.perf_counter() - begun
    _kept.append((stream, digest))
    return f"of it the fingerprint {compared:.3f} s:seconds:{seconds}"


def walk_order(root: Path, aspect: str) -> str:
    """Continue at a late step: the first place, then the next ones."""
    source = ShardsSource(root)
    config = Data(source="shards", path=str(root), aspect=aspect, global_batch=BATCH, resolution=512)
    begun = time.perf_counter()
    order = order_of(source, config, 0, 0)
    order.picture(STEP * BATCH)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for place in range(STEP * BATCH, STEP * BATCH + PLACES):
        order.picture(place)
    steady = (time.perf_counter() - begun) / PLACES
    _kept.append(order)
    return f"then {steady * 1e6:.2f} us a place:seconds:{first}"


def continue_stream(root: Path, world_size: int) -> str:
    """A stream of one of `world_size` processes at a late step: which samples its first micro-batch has."""
    source = ShardsSource(root)
    config = Data(
        source="shards",
        path=str(root),
        aspect="mixed",
        resolution=512,
        global_batch=4 * world_size,
        micro_batch=4,
        workers=0,
    )
    begun = time.perf_counter()
    stream = SampleStream(
        source,
        config,
        seed=0,
        patch=EDGE,
        caption_drop=0.1,
        rank=world_size - 1,
        world_size=world_size,
        first_sample=STEP * config.global_batch,
    )
    stream._next_places()
    seconds = time.perf_counter() - begun
    _kept.append(stream)
    return f":seconds:{seconds}"


def read_samples(root: Path, count: int) -> str:
    """Read samples in the order of training, the process's whole share of a machine of its own; the tars are
    holes, so each is refused after it was read."""
    source = ShardsSource(root)
    order = order_of(source, Data(source="shards", path=str(root), aspect="mixed", resolution=512), 0, 0)
    begun = time.perf_counter()
    for place in range(count):
        with suppress(UnreadablePicture):
            source.record(order.picture(place)[0])
    seconds = (time.perf_counter() - begun) / count
    return f"{count} samples of {len(source.manifest.shards)} shards; seconds of one:seconds:{seconds}"


def deal(root: Path, resolution: int, world_size: int) -> str:
    """Share out a few steps of mixed sizes, 32 samples for each process; the seconds of a step."""
    source, steps = ShardsSource(root), 10
    config = Data(
        source="shards",
        path=str(root),
        aspect="mixed",
        resolution=resolution,
        global_batch=32 * world_size,
        micro_batch=32,
    )
    rank = world_size // 2
    dealing = Dealing(source, config, order_of(source, config, 0, 0), EDGE, rank, world_size, 0, 0)
    sizes = {}
    dealing.micro_batch(0)
    begun = time.perf_counter()
    dealt = [[place.picture for place in dealing.micro_batch(step)] for step in range(1, steps + 1)]
    seconds = (time.perf_counter() - begun) / steps
    order = order_of(source, config, 0, 0)
    places = [step * config.global_batch + rank * 32 for step in range(1, steps + 1)]
    unsorted = [[order.picture(place + i)[0] for i in range(32)] for place in places]
    for name, batches in (("sorted", dealt), ("unsorted", unsorted)):
        shapes = [{output_size(*source.stored_size(i), config, EDGE) for i in batch} for batch in batches]
        sizes[name] = sum(map(len, shapes)) / steps
    return f"{sizes['sorted']:g} sizes in a micro-batch, {sizes['unsorted']:g} unsorted:seconds:{seconds}"


STATES = ("master", "exp_avg", "exp_avg_sq", "ema")


def make_checkpoint(folder: Path, world_size: int, name: str) -> None:
    """The checkpoint of a configuration as ZeRO-3 leaves it: every tensor is cut into equal parts, one in the
    file of each process. The files are holes."""
    config = load_config(name)
    with torch.device("meta"):
        shapes = [
            (name, tuple(p.shape)) for name, p in Denoiser(config.model, config.routing).named_parameters()
        ]
    tensors: dict[str, TensorRecord] = {}
    sizes = [_HEADER] * world_size
    for state in STATES:
        for name, shape in shapes:
            record = declare(tensors, f"{state}/{name}", shape, "F32")
            for rank in range(world_size):
                start, end = (record.numel * r // world_size for r in (rank, rank + 1))
                if end > start:
                    record.pieces.append(PieceRecord(rank, start, end - start, sizes[rank]))
                    sizes[rank] += 4 * (end - start)
    folder.mkdir()
    files = {}
    for rank, size in enumerate(sizes):
        name = shard_name(rank, world_size)
        with (folder / name).open("wb") as file:
            file.truncate(size)
        files[name] = FileRecord(size, "0" * 64)
    files[META] = write_file(folder / META, json.dumps(stamp() | {"step": STEP}).encode())
    write_checkpoint_manifest(
        folder, CheckpointManifest(STEP, world_size, files, dict(sorted(tensors.items())))
    )


_HEADER = 4096
"""Bytes of a shard before its tensors."""


def resume(folder: Path, world_size: int) -> str:
    """What one process of as many as saved reads: its ranges of optimizer state and averages, and the masters
    that it sends to the others. Holes are read, so the seconds are those of the host."""
    begun = time.perf_counter()
    reader = CheckpointReader(folder, verify=False)
    numels = {name: math.prod(reader.shape(name)) for name in reader.names()}
    masters = [name for name in numels if name.startswith("master/")]
    rank, total, sent = world_size // 2, sum(numels[name] for name in masters), 0
    with reader.kept_open():
        for name, start, count, source in shares({name: numels[name] for name in masters}, world_size):
            if source == rank:
                sent += len(reader.read(name, start, count))
    with reader.kept_open():
        for name in numels.keys() - set(masters):
            start, end = (numels[name] * r // world_size for r in (rank, rank + 1))
            reader.read(name, start, end - start)
    seconds = time.perf_counter() - begun
    return f"{4 * sent / 1e6:.0f} MB of masters, {4 * total / 1e9:.1f} GB in the whole job:seconds:{seconds}"


def list_keys(root: Path, listed: Path) -> str:
    """Keep the pictures that a file names."""
    source = ShardsSource(root)
    begun = time.perf_counter()
    kept = keep_listed(source, listed)
    _kept.append(kept)
    return f"{len(kept)} listed:seconds:{time.perf_counter() - begun}"


def continue_log(path: Path, lines: int) -> None:
    """Open a log at the step before its last ten."""
    file = RecordFile(path, lines - 10)
    file.write({"step": lines - 9})
    file.of_step(lines - 10)


def continue_keys(folder: Path, steps: int) -> None:
    """Open the keys of a run's samples at the step before its last ten."""
    sample_log = SampleLog(folder, steps - 10, keep_keys=True)
    sample_log.step(steps - 9, ["a"], ["long"], {})


def reject(folder: Path, count: int) -> None:
    """Note unreadable pictures, one after another."""
    folder.mkdir()
    sample_log, bad = SampleLog(folder, 0, keep_keys=False), {}
    for number in range(count):
        bad[f"pictures/{number:09d}.jpg"] = "its bytes are not those that were written (CRC-32)"
        sample_log.reject(bad)


def lay_out(batch: int, resolution: int) -> str:
    """Layouts of batches that mix all sizes; the time of one."""
    grids = [(h // EDGE, w // EDGE) for h, w in buckets(resolution, EDGE)]
    cache, random = LayoutCache((32, 32), 10_000.0), np.random.default_rng(0)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    batches = [[grids[i] for i in random.integers(0, len(grids), batch)] for _ in range(100)]
    cache.layout([max(grids, key=max)], starts, 1)
    begun = time.perf_counter()
    for each in batches:
        cache.layout(each, starts, 1)
    seconds = (time.perf_counter() - begun) / len(batches)
    _kept.append(cache)
    return f"{len(grids)} sizes, {batch} samples:seconds:{seconds}"


def pack(batch: int) -> str:
    """Cut latents of all sizes of 256 px into tokens and lay them end to end; latents have one channel, so
    that this is what the host does for it."""
    sizes, random = [(h // EDGE, w // EDGE) for h, w in buckets(256, EDGE)], np.random.default_rng(0)
    cache, starts = LayoutCache((32, 32), 10_000.0), torch.arange(batch + 1, dtype=torch.int32)
    batches = [[sizes[i] for i in random.integers(0, len(sizes), batch)] for _ in range(100)]
    latents = {(rows, columns): torch.zeros(1, 2 * rows, 2 * columns) for rows, columns in sizes}
    cache.layout([max(sizes, key=max)], starts, 1)
    begun = time.perf_counter()
    for grids in batches:
        torch.cat([patchify(latents[grid], 2) for grid in grids])
        cache.layout(grids, starts, 1)
    return f"{len(sizes)} sizes:seconds:{(time.perf_counter() - begun) / len(batches)}"


def compare(kind: type[Statistics], count: int, dim: int) -> str:
    """A metric of two sets of random features, which come in batches of 64."""
    sets = []
    for seed in range(2):
        statistics, generator = kind(), torch.Generator().manual_seed(seed)
        for first in range(0, count, 64):
            features = torch.randn(min(64, count - first), dim, generator=generator)
            statistics.add(first, features / features.norm(dim=1, keepdim=True))
        statistics.together()
        sets.append(statistics)
    sets[0].distance(sets[1])
    return f"{dim} features"


def _write_log(path: Path, lines: int) -> None:
    record = {"loss": 0.123456789, "loss_by_time": [0.1] * 16, "parts": {"a": 1, "b": 2}, "seconds": 0.1}
    rest = json.dumps(record)[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(f'{{"step": {step}, {rest}\n' for step in range(1, lines + 1))


def _write_sample_keys(folder: Path, steps: int) -> None:
    (folder / "keys").mkdir(parents=True)
    keys = json.dumps([f"pictures/{number:09d}.jpg" for number in range(128)])
    with (folder / "keys" / "rank-00000.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}, "keys": {keys}}}\n' for step in range(1, steps + 1))


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A folder that is removed in the end, with a node cache of its own."""
    folder = Path(tempfile.mkdtemp(prefix="millrace-scale-", dir=parent))
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder / "cache")
    try:
        yield folder
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        shutil.rmtree(folder)


def of_data(parent: Path | None, rows: int) -> list[Measured]:
    """All numbers of a data set of `rows` samples."""
    with scratch(parent) as folder:
        root, listed = folder / "set", folder / "listed"
        begun = time.perf_counter()
        make_set(root, rows)
        log.info("%d samples: made in %.1f s", rows, time.perf_counter() - begun)
        starts = [shard.samples for shard in ShardsSource(root).manifest.shards]
        named = (
            f"k{i}"
            for start, n in zip(np.cumsum([0, *starts[:-1]]).tolist(), starts, strict=True)
            for i in range(start, start + min(n, PER_SHARD // 10))
        )
        write_keys(listed, islice(named, min(LISTED, max(rows // 10, 1))))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        found = [
            measured("open, the first time on a machine", rows, open_set, root, 0),
            measured("open, first process", rows, open_set, root, 0),
            measured("open, other processes", rows, open_set, root, 1),
            measured(f"order, mixed: place {STEP * BATCH}", rows, walk_order, root, "mixed"),
            measured(f"order, buckets: place {STEP * BATCH}", rows, walk_order, root, "bucket"),
            *(
                measured(
                    f"stream of {world_size} processes at step {STEP}",
                    rows,
                    continue_stream,
                    root,
                    world_size,
                )
                for world_size in (8, 256, 1024)
            ),
            measured("a sample", rows, read_samples, root, min(2000, rows)),
            *(
                measured(f"sharing out 32 samples of {n} processes, {px} px", rows, deal, root, px, n)
                for px in (256, 512)
                for n in (8, 256, 1024)
            ),
            measured("data.keys, the first time on a machine", rows, list_keys, root, listed),
            measured("data.keys, other processes", rows, list_keys, root, listed),
        ]
        if rows <= MOST_CACHED:
            make_text_cache(root)
            found += [
                measured("open a text cache, the first time on a machine", rows, open_text_cache, root, 0),
                measured("open a text cache, other processes", rows, open_text_cache, root, 1),
                measured("a caption of a text cache", rows, read_captions, root, 20_000),
            ]
        return found


def of_folder(parent: Path | None, count: int) -> list[Measured]:
    """A folder of so many small pictures with captions."""
    with scratch(parent) as folder:
        root, hour_ago, file = folder / "set", time.time() - 3600, io.BytesIO()
        Image.new("RGB", (64, 64), (200, 100, 50)).save(file, "JPEG")
        picture = file.getvalue()
        for first in range(0, count, 1000):
            part = root / f"{first:09d}"
            part.mkdir(parents=True)
            for i in range(first, min(first + 1000, count)):
                (part / f"{i:09d}.jpg").write_bytes(picture)
                caption = part / f"{i:09d}.txt"
                caption.write_text(
                    f"caption {i}: " + "a red fox in the snow, in the light of the evening; " * 8
                )
                os.utime(caption, (hour_ago, hour_ago))
        return [
            measured("open a folder, the first time on a machine", count, open_folder, root),
            measured("open a folder, other processes", count, open_folder, root),
            measured("a picture of a folder", count, read_folder, root, min(2000, count)),
            measured(f"resume on a folder at step {STEP}", count, resume_folder, root),
        ]


def of_resume(parent: Path | None, worlds: list[int], name: str) -> list[Measured]:
    """Resuming a configuration, one of so many processes."""
    found = []
    for world_size in worlds:
        with scratch(parent) as folder:
            make_checkpoint(folder / "step", world_size, name)
            what = f"resume of {name}, ZeRO 3"
            found.append(measured(what, world_size, resume, folder / "step", world_size))
    return found


def of_logs(parent: Path | None, sizes: list[int]) -> list[Measured]:
    """Logs of so many lines, and a tenth as many unreadable pictures."""
    found = []
    for lines in sizes:
        with scratch(parent) as folder:
            _write_log(folder / "log.jsonl", lines)
            found.append(measured("continue log.jsonl", lines, continue_log, folder / "log.jsonl", lines))
            _write_sample_keys(folder, lines // 10)
            found.append(measured("continue sample keys", lines // 10, continue_keys, folder, lines // 10))
            found.append(measured("rejects.jsonl", lines // 10, reject, folder / "rejects", lines // 10))
    return found


def of_layouts() -> list[Measured]:
    """Packing of ragged batches."""
    return [
        *(
            measured(f"layout of a batch of all sizes, {resolution} px", batch, lay_out, batch, resolution)
            for resolution in (256, 1024)
            for batch in (32, 128)
        ),
        *(measured("packing a batch of all sizes, 256 px", batch, pack, batch) for batch in (32, 128)),
    ]


def of_evaluation(sizes: list[int]) -> list[Measured]:
    """Distances between features of so many pictures, and of as many others."""
    return [
        measured(name, count, compare, kind, count, dim)
        for count in sizes
        for name, kind, dim in (("MMD", FeatureRows, 768), ("FID", FeatureSums, 2048))
    ]


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n" + __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="samples; default 10000 1000000")
    parser.add_argument(
        "--folders", type=int, nargs="+", metavar="N", help="pictures of a folder; default 10000 100000"
    )
    parser.add_argument(
        "--worlds", type=int, nargs="+", metavar="N", help="processes that resume; default 256 1024"
    )
    parser.add_argument("--lines", type=int, nargs="+", metavar="N", help="of logs; default 10000 1000000")
    parser.add_argument(
        "--pictures", type=int, nargs="+", metavar="N", help="of metrics; default 2500 5000 10000"
    )
    parser.add_argument("--folder", type=Path, help="where the data sets are made; default the system's")
    parser.add_argument("--smoke", action="store_true", help="a few samples and lines")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers here as JSON")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or ([2000] if arguments.smoke else [10_000, 1_000_000])
    arguments.pictures = arguments.pictures or ([100] if arguments.smoke else [2500, 5000, 10_000])
    arguments.folders = arguments.folders or ([50] if arguments.smoke else [10_000, 100_000])
    arguments.worlds = arguments.worlds or ([2] if arguments.smoke else [256, 1024])
    arguments.lines = arguments.lines or ([200] if arguments.smoke else [10_000, 1_000_000])
    return arguments


def main() -> int:
    """Make, measure, and report."""
    arguments = parse()
    set_up_logging()
    # A process of its own, whose memory is its own; to try the program a copy of this one will do.
    multiprocessing.set_start_method("fork" if arguments.smoke else "spawn")
    rows = [row for size in arguments.rows for row in of_data(arguments.folder, size)]
    rows += [row for size in arguments.folders for row in of_folder(arguments.folder, size)]
    model = "quickstart" if arguments.smoke else "models/prx_7b"
    rows += of_resume(arguments.folder, arguments.worlds, model)
    rows += of_logs(arguments.folder, arguments.lines)
    rows += of_layouts()
    rows += of_evaluation(arguments.pictures)
    print(scale_report.table([row._asdict() for row in rows]).text())
    if arguments.output:
        recording.write(
            arguments.output,
            {
                "benchmark": "scale",
                **recording.environment(),
                "rows": [row._asdict() for row in rows],
            },
        )
    return 0


if __name__ == "__main__":
    run_command(main)
