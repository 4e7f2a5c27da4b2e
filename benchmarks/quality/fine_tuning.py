"""Does an adapter, or an optimizer that takes less memory, fine-tune as well as training everything?

python -m benchmarks fine_tuning                          # five minutes on one core, results/fine_tuning.json
python -m benchmarks fine_tuning --quick --work /tmp/tuned --output /tmp/tuned.json

For each seed a small denoiser is trained on the digits zero to four. From it each way to fine-tune begins,
on a few pictures of the digits five to nine, which the base never saw. The held-out loss is the engine's, of
the averaged weights on other pictures of five to nine; `nothing` is the base itself. A run that was
interrupted is continued; --work keeps them.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from millrace.benchmarks.quality.ablations_run import held_out_losses
from millrace.benchmarks.report import recording
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data.sources.digits import DigitsSource
from millrace.engine.data.sources.key_subset import write_keys
from millrace.engine.run_log.logs import set_up_logging
from millrace.engine.trainer import train

Result = dict[str, Any]

BASE: Result = {
    "run": {"steps": 800, "device": "auto"},
    "model": {"width": 64, "depth": 4, "heads": 2, "patch_size": 8, "in_channels": 3, "context_dim": 32},
    "conditioning": {"text": {"kind": "hash"}, "autoencoder": {"kind": "pixels"}},
    "data": {"source": "digits", "resolution": 32, "workers": 0, "global_batch": 16, "micro_batch": 16},
    "optimizer": {"lr": 2e-3, "eps": 1e-8, "clip": 1.0},
    "schedule": {"kind": "cosine", "warmup": 20, "final": 0.05},
    "ema": {"enabled": True, "decay": 0.95, "every": 5},
    "precision": {"compute": "float32"},
    "checkpoint": {"every_steps": 10_000, "keep": 1},
    "logging": {"tensorboard": False, "every_steps": 50},
    "sampling": {"every_steps": 0},
}
"""The run that makes a base."""
TUNED: Result = {
    "run": {"steps": 200},
    "optimizer": {"lr": 1e-3},
    "validation": {"every_steps": 10_000, "share": 0.8, "samples": 1000, "times": 4},
}
"""What all fine-tunes change; the last step has a held-out loss, too."""
NOTHING = "nothing"
ARMS: dict[str, Result] = {
    NOTHING: {"run": {"steps": 1}, "schedule": {"warmup": 0}, "optimizer": {"lr": 1e-12}},
    "all weights": {},
    "all weights, adamw_8bit": {"optimizer": {"kind": "adamw_8bit"}},
    "all weights, adamw_offload": {"optimizer": {"kind": "adamw_offload"}},
    "LoRA, rank 8": {"adapter": {"kind": "lora", "rank": 8}, "optimizer": {"lr": 5e-3}},
    "DoRA, rank 8": {"adapter": {"kind": "dora", "rank": 8}, "optimizer": {"lr": 5e-3}},
}
"""The ways, with the learning rate of each: an adapter's factors are small and want a larger one."""
SEEN = 5
"""Digits below this are the base's."""


def digits(of_base: bool) -> list[str]:
    """Keys of the digits that the base is trained on, or of the others."""
    source = DigitsSource()
    return [source.key(i) for i in range(len(source)) if (source.label(i) < SEEN) == of_base]


def config_of(work: Path, name: str, seed: int, keys: list[str], *changes: Result) -> Config:
    """A run on some of the training pictures."""
    listed = work / f"{name}.txt"
    write_keys(listed, keys)
    values = merge(BASE, {"data": {"keys": str(listed)}})
    values = merge(values, {"run": {"seed": seed, "output_dir": str(work / f"{name}-{seed}")}})
    for change in changes:
        values = merge(values, change)
    return parse_config(values, f"{name}, seed {seed}")


def run_seed(work: Path, seed: int, quick: bool) -> dict[str, dict[str, Any]]:
    """The last record of the held-out loss of each way to go on from one base."""
    short = ({"run": {"steps": 6}, "schedule": {"warmup": 1}},) if quick else ()
    look = ({"validation": {"samples": 16, "times": 1}},) if quick else ()
    base = config_of(work, "base", seed, digits(of_base=True), *short)
    train(base, "auto")
    found = {}
    for arm, changes in ARMS.items():
        begin = {"run": {"init_from": base.run.output_dir}}
        few = look + (short if arm != NOTHING else ())
        name = arm.replace(", ", "-").replace(" ", "_")
        config = config_of(work, name, seed, digits(of_base=False), TUNED, changes, begin, *few)
        train(config, "auto")
        found[arm] = held_out_losses(config)[config.run.steps]
    return found


def compare(runs: list[Result]) -> list[Result]:
    """Each way over all seeds: its losses, and its share of what training all weights gains over nothing."""
    table = []
    for arm in runs[0]["held_out_loss"]:
        losses = [run["held_out_loss"] for run in runs]
        gains = [(each[NOTHING] - each[arm]) / (each[NOTHING] - each["all weights"]) for each in losses]
        table.append(
            {
                "arm": arm,
                "held_out_loss": [each[arm] for each in losses],
                "mean": statistics.fmean(each[arm] for each in losses),
                "share_of_gain": gains,
            }
        )
    return table


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="try everything: six steps each")
    parser.add_argument("--work", type=Path, default=Path("runs/fine_tuning"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=recording.RESULTS / "fine_tuning.json")
    return parser.parse_args()


def main() -> int:
    """Train, compare, write."""
    arguments = parse()
    set_up_logging()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    result: Result = {
        "benchmark": "fine_tuning",
        **recording.environment(),
        "torchao": recording.version_of("torchao"),
        "quick": arguments.quick,
        "base": BASE,
        "tuned": TUNED,
        "arms": ARMS,
        "digits": len(digits(of_base=False)),
        "runs": [],
        "table": [],
    }
    for seed in arguments.seeds:
        records = run_seed(work, seed, arguments.quick)
        result["held_out_pictures"] = len(records[NOTHING]["losses"])
        losses = {arm: record["loss"] for arm, record in records.items()}
        result["runs"].append({"seed": seed, "held_out_loss": losses})
        print(f"seed {seed}: " + ", ".join(f"{arm} {loss:.4f}" for arm, loss in losses.items()), flush=True)
        result["table"] = compare(result["runs"])
        recording.write(arguments.output, result)
    for row in result["table"]:
        shares = ", ".join(f"{share:.0%}" for share in row["share_of_gain"])
        print(f"{row['arm']}: held-out loss {row['mean']:.4f}; of the gain of all weights {shares}")
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
