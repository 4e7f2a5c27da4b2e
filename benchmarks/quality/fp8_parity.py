"""Does training in FP8 reach the loss that training in BF16 reaches?

python -m benchmarks fp8_parity                       # train, results/fp8_parity.json and its chart
python -m benchmarks fp8_parity --quick --work /tmp/parity --output /tmp/parity.json

The same small model is trained on the same real pictures, with the same seed, once in BF16 and once with
each way to do the blocks' matrix products in FP8, for several seeds. Weights, order of the samples, noise and
times are functions of the seed, so two runs of one seed differ by their arithmetic alone, and their losses
can be compared step by step. The measure is how far they are apart beside how far runs of two seeds are.
Held-out loss is the engine's, of parts of pictures that no run was trained on, by the trained weights in
FP32.

On a CPU the FP8 products are emulated: numbers are rounded as on a GPU, and speeds say nothing. A run that
was interrupted is continued; --work keeps them.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from millrace.benchmarks.data.picture_set import make_pictures
from millrace.benchmarks.quality.ablations_run import averages, held_out_losses
from millrace.benchmarks.report import recording
from millrace.benchmarks.report.charts import draw_beside
from millrace.benchmarks.report.fp8_section import draw
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.run_log.logs import set_up_logging
from millrace.engine.trainer import train

Result = dict[str, Any]

BASE: Result = {
    "run": {"steps": 200, "device": "auto"},
    "model": {"width": 128, "depth": 4, "heads": 4, "patch_size": 4, "in_channels": 3, "context_dim": 64},
    "conditioning": {"text": {"kind": "hash"}, "autoencoder": {"kind": "pixels"}},
    "data": {"source": "folder", "resolution": 32, "global_batch": 8, "micro_batch": 8, "workers": 0}
    | {"loader": "python"},
    "optimizer": {"lr": 2e-3, "eps": 1e-8, "clip": 1.0},
    "schedule": {"kind": "cosine", "warmup": 20, "final": 0.05},
    "logging": {"tensorboard": False, "every_steps": 25},
    "sampling": {"every_steps": 0},
    "validation": {"share": 0.1},
}
"""What all runs have in common; `data.path` comes from the pictures that are made."""
BASELINE = "BF16"
ARMS: dict[str, Result] = {
    BASELINE: {},
    "FP8, torch": {"backend": "torch"},
    "FP8, torchao": {"backend": "torchao"},
}
"""`precision.fp8` of each."""
PICTURES = 400
"""How many parts of the built-in pictures are made."""
LOOKS = 4
"""How often, at equal distances, the held-out loss is measured."""
HORIZON = 25
"""Steps over which the training loss is averaged for the chart and the comparison."""


def base_config(work: Path, quick: bool) -> Config:
    """The common configuration; makes the pictures under `work` if they are not there."""
    resolution, pictures = BASE["data"]["resolution"], 40 if quick else PICTURES
    folder = make_pictures(work / "pictures", pictures, 2 * resolution, 0)
    values = merge(BASE, {"data": {"path": str(folder)}})
    if quick:
        small = {"width": 32, "depth": 2, "heads": 1, "context_dim": 16}
        values = merge(values, {"run": {"steps": 6}, "model": small, "data": {"global_batch": 4}})
        values = merge(values, {"data": {"micro_batch": 4}, "schedule": {"warmup": 2}})
    return parse_config(values, "benchmarks/fp8_parity.py")


def run_config(config: Config, arm: str, seed: int, work: Path) -> Config:
    """One run."""
    steps = config.run.steps
    folder = work / f"{arm.replace(', ', '-')}-{seed}-{steps}"
    changes = {
        "run": {"seed": seed, "output_dir": str(folder)},
        "precision": {"fp8": ARMS[arm]},
        "validation": {"every_steps": max(1, steps // LOOKS)},
    }
    return parse_config(merge(config.model_dump(mode="json"), changes), f"{arm}, seed {seed}")


def measure(config: Config) -> Result:
    """Train, and read the losses from the run's logs."""
    train(config, "auto")
    folder = Path(config.run.output_dir)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    held_out = held_out_losses(config)
    return {
        "loss": [round(record["loss"], 6) for record in records],
        "skipped": sum(not record["applied"] for record in records),
        "looks": [{"step": step, "held_out_loss": record["loss"]} for step, record in held_out.items()],
        "held_out_pictures": len(next(iter(held_out.values()))["losses"]),
    }


