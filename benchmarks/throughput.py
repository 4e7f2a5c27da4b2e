"""Measure the training step of any configuration: speed, memory, and model FLOPs utilisation.

python benchmarks/throughput.py --suite post --seconds 1500
python benchmarks/throughput.py --suite post --smoke
python benchmarks/throughput.py --config configs/jit_1024.json configs/jit_1024_tread.json
python benchmarks/throughput.py --config configs/latent_256.json --conditioning cached live --profile
deepspeed --num_gpus 8 benchmarks/throughput.py --config configs/latent_256.json --accumulate
python benchmarks/throughput.py --config configs/jit_1024.json --set data.micro_batch=16 --output a.json
python benchmarks/throughput.py --config configs/jit_1024.json --set precision.fp8.backend=torch
python benchmarks/throughput.py --config configs/quickstart.json --smoke

A step is the trainer's own: forward and backward of every micro-batch, reduction, clipping, optimizer, the
EMA if the configuration has one, and the log. Weights are random, those of the frozen networks too where the
configuration names no path, at the published size. --conditioning says where inputs come from:

  cached    one micro-batch of random numbers in the true shapes, kept on the device: what the step costs by
            itself, with no pictures, no text encoder and no autoencoder. Square pictures, equal caption
            lengths. The teacher of an alignment runs in every step.
  pictures  pictures decoded, cropped and encoded in every step; text rows as in `cached`. The post's
            runs were fed so (decoded pictures, live autoencoder, stored text): its speeds belong beside it.
  live      pictures decoded and cropped (ahead), captions and pictures encoded in every step, on CUDA beside
            the step before, as in training. Caches that the configuration names are read.

Of a run of several stages each is a row, or those that --stage names. images/s is over the whole measured
time, so stalls count; batches/s is images/s / 256, the unit of the post. A micro-batch that does not fit the
GPU is halved until it does. On CUDA the rows are also written as JSON to benchmarks/results/, elsewhere only
with --output.

--suite post measures every row of the post's tables that has a speed, on `pictures`, `cached` and `live`
(rows that differ by the autoencoder not on `cached`, where none runs), and as peers diffusers' PRX in a plain
compiled loop (with its broadcast attention mask, and with the materialised one that Photoroom/PRX has), and
the same under FSDP2, and the dense baselines once more with FP8 products (`precision.fp8`), by each backend
that is installed. The most telling cases come first; --seconds bounds the time; a case that fails is
recorded with its error, and the others go on. The JSON is written after every case.

--profile also writes where one step's time went, as JSON and SVG; of a suite, for the baselines.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from millrace.benchmarks.report import recording
from millrace.benchmarks.report import throughput_report as report
from millrace.benchmarks.step import suite, waterfall
from millrace.benchmarks.step.step_measurement import measure, resolve
from millrace.benchmarks.step.throughput_inputs import TRAINERS
from millrace.engine.cli import command_parser, number, run_command
from millrace.engine.distributed import process_group
from millrace.engine.run_log.logs import set_up_logging
from millrace.engine.util.errors import UserError


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--config", nargs="+", metavar="FILE", help="configurations; default those with a published speed")
    add("--suite", choices=("post",), help="every row of the post's tables with a speed, and the peers")
    add("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override one value")
    add("--smoke", action="store_true", help="shrink everything and measure it on a CPU")
    add(
        "--conditioning",
        nargs="+",
        choices=tuple(TRAINERS),
        help="where the inputs come from: a row for each (default cached; with --suite all three)",
    )
    add(
        "--stage",
        nargs="+",
        type=number(int, 1),
        metavar="N",
        help="of a run of several stages these, from 1 (default all, a row for each)",
    )
    add("--steps", type=number(int, 1), help="measured steps (default 20, with --smoke 4, or 2 for a suite)")
    add("--warmup", type=number(int, 1), help="steps before them (default 5, with --smoke 1)")
    add(
        "--text-tokens",
        type=number(int, 1),
        metavar="N",
        help="text tokens of a sample where they come from memory (default conditioning.text.max_tokens)",
    )
    add(
        "--accumulate",
        action="store_true",
        help="keep data.global_batch, by accumulation; else a step is one micro-batch per process",
    )
    add("--output", type=Path, metavar="FILE", help="write the rows here as JSON")
    add(
        "--profile",
        nargs="?",
        const=".",
        metavar="FOLDER",
        help="write where one step's time went, as JSON and SVG: beside --output, else in runs/profiles",
    )
    add(
        "--seconds",
        type=number(int, 1),
        metavar="N",
        help="with --suite: begin no case that may end after these",
    )
    add("--case", nargs="+", metavar="NAME", help="with --suite: these cases only, e.g. latent_256/cached")
    add("--watch", action="store_true", help="with --suite: cases in a process of their own also on a CPU")
    add("--continue-file", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    _check(arguments)
    every = ["pictures", "cached", "live"]
    arguments.conditioning = arguments.conditioning or (every if arguments.suite else ["cached"])
    arguments.conditioning = list(dict.fromkeys(arguments.conditioning))
    arguments.config = arguments.config or report.published_configs()
    few = 2 if arguments.suite else 4
    arguments.steps = arguments.steps or (few if arguments.smoke else 20)
    arguments.warmup = arguments.warmup or (1 if arguments.smoke else 5)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if arguments.suite and arguments.config:
        raise UserError("--suite has its own configurations; leave out --config, or --suite")
    if arguments.suite and arguments.stage:
        raise UserError("--suite measures first stages; leave out --stage, or --suite")
    for name in ("seconds", "case", "watch"):
        if getattr(arguments, name) and not arguments.suite:
            raise UserError(f"--{name} belongs to --suite; add --suite post, or leave it out")
    if arguments.watch and not arguments.output:
        raise UserError("--watch needs --output FILE, through which the processes go on where one ended")


def main() -> int:
    """Measure every configuration with every kind of inputs; if one fails, those before it are reported."""
    arguments = parse()
    set_up_logging()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="millrace-throughput-") as folder:
        if arguments.suite:
            suite.main(arguments, Path(folder))
            process_group.wait_for_all()
            return 0
        configs = [
            (path, stage)
            for i, path in enumerate(arguments.config)
            for stage in resolve(path, arguments, Path(folder) / str(i))
        ]
        try:
            for path, stage in configs:
                for conditioning in arguments.conditioning:
                    row = measure(path, stage, conditioning, arguments)
                    if "profile" in row:
                        name = f"{row['config']}/{conditioning}"
                        waterfall.write(
                            row.pop("profile"), waterfall.target(arguments, arguments.output, name)
                        )
                    rows.append(row)
        finally:
            if rows and process_group.rank() == 0:
                _publish(rows, arguments.output)
    process_group.wait_for_all()
    return 0


def _publish(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print the table; write the JSON."""
    print(report.text(rows))
    device = process_group.choose_device(rows[-1]["device"])
    if output is None and device.type == "cuda":
        output = recording.default_path("throughput", device)
    if output is not None:
        recording.write(output, {"benchmark": "throughput", **recording.environment(), "rows": rows})
        print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
