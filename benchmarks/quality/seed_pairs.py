"""Seed noise: runs that differ only in seed, and what `millrace compare` says of their pairs.

python -m benchmarks seed_pairs                                      # 40 seeds, 20 pairs; minutes on one core
python -m benchmarks seed_pairs --seeds 4 --output pairs.json        # try it
python -m benchmarks seed_pairs --judge                              # the same runs by the rules of today

A small denoiser on the built-in digits, once for each seed, and for a few seeds with ten times the learning
rate and a tenth of it. Kept are the records of the held-out loss; tests judge the pairs from them.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from millrace.benchmarks.report.recording import RESULTS, environment, write
from millrace.engine.cli import command_parser, number, run_command
from millrace.engine.comparison.run_curves import HELD_OUT, Curve, RunCurves
from millrace.engine.comparison.seed_noise import half_width, spread_of_course
from millrace.engine.comparison.verdicts import compare_pair
from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.run_log.logs import VALIDATION
from millrace.engine.trainer import train

SMALL: dict[str, Any] = {
    "run": {"steps": 300, "device": "cpu"},
    "model": {"width": 48, "depth": 2, "heads": 2, "patch_size": 8, "in_channels": 3, "context_dim": 32},
    "conditioning": {"text": {"kind": "hash"}, "autoencoder": {"kind": "pixels"}},
    "data": {
        **{"source": "digits", "resolution": 32, "crop_scale": 0.95},
        **{"global_batch": 16, "micro_batch": 16, "workers": 0},
    },
    "optimizer": {"lr": 2e-3, "eps": 1e-8, "clip": 1.0},
    "schedule": {"kind": "cosine", "warmup": 20, "final": 0.05},
    "ema": {"enabled": True, "decay": 0.9, "every": 5},
    "precision": {"compute": "float32"},
    "checkpoint": {"every_steps": 1000, "keep": 1},
    "validation": {"every_steps": 25, "share": 0.1, "samples": 64, "times": 4},
    "logging": {"every_steps": 25, "tensorboard": False},
}
"""A run of seconds."""
RATES = {"same": 1.0, "tenfold": 10.0, "tenth": 0.1}
OTHER_SEEDS = 5
"""Seeds of the settings that do differ."""


def config_of(folder: Path, seed: int, rate: float = 1.0, **changes: Any) -> Config:
    """A run of `SMALL` with this seed, and the learning rate times `rate`."""
    values = merge(SMALL, {"run": {"seed": seed, "output_dir": str(folder)}})
    values = merge(values, {"optimizer": {"lr": SMALL["optimizer"]["lr"] * rate}})
    return parse_config(merge(values, changes), "seed_pairs")


def summary_of(folder: Path) -> dict[str, Any]:
    """The held-out losses of a run; those of each picture for the last measurement alone."""
    records = [json.loads(line) for line in (folder / VALIDATION).read_text().splitlines()]
    found: dict[str, Any] = {"set": records[-1]["set"], "samples_seen": [], "loss": {}, "losses": {}}
    for record in records:
        weights = record["weights"]
        found["loss"].setdefault(weights, []).append(round(record["loss"], 7))
        found["losses"][weights] = [round(loss, 5) for loss in record["losses"]]
        if weights == "model":
            found["samples_seen"].append(record["samples_seen"])
    return found


def curves_of(run: dict[str, Any]) -> RunCurves:
    """A run of the results as compare reads one."""
    counts, found = run["samples_seen"], RunCurves(f"{run['name']}-{run['seed']}", run["seed"], {}, 16)
    found.settings["optimizer.lr"] = SMALL["optimizer"]["lr"] * RATES[run["name"]]
    for weights, losses in run["loss"].items():
        values = dict(zip(counts, losses, strict=True))
        curve = Curve(values, dict.fromkeys(values, run["set"]), {counts[-1]: run["losses"][weights]})
        found.curves[HELD_OUT[weights]] = curve
    return found


def verdicts(pairs: Iterable[tuple[RunCurves, RunCurves]]) -> Counter[str]:
    """How often which verdict is given of pairs of single runs, by what decides."""
    return Counter(compare_pair(first, second).rows[0].verdict for first, second in pairs)


def judged(runs: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Verdicts of disjoint pairs of seeds, of all pairs, and of each other learning rate beside the usual."""
    curves = {name: [curves_of(run) for run in runs if run["name"] == name] for name in RATES}
    same = curves["same"]
    found = {
        "pairs": verdicts(zip(same[::2], same[1::2], strict=False)),
        "all pairs": verdicts(combinations(same, 2)),
    }
    for name in list(RATES)[1:]:
        found[name] = verdicts((first, second) for first in same for second in curves[name])
    return {name: dict(counts) for name, counts in found.items()}


