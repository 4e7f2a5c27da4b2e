"""Count what the weights of a step cost at every ZeRO stage: bytes, collectives, and waits of the host.

python -m benchmarks weights                                          # four stages, 1 and 2 processes
python -m benchmarks weights --processes 1 8 --output benchmarks/results/weights.json

The trainer runs a small model in BF16 with FP32 masters through DeepSpeed, on processes of this machine; an
operator counts with what it reads and writes (`ledger_operators.py`) if one of its tensors has the size of a
weight, which no activation of this model has. Matrix products do not count. Bytes are given for each trained
element, so they hold for a model of any size; the buckets of reductions are to the model as 1e8 elements are
to the 1.2 B one. AdamW is torch's fused kernel, as on CUDA. What is counted follows from the code, not from
the machine: nothing is timed.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from millrace.benchmarks.models.scaling import Row, launch
from millrace.benchmarks.report import recording
from millrace.benchmarks.report import weight_traffic_report as report
from millrace.engine.cli import command_parser, number, run_command
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.distributed.zero_settings import OVERLAP_BUCKET
from millrace.engine.planning.step_memory import shape_of

SMALL: Row = {
    "run": {"device": "cpu", "steps": 10_000},
    "model": {"width": 256, "depth": 4, "heads": 4, "patch_size": 8, "in_channels": 3, "context_dim": 128},
    "objective": {"prediction": "sample"},
    "conditioning": {"text": {"kind": "hash", "max_tokens": 4}, "autoencoder": {"kind": "pixels"}},
    "data": {"resolution": 16, "micro_batch": 1, "workers": 0},
    "optimizer": {"clip": 1e-3},
    "ema": {"enabled": True, "decay": 0.999, "every": 1},
    "precision": {"compute": "bfloat16"},
    "logging": {"every_steps": 1000, "tensorboard": False, "wandb": False},
    "sampling": {"every_steps": 0},
    "evaluation": {"every_steps": 0},
    "validation": {"every_steps": 0, "share": 0.0, "path": None},
}
"""Weights of 65,536 elements and more, and four tokens. Every step clips."""


def job(stage: int, processes: int, accumulation: int, folder: Path) -> Row:
    """What a worker is to do for one point."""
    zero: Row = {"stage": stage}
    if stage and processes > 1:
        elements = shape_of(parse_config(merge(SMALL, {"data": {"global_batch": 1}}), "weights")).parameters
        zero |= {"overlap_comm": True, "reduce_bucket_size": round(elements * OVERLAP_BUCKET / report.PRX)}
    changes: Row = {
        "run": {"output_dir": str(folder)},
        "data": {"global_batch": processes * accumulation},
        "deepspeed": {"zero_optimization": zero},
    }
    values = parse_config(merge(SMALL, changes), "weights").model_dump(mode="json")
    return {"kind": "weights", "config": values, "text_tokens": 2}


def measure(stages: list[int], processes: list[int], accumulation: int) -> list[dict[str, Any]]:
    """One row for each stage and number of processes; one process accumulates."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in processes:
            steps = accumulation if count == 1 else 1
            folder = Path(temporary) / f"{count}"
            jobs = [job(stage, count, steps, folder.with_suffix(f".{stage}")) for stage in stages]
            for stage, found in zip(stages, launch(jobs, count, folder), strict=True):
                rows.append({"stage": stage, "processes": count, "accumulation": steps, **found[0]})
    return rows


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=[0, 1, 2, 3], help="default all"
    )
    parser.add_argument(
        "--processes", nargs="+", type=number(int, 1), default=[1, 2], metavar="N", help="default 1 2"
    )
    parser.add_argument(
        "--accumulation",
        type=number(int, 1),
        default=8,
        metavar="N",
        help="micro-batches of a step on one process; several take one each (default 8)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows here as JSON")
    return parser.parse_args()


def main() -> int:
    """Count every point and print what was found."""
    arguments = parse()
    rows = measure(arguments.stages, arguments.processes, arguments.accumulation)
    print(report.table(rows).text(), report.collectives(rows).text(), sep="\n\n")
    if arguments.output is not None:
        recording.write(arguments.output, {"benchmark": "weights", **recording.environment(), "rows": rows})
        print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
