"""Time how long training waits for a checkpoint, beside a plain copy of the same state.

python -m benchmarks saving                                           # a model for any machine
python -m benchmarks saving --width 1792 --depth 16                   # the 1.2 B model

A run of a few steps saves after each: first in the background, then with `checkpoint.blocking`. Training
waits for `Trainer.save`; the checkpoint is there when `BackgroundSaves.finish` returns. A plain copy clones
every tensor that a save takes; its memory is new each time, as that of the first save is.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from millrace.benchmarks.report import recording
from millrace.benchmarks.report.tables import Table
from millrace.engine.checkpoint import train_state
from millrace.engine.cli import command_parser, number, run_command
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.trainer import Trainer

Row = dict[str, Any]
RUN: Row = {
    "model": {"patch_size": 8, "in_channels": 3, "context_dim": 64},
    "objective": {"prediction": "sample"},
    "conditioning": {"text": {"kind": "hash", "max_tokens": 4}, "autoencoder": {"kind": "pixels"}},
    "data": {"resolution": 16, "micro_batch": 1, "global_batch": 1, "workers": 0},
    "ema": {"enabled": True},
    "run": {"steps": 1_000_000},
    "logging": {"every_steps": 1000, "tensorboard": False, "wandb": False},
    "sampling": {"every_steps": 0},
    "evaluation": {"every_steps": 0},
    "validation": {"every_steps": 0, "share": 0.0, "path": None},
}
HEAD = 64


def measure(width: int, depth: int, saves: int) -> list[Row]:
    """One row for each way to save: bytes, and the median seconds of each thing."""
    model = {"width": width, "depth": depth, "heads": width // HEAD}
    rows = []
    for blocking in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            changes = {
                "model": model,
                "run": {"output_dir": folder},
                "checkpoint": {"blocking": blocking, "keep": 1, "every_steps": 1_000_000},
            }
            trainer = Trainer(parse_config(merge(RUN, changes), "saving"))
            try:
                rows.append({"blocking": blocking, **_measure(trainer, saves)})
            finally:
                trainer.saves.close(print)
                trainer.release()
    return rows


def _measure(trainer: Trainer, saves: int) -> Row:
    clock: dict[str, list[float]] = {"copy": [], "wait": [], "published": []}
    trainer.train_step()
    trainer.train_step()
    for _ in range(saves):
        pieces = list(train_state.state_pieces(trainer.shards, trainer.optimizer, trainer.ema))
        size = sum(piece.data.nbytes for piece in pieces)
        begun = _now()
        copies = [piece.data.clone() for piece in pieces]
        clock["copy"].append(_now() - begun)
        del copies, pieces
        begun = _now()
        trainer.save()
        clock["wait"].append(_now() - begun)
        trainer.saves.finish()
        clock["published"].append(time.perf_counter() - begun)
        trainer.train_step()
    middle = {name: statistics.median(times) for name, times in clock.items()}
    return {"bytes": size, "first_wait": clock["wait"][0], **middle}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def table(rows: list[Row]) -> Table:
    """One line for each way to save."""
    head = [
        "saving",
        "GB",
        "copy, s",
        "training waits, s",
        "of a copy",
        "first, s",
        "published after, s",
    ]
    lines = [
        [
            "blocking" if row["blocking"] else "background",
            f"{row['bytes'] / 1e9:.2f}",
            *(f"{row[name]:.3f}" for name in ("copy", "wait")),
            f"{row['wait'] / row['copy']:.2f}",
            *(f"{row[name]:.3f}" for name in ("first_wait", "published")),
        ]
        for row in rows
    ]
    return Table(head, lines, left=1)


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--width", type=number(int, HEAD), default=768, help="of the model (default 768)")
    parser.add_argument("--depth", type=number(int, 1), default=10, help="in blocks (default 10)")
    parser.add_argument("--saves", type=number(int, 1), default=5, metavar="N", help="each way (default 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows here as JSON")
    return parser.parse_args()


def main() -> int:
    """Measure both ways and print what was found."""
    arguments = parse()
    rows = measure(arguments.width, arguments.depth, arguments.saves)
    print(table(rows).text())
    if arguments.output is not None:
        recording.write(arguments.output, {"benchmark": "saving", **recording.environment(), "rows": rows})
        print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
