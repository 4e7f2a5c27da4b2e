"""Measure how fast pictures are loaded: our pipelines, webdataset, mosaicml-streaming and torch's DataLoader.

python -m benchmarks dataloader --output benchmarks/results/dataloader.json   # an hour on two cores
python -m benchmarks dataloader --cases 1024 --rounds 3 --seconds 4           # a look
python -m benchmarks dataloader --smoke                                       # try the program

All read the same JPEG files, which are made once (`picture_set.py`) and lie in the page cache, with as many
threads or worker processes as there are cores, and give batches (B, 3, h, w) uint8 of random crops:

  256           pictures stored for buckets of 256 pixels, at the size of their bucket
  1024          pictures stored for buckets of 1024 pixels, at the size of their bucket
  1024 to 256   the latter as squares of 256 pixels

First every loader gives an epoch, whose pictures are counted by shape. Then they take turns: in each turn a
loader that was halted runs on alone, what it had ready is passed over, and the images of the next seconds are
counted. Reported are median, p20 and p80 of the turns, and the cores that one GPU needs for the throughputs
that the engine aims at.
"""

import argparse
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from millrace.benchmarks.data import picture_set
from millrace.benchmarks.data.dataloader_peers import CONTESTANTS, Case, Round, Runner
from millrace.benchmarks.report import dataloader_report as report
from millrace.benchmarks.report import recording
from millrace.benchmarks.report.charts import draw_beside
from millrace.engine.cli import run_command
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.run_log.logs import set_up_logging
from millrace.engine.util.errors import UserError

log = logging.getLogger("millrace.benchmarks.dataloader")

LARGE, SMALL = 1024, 256
SMOKE = 8
"""Factor by which --smoke makes pictures smaller."""
BATCH = {LARGE: 16, SMALL: 32}


