"""Measure how fast shards are read from a web server that is far away and fails, beside the same on a disk.

python -m benchmarks remote                               # ten minutes on two cores
python -m benchmarks remote --workers 1 2 --latency 0.1 --requests 128
python -m benchmarks remote --smoke                       # try the program

The pictures are those of `dataloader` at 256 pixels, in the page cache. The server is a process of this
machine and takes its share of the cores. Each turn is a process of its own: its first micro-batches are
passed over, then the images of an epoch are counted. The loaders take turns, and "of disk" is the median of
the ratios within a round, since others may use the machine:

  disk          the folder
  no cache      the server, nothing kept
  first epoch   the server, into an empty cache
  second epoch  the server, from the cache that the turn before has filled

Before that every sample is compared with that of the folder, bit for bit, and two processes at
once read through a cache that holds a fifth of the set.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from millrace.benchmarks.data import faulty_server, picture_set
from millrace.benchmarks.report import recording, remote_report
from millrace.engine.cli import run_command
from millrace.engine.config import Data
from millrace.engine.config.data import Remote
from millrace.engine.data import SampleStream, open_source
from millrace.engine.data.formats.shard_index import read_index, read_manifest
from millrace.engine.run_log.logs import set_up_logging
from millrace.engine.util.errors import UserError
from millrace.engine.util.node_cache import VARIABLE

log = logging.getLogger("millrace.benchmarks.remote")

RESOLUTION, LARGE = 256, 1024
BATCH = 32
SMOKE = 8
"""Factor by which --smoke makes pictures smaller."""
PASSED_OVER = 8
"""Micro-batches before the images are counted."""
LOADERS = ("disk", "no cache", "first epoch", "second epoch")
CACHE_SHARE = 0.2
"""Of the set, in the test of the bound."""


class Turn(NamedTuple):
    """One epoch of one loader."""

    images: int
    seconds: float
    cpu_seconds: float
    """Of the loader's process."""
    server_cpu_seconds: float = 0.0


def settings(path: str, resolution: int, workers: int, **remote: Any) -> Data:
    """The data section of a loader."""
    return Data(
        source="shards",
        path=path,
        resolution=resolution,
        aspect="bucket",
        bucket_run=BATCH,
        global_batch=BATCH,
        micro_batch=BATCH,
        loader="python",
        workers=workers,
        prefetch=2 * workers,
        remote=Remote(**remote),
    )


