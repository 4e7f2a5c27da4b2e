"""Replay a logged training step: its loss to the last bit, and each sample's loss and gradient norm.

millrace replay runs/quickstart --step 137
millrace replay runs/quickstart --step 137 --show 5 --output step-137.json
deepspeed --num_gpus 8 engine/replay.py runs/latent_256 --step 20017
torchrun --nproc-per-node 8 -m millrace.engine.replay runs/latent_256 --step 20017
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace.engine.cli import command_parser, number, require_path, run_command
from millrace.engine.util.errors import UserError

if TYPE_CHECKING:
    from millrace.engine.replay_trainer import Replayed

SHOWN, MOST = 32, 1_000


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = command_parser(__doc__, "millrace replay", launched=True)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "--step", required=True, type=number(int, 1), metavar="N", help="the step, as log.jsonl numbers it"
    )
    parser.add_argument(
        "--most",
        type=number(int, 0),
        default=MOST,
        metavar="N",
        help=f"steps that may be made again between the checkpoint and the step (default {MOST})",
    )
    parser.add_argument(
        "--show",
        type=number(int, 0),
        default=SHOWN,
        metavar="N",
        help=f"samples in the table, those with the largest loss first (default {SHOWN})",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all samples there")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Find where to start, make the step again, print what it did."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.output and arguments.output.suffix != ".json":
        parser.error(f"--output {arguments.output}: it is a JSON file, name it so")
    require_path("RUN", arguments.run)
    device = _device_of(arguments.run)

    from millrace.engine.distributed.launchers import read_launcher

    read_launcher()  # before torch is imported, so that tasks without ranks are refused at once

    from millrace.engine.distributed import process_group
    from millrace.engine.replay_trainer import replay
    from millrace.engine.run_log.logs import set_up_logging
    from millrace.engine.util.files import write_atomically

    set_up_logging()
    process_group.join(device)
    found = replay(arguments.run, arguments.step, arguments.most)
    if process_group.rank() == 0:
        print("\n".join(table(found, arguments.show)), flush=True)
        if arguments.output:
            text = json.dumps(found._asdict(), indent=2) + "\n"
            try:
                write_atomically(arguments.output, text)
            except OSError as error:
                raise UserError(f"--output {arguments.output}: cannot be written: {error.strerror}") from None
    process_group.wait_for_all()
    return 0


def _device_of(run: Path) -> str:
    """`run.device` of a run. Raises UserError where the folder is no run."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text())["run"]["device"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"RUN {run}: no run: {os.path.basename(path)} is missing or cannot be read") from None


def table(found: "Replayed", show: int) -> list[str]:
    """Lines for people: the step, then its samples by loss."""
    lines = [f"step {found.step} of {found.run}, {found.began}"]
    lines += [
        _beside("loss", found.record.get("loss"), found.logged.get("loss")),
        _beside("gradient norm", found.record.get("grad_norm"), found.logged.get("grad_norm")),
    ]
    if found.same_keys is not None:
        lines.append(f"samples: {'those of keys/' if found.same_keys else 'NOT those of keys/'}")
    lines += found.remarks
    samples = sorted(found.samples, key=_badness, reverse=True)[:show]
    if samples:
        head = ("sample", "loss", "norm alone", "t", "caption", "key")
        rows = [
            (
                str(sample["index"]),
                _number(sample["loss"]),
                _number(sample["norm_alone"]),
                f"{sample['t']:.4f}",
                sample["which"],
                sample["key"],
            )
            for sample in samples
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
        lines.append("")
        for row in [head, *rows]:
            cells = [
                cell.ljust(width) if i == 4 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
            lines.append("  ".join([*cells, row[-1]]))
    if len(samples) < len(found.samples):
        rest = "--show or --output has all" if samples else "--show has them"
        lines.append(f"{len(samples)} of {len(found.samples)} samples shown; {rest}")
    return lines


def _badness(sample: dict[str, Any]) -> float:
    """What is not finite comes first."""
    loss = sample["loss"]
    return loss if loss is not None else float("inf")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _beside(name: str, replayed: float | None, logged: float | None) -> str:
    """A value of the step beside the logged one."""
    if replayed == logged:
        return f"{name} {replayed!r}: the logged one to the last bit"
    return (
        f"{name} {replayed!r}: NOT the logged {logged!r}; another device, other versions, or data that have "
        "changed since"
    )


if __name__ == "__main__":
    run_command(main)