def prepare_cases(folder: Path, count: int, workers: int, smoke: bool) -> list[Case]:
    """Make the data sets that are not there yet."""
    shrink = SMOKE if smoke else 1
    log.info("%d pictures in %s", count, folder)
    pictures = picture_set.make_pictures(folder / "pictures", count, LARGE // shrink, workers)
    cases = []
    for resolution in (SMALL, LARGE):
        shards, mds, files = (folder / f"{kind}-{resolution}" for kind in ("shards", "mds", "files"))
        picture_set.make_shards(pictures, shards, resolution // shrink, workers, picture_set.PATCH // shrink)
        picture_set.copy_to_mds(shards, mds)
        picture_set.copy_to_files(shards, files)
        batch = BATCH[resolution] // shrink
        cases.append(Case(str(resolution), shards, mds, files, resolution // shrink, False, batch))
    small = cases[0]
    name = f"{LARGE} to {SMALL}"
    return [*cases, cases[1]._replace(name=name, resolution=small.resolution, square=True, batch=small.batch)]


def expected_shapes(case: Case) -> Counter[tuple[int, ...]]:
    """How many pictures of each shape a case has."""
    source = ShardsSource(case.shards)
    sizes = [case.size(source.buckets[number]) for number in source.bucket_of]
    return Counter((3, *size) for size in sizes)


def check(name: str, found: Counter[tuple[int, ...]], case: Case) -> None:
    """Raises UserError unless an epoch of a loader is right.

    Ours end an epoch with a whole batch and carry what is left of each bucket into the next;
    mosaicml-streaming drops what does not fill a batch of its bucket, or evenly all workers.
    """
    expected = expected_shapes(case)
    total = expected.total()
    if CONTESTANTS[name].ours:
        slack, right = 4 * case.batch, found.total() == total // case.batch * case.batch
    elif name == "mosaicml-streaming":
        slack, right = 2 * case.batch, found.total() <= total
    else:
        slack, right = 0, found.total() == total
    buckets = Counter((3, *case.size(bucket)) for bucket in ShardsSource(case.shards).buckets)
    near = all(abs(found[shape] - expected[shape]) <= slack * buckets[shape] for shape in expected)
    if not (right and near and found.keys() <= expected.keys()):
        raise UserError(f"{name}, {case.name}: an epoch gives {dict(found)}, not {dict(expected)}")


def measure(
    runners: list[Runner], case: Case, rounds: int, seconds: float
) -> tuple[dict[str, list[Round]], dict[str, int]]:
    """Turns of every loader, and the pictures in its epoch."""
    images = {}
    for runner in runners:
        runner.open(case)
        found = runner.epoch()
        check(runner.name, found, case)
        images[runner.name] = found.total()
        log.info("%s, %s: an epoch has %d pictures", case.name, runner.name, found.total())
    turns: dict[str, list[Round]] = {runner.name: [] for runner in runners}
    for i in range(rounds):
        for runner in runners if i % 2 == 0 else reversed(runners):
            turns[runner.name].append(runner.measure(seconds))
            log.info(
                "%s, round %d, %s: %.1f images/s",
                case.name,
                i + 1,
                runner.name,
                turns[runner.name][-1].images / turns[runner.name][-1].seconds,
            )
    return turns, images


def row(case: Case, name: str, turns: list[Round], images: int, cores: int) -> dict[str, Any]:
    """What is written of one loader in one case."""
    rates = [turn.images / turn.seconds for turn in turns]
    p20, median, p80 = np.percentile(rates, (20, 50, 80)).tolist()
    loaded, busy = sum(turn.images for turn in turns), sum(turn.cpu_seconds for turn in turns)
    return {
        "case": case.name,
        "loader": name,
        "ours": CONTESTANTS[name].ours,
        "filter": CONTESTANTS[name].filter,
        "batch": case.batch,
        "epoch_images": images,
        "images_per_second_median": median,
        "images_per_second_p20": p20,
        "images_per_second_p80": p80,
        "images_per_second_per_core": median / cores,
        "cpu_seconds_per_image": busy / loaded,
        "measured_images": loaded,
        "images_per_second": rates,
    }


def describe(case: Case) -> dict[str, Any]:
    """What a case reads."""
    source = ShardsSource(case.shards)
    widths, heights = zip(*(source.stored_size(i) for i in range(len(source))), strict=True)
    return {
        "name": case.name,
        "pictures": len(source),
        "shards": len(source.manifest.shards),
        "buckets": len(source.buckets),
        "mean_bytes": sum(len(source.encoded(i)) for i in range(len(source))) / len(source),
        "mean_megapixels": float(np.mean(np.array(widths) * np.array(heights)) / 1e6),
        "resolution": case.resolution,
        "square": case.square,
    }


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n" + __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    names = (str(SMALL), str(LARGE), f"{LARGE} to {SMALL}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the data sets; default runs/dataloader")
    parser.add_argument("--pictures", type=int, metavar="N", help="default 2000, with --smoke 40")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--loaders", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument(
        "--cores", type=int, default=cores, metavar="N", help=f"that may be used; default {cores}"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each loader; default 9")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each turn; default 6")
    parser.add_argument("--smoke", action="store_true", help="few and small pictures, one short turn")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows here as JSON")
    arguments = parser.parse_args()
    if not 1 <= arguments.cores <= cores:
        parser.error(f"--cores {arguments.cores}: this process may use {cores}")
    smoke = arguments.smoke
    arguments.data = arguments.data or recording.ROOT / "runs" / (
        "dataloader-smoke" if smoke else "dataloader"
    )
    arguments.pictures = arguments.pictures or (40 if smoke else 2000)
    arguments.rounds = arguments.rounds or (1 if smoke else 9)
    arguments.seconds = arguments.seconds or (0.2 if smoke else 6.0)
    return arguments


def main() -> int:
    """Make the pictures, check every loader, measure, and report."""
    arguments = parse()
    set_up_logging()
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    cases = prepare_cases(arguments.data, arguments.pictures, len(cores), arguments.smoke)
    cases = [case for case in cases if case.name in arguments.cases]
    runners: list[Runner] = []
    rows = []
    try:
        for name in arguments.loaders:
            runners.append(Runner(name, len(cores), cores))
        for case in cases:
            turns, images = measure(runners, case, arguments.rounds, arguments.seconds)
            rows += [row(case, name, turns[name], images[name], len(cores)) for name in turns]
    finally:
        for runner in runners:
            runner.close()
    print(report.table(rows).text(), "Cores that feed one H200:", report.needs(rows).text(), sep="\n\n")
    if arguments.output is not None:
        result = {
            "benchmark": "dataloader",
            **recording.environment(),
            "device": "cpu",
            "smoke": arguments.smoke,
            "cores": len(cores),
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "cases": [describe(case) for case in cases],
            "rows": rows,
        }
        recording.write(arguments.output, result)
        print(draw_beside(report.draw, result, arguments.output))
    return 0


if __name__ == "__main__":
    run_command(main)