def compare(runs: list[Result]) -> list[Result]:
    """Each way to compute beside the baseline of the same seed; and the seeds beside each other.

    A distance is a loss over that of the baseline, minus 1: at the last look for the held-out loss; for the
    training loss, averaged over HORIZON steps, the mean of its size over the run's second half.
    """
    at = {(run["arm"], run["seed"]): run for run in runs}
    seeds = sorted({seed for arm, seed in at if arm == BASELINE})
    finals = [final(at[BASELINE, seed]) for seed in seeds]
    table = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [at[arm, seed] for seed in seeds if (arm, seed) in at]
        pairs = [(run, at[BASELINE, run["seed"]]) for run in mine]
        held_out = [final(run) / final(base) - 1 for run, base in pairs]
        training = [statistics.fmean(map(abs, distances(run, base))) for run, base in pairs]
        row: Result = {
            "arm": arm,
            "seeds": len(mine),
            "held_out_loss": statistics.fmean(map(final, mine)),
            "skipped": sum(run["skipped"] for run in mine),
        }
        if arm != BASELINE:
            row |= {"held_out_distances": held_out, "training_distances": training}
        table.append(row)
    spread = None
    if len(finals) > 1:
        spread = (max(finals) - min(finals)) / statistics.fmean(finals)
        pairs = [(at[BASELINE, a], at[BASELINE, b]) for a in seeds for b in seeds if a < b]
        table[0]["training_spread"] = statistics.fmean(
            statistics.fmean(map(abs, distances(*pair))) for pair in pairs
        )
    table[0]["held_out_spread"] = spread
    for row in table[1:]:
        largest = max(map(abs, row["held_out_distances"]))
        row["within_spread"] = None if spread is None else largest < spread
    return table


def final(run: Result) -> float:
    """The held-out loss at the end."""
    return run["looks"][-1]["held_out_loss"]


def distances(run: Result, base: Result) -> list[float]:
    """Relative distance of the averaged training losses at each step of the second half."""
    smooth, wanted = (averages(each["loss"], HORIZON) for each in (run, base))
    return [a / b - 1 for a, b in zip(smooth, wanted, strict=True)][len(wanted) // 2 :]


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"default {BASE['run']['steps']}")
    parser.add_argument("--quick", action="store_true", help="try everything: a tiny model, six steps")
    parser.add_argument("--work", type=Path, default=Path("runs/fp8_parity"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=recording.RESULTS / "fp8_parity.json")
    arguments = parser.parse_args()
    if BASELINE not in arguments.arms:
        parser.error(f"--arms: {BASELINE} is what the others are compared with; add it")
    return arguments


def main() -> int:
    """Train, compare, write."""
    arguments = parse()
    set_up_logging()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    common = base_config(work, arguments.quick)
    if arguments.steps:
        common = common.model_copy(update={"run": common.run.model_copy(update={"steps": arguments.steps})})
    shown = common.model_dump(
        mode="json", include={"run", "model", "objective", "data", "optimizer", "schedule", "validation"}
    )
    shown["data"]["path"] = None  # where the files lie is no property of the runs
    result: Result = {
        "benchmark": "fp8_parity",
        **recording.environment(),
        "torchao": recording.version_of("torchao"),
        "quick": arguments.quick,
        "emulated": not torch.cuda.is_available(),
        "seeds": arguments.seeds,
        "config": shown,
        "horizon": HORIZON,
        "runs": [],
        "table": [],
    }
    for seed in arguments.seeds:
        for arm in arguments.arms:
            found = measure(run_config(common, arm, seed, work))
            result["held_out_pictures"] = found.pop("held_out_pictures")
            result["runs"].append({"arm": arm, "seed": seed, **found})
            print(f"{arm}, seed {seed}: held-out loss {final(found):.4f}", flush=True)
            result["table"] = compare(result["runs"])
            recording.write(arguments.output, result)
    for row in result["table"]:
        print(row)
    print(draw_beside(draw, result, arguments.output))
    return 0


if __name__ == "__main__":
    run_command(main)