def stream_of(data: Data) -> tuple[SampleStream, int]:
    """The stream of training, and the micro-batches that hold an epoch."""
    source = open_source(data)
    stream = SampleStream(source, data, seed=0, patch=1, caption_drop=0.1, rank=0, world_size=1)
    return stream, -(-len(source) // data.micro_batch)


def measure(data: Data) -> Turn:
    """Count an epoch, in a process of its own."""
    stream, epoch = stream_of(data)
    for _ in islice(stream, PASSED_OVER):
        pass
    start, busy = time.perf_counter(), time.process_time()
    images = sum(len(batch.images) for batch in islice(stream, epoch))
    turn = Turn(images, time.perf_counter() - start, time.process_time() - busy)
    stream.close()
    return turn


def digest(data: Data) -> tuple[str, int]:
    """SHA-256 of pixels, captions and keys until every sample came, and how many samples have none.

    A micro-batch holds pictures of one size, so the rarest come after more batches than an epoch has.
    """
    stream, _ = stream_of(data)
    found, seen, all_samples = hashlib.sha256(), set[str](), len(open_source(data))
    for batch in stream:
        for pixels, caption, key in zip(batch.images, batch.captions, batch.keys, strict=True):
            found.update(pixels.numpy().tobytes() + repr((tuple(pixels.shape), caption, key)).encode())
        seen.update(batch.keys)
        if len(seen) + len(stream.bad) >= all_samples:
            break
    stream.close()
    return found.hexdigest(), len(stream.bad)


def alone(function: Any, data: Data) -> Any:
    """The result of `function(data)` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, data).result()


@contextmanager
def served(root: Path, *arguments: str) -> Iterator[str]:
    """URL of a faulty server of `root`, in a process of its own."""
    command = [sys.executable, "-m", faulty_server.__name__, str(root), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def counts(url: str) -> dict[str, int]:
    """What a server has answered so far."""
    with urllib.request.urlopen(url + faulty_server.STATISTICS) as answer:
        return json.load(answer)


def within_bound(url: str, folder: Path, resolution: int, size: int) -> dict[str, Any]:
    """Two processes read every sample through one cache; the most that it takes meanwhile."""
    limit, most, stop = int(size * CACHE_SHARE), 0, threading.Event()
    data = settings(url, resolution, 1, cache_dir=str(folder), cache_gb=limit / 1e9)

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            taken = 0
            try:
                for entry in os.scandir(folder):
                    taken += entry.stat().st_blocks * 512 if entry.name != "used" else 0
            except FileNotFoundError:  # emptied meanwhile, or not there yet
                continue
            most = max(most, taken)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(digest, [data, data]))
    stop.set()
    watcher.join()
    return {"limit": limit, "most": most, "digests": [value for value, _ in found]}


def rates_of(turns: list[Turn]) -> list[float]:
    """Images per second."""
    return [turn.images / turn.seconds for turn in turns]


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n" + __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the pictures; default runs/dataloader")
    parser.add_argument("--pictures", type=int, metavar="N", help="default 2000, with --smoke 80")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="default 1 2")
    parser.add_argument("--latency", type=float, default=0.05, metavar="S", help="of a request; default 0.05")
    parser.add_argument("--failures", type=float, default=0.05, metavar="SHARE", help="of requests: 503")
    parser.add_argument("--cuts", type=float, default=0.01, metavar="SHARE", help="of requests: half a body")
    parser.add_argument("--requests", type=int, default=Remote().requests, metavar="N", help="in flight")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each loader; default 5")
    parser.add_argument("--smoke", action="store_true", help="few and small pictures, one turn")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows here as JSON")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    name = "dataloader-smoke" if smoke else "dataloader"
    arguments.data = arguments.data or recording.ROOT / "runs" / name
    arguments.pictures = arguments.pictures or (80 if smoke else 2000)
    arguments.rounds = arguments.rounds or (1 if smoke else 5)
    return arguments


def main() -> int:
    """Make the pictures, compare, measure, and report."""
    arguments = parse()
    set_up_logging()
    shrink = SMOKE if arguments.smoke else 1
    resolution, cores = RESOLUTION // shrink, len(os.sched_getaffinity(0))
    pictures = picture_set.make_pictures(
        arguments.data / "pictures", arguments.pictures, LARGE // shrink, cores
    )
    shards = arguments.data / f"shards-{RESOLUTION}"
    picture_set.make_shards(pictures, shards, resolution, cores, picture_set.PATCH // shrink)
    manifest = read_manifest(shards)
    size = sum(shard.bytes for shard in manifest.shards)
    shard = manifest.shards[0]
    flip = f"{shard.file}:{int(read_index(shards, shard)['picture_offset'][1]) + 100}"
    faults = [f"--latency={arguments.latency}", f"--failures={arguments.failures}"]
    faults += [f"--cuts={arguments.cuts}", f"--flip={flip}"]
    with tempfile.TemporaryDirectory() as scratch, served(shards, *faults) as url:
        os.environ[VARIABLE] = scratch
        cache = Path(scratch) / "cache"
        many = {"requests": arguments.requests}
        far = {
            "disk": (str(shards), {}),
            "no cache": (url, many | {"cache_gb": 0}),
            "first epoch": (url, many | {"cache_dir": str(cache)}),
            "second epoch": (url, many | {"cache_dir": str(cache)}),
        }
        expected, _ = alone(digest, settings(str(shards), resolution, cores))
        found, bad = alone(digest, settings(url, resolution, cores, **far["no cache"][1]))
        if found != expected or bad:
            raise UserError(f"{url}: the samples are not those of {shards} ({bad} unreadable)")
        compared = counts(url)
        print(f"the same bits as from the disk; the server's counts: {compared}")
        bound = within_bound(url, Path(scratch) / "small", resolution, size)
        if bound["digests"] != [expected, expected] or bound["most"] > bound["limit"]:
            raise UserError(f"{url}: two processes with one cache: {bound}")
        print(f"two processes, one cache: at most {bound['most']:,} of {bound['limit']:,} bytes")
        rows = []
        for workers in arguments.workers:
            turns: dict[str, list[Turn]] = {name: [] for name in LOADERS}
            for i in range(arguments.rounds):
                shutil.rmtree(cache, ignore_errors=True)
                for name in LOADERS:
                    path, remote = far[name]
                    before = counts(url)["cpu_seconds"]
                    turn = alone(measure, settings(path, resolution, workers, **remote))
                    turn = turn._replace(server_cpu_seconds=counts(url)["cpu_seconds"] - before)
                    turns[name].append(turn)
                    rate, load = turn.images / turn.seconds, psutil.getloadavg()[0]
                    log.info(
                        "%d threads, round %d, %s: %.0f images/s, load %.1f", workers, i + 1, name, rate, load
                    )
            disk = rates_of(turns["disk"])
            for name, some in turns.items():
                rates = rates_of(some)
                p20, median, p80 = np.percentile(rates, (20, 50, 80)).tolist()
                images = sum(turn.images for turn in some)
                rows.append(
                    {
                        "workers": workers,
                        "loader": name,
                        "images_per_second_median": median,
                        "images_per_second_p20": p20,
                        "images_per_second_p80": p80,
                        "of_disk": float(np.median(np.divide(rates, disk))),
                        "cpu_seconds_per_image": sum(turn.cpu_seconds for turn in some) / images,
                        "server_cpu_seconds_per_image": sum(turn.server_cpu_seconds for turn in some)
                        / (images + len(some) * PASSED_OVER * BATCH),
                        "images_per_second": rates,
                    }
                )
        print(remote_report.table(rows).text())
        if arguments.output is not None:
            recording.write(
                arguments.output,
                {
                    "benchmark": "remote",
                    "smoke": arguments.smoke,
                    **recording.environment(),
                    "settings": {
                        key: getattr(arguments, key)
                        for key in ("latency", "failures", "cuts", "requests", "rounds", "pictures")
                    },
                    "same_bits": {"samples": manifest.samples, "server": compared},
                    "server": counts(url),
                    "bound": bound,
                    "rows": rows,
                },
            )
            print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