class Measured(NamedTuple):
    """Of all pairs of runs that differ in seed, as root mean squares."""

    spread: float
    """Difference of the EMA's loss at the end, relative to the loss."""
    ratio: float
    """The same difference over the spread of the model's loss along the training."""
    by_pictures: float
    """Share of the pairs that the pictures alone would tell apart with CONFIDENCE."""


def measured(runs: list[dict[str, Any]]) -> Measured:
    """What the constants of compare come from."""
    same = [curves_of(run) for run in runs if run["name"] == "same"]
    spreads, ratios, told = [], [], []
    for first, second in combinations(same, 2):
        interval = compare_pair(first, second).rows[0].interval
        one, two = (run.curves[HELD_OUT["model"]].values for run in (first, second))
        course = spread_of_course([two[n] - one[n] for n in sorted(one)])
        ema = first.curves[HELD_OUT["ema"]].values
        spreads.append((interval.difference / ema[max(ema)]) ** 2)
        ratios.append((interval.difference / course) ** 2)
        told.append(abs(interval.difference) > half_width(interval.pictures, None))
    return Measured(fmean(spreads) ** 0.5, fmean(ratios) ** 0.5, fmean(told))


def main() -> int:
    """Train every seed, write the records."""
    parser: argparse.ArgumentParser = command_parser(__doc__)
    parser.add_argument(
        "--seeds", type=number(int, 2), default=40, metavar="N", help="runs that differ only so"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "seed_pairs.json", metavar="FILE.json")
    parser.add_argument(
        "--judge", action="store_true", help="train nothing, judge the runs of --output again"
    )
    arguments = parser.parse_args()
    if arguments.judge:
        content = json.loads(arguments.output.read_text())
        return finish(content, content["runs"], arguments.output)
    torch.set_num_threads(1)
    jobs = [("same", seed) for seed in range(arguments.seeds)]
    jobs += [
        (name, seed) for name in RATES if name != "same" for seed in range(min(OTHER_SEEDS, arguments.seeds))
    ]
    runs = []
    with tempfile.TemporaryDirectory(prefix="seed-pairs-") as scratch:
        for name, seed in jobs:
            folder = Path(scratch) / f"{name}-{seed}"
            config = config_of(folder, seed, RATES[name])
            train(config)
            runs.append({"name": name, "seed": seed, **summary_of(folder)})
            print(f"{name} seed {seed}: held-out loss {runs[-1]['loss']['ema'][-1]:.5f}", flush=True)
    head = {"benchmark": "seed_pairs", **environment(), "config": SMALL, "rates": RATES}
    return finish(head, runs, arguments.output)


def finish(head: dict[str, Any], runs: list[dict[str, Any]], path: Path) -> int:
    """Judge the pairs, write and tell."""
    found = judged(runs)
    write(path, head | {"verdicts": found, "runs": runs})
    for name, counts in found.items():
        print(f"{name}: {', '.join(f'{count} {verdict}' for verdict, count in sorted(counts.items()))}")
    print(measured(runs))
    print(f"results in {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
