"""Measure ZeRO stages 0 to 3 on the processes of this machine, and model them on 8 to 1024 H200.

python -m benchmarks scaling                                    # ten minutes on a quiet machine of 2 cores
python -m benchmarks scaling --smoke --output /tmp/scaling.json # a tiny model, half a minute
python -m benchmarks scaling --config configs/latent_256.json --processes 1 2 4 8   # on a machine with GPUs
python -m benchmarks scaling --model-only                       # the model anew, from the file's measurements

Each point (stage x processes) runs in processes of its own: the trainer on one micro-batch of random numbers
in the true shapes (no pictures, text encoder or autoencoder), by default on a small PRX model with every
process's batch the same. Measured: the time of a step, PyTorch's allocations at their peak in one, and the
bytes that go into collectives. Points take turns in rounds; the time is the median step of the fastest round,
and the machine is what it reached in its best one, because other work on a machine only ever takes away.

The model of `engine/planning` predicts all of them. What it needs to know of the machine is measured in the
same run, by as many processes at the same time as the step has: a matrix product, a copy, and collectives of
several sizes. Its one free number, the step's time over the roofline, comes from stage 0 on one process; the
other points are predictions. The last lines say whether all errors are within bounds; if not, the exit code
is 1.

On a CPU the processes share the cores: with two of them each has half the threads. malloc is told to keep
freed memory, as a GPU's caching allocator does, or the steps would measure page faults.

Results go to benchmarks/results/scaling.json (another file on a GPU) and a chart beside it.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from millrace.benchmarks.models import scaling_model
from millrace.benchmarks.report import recording
from millrace.benchmarks.report import scaling_report as report
from millrace.benchmarks.report.charts import draw_beside
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config.loading import load_config, merge, parse_config
from millrace.engine.planning.automatic import without_auto
from millrace.engine.planning.devices import CALIBRATION
from millrace.engine.util.errors import UserError

Row = dict[str, Any]
OUTPUT = recording.RESULTS / "scaling.json"

SMALL: Row = {
    "run": {"device": "cpu"},
    "model": {"width": 384, "depth": 6, "heads": 6, "patch_size": 8, "in_channels": 3, "context_dim": 256},
    "objective": {"prediction": "sample"},
    "conditioning": {"text": {"kind": "hash", "max_tokens": 32}, "autoencoder": {"kind": "pixels"}},
    "data": {"resolution": 128, "global_batch": 4, "micro_batch": 4, "workers": 0},
    "ema": {"enabled": True, "decay": 0.999, "every": 1},
    "precision": {"compute": "float32"},
}
"""The model that a CPU trains in a second or two a step: 20 million parameters, 256 tokens of an image."""
TINY = {
    "model": {"width": 64, "depth": 2, "heads": 2, "context_dim": 32},
    "data": {"resolution": 32, "micro_batch": 1},
}
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_ARENA_MAX": "1",
}
"""One arena that never gives memory back."""


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE",
        help="configuration to measure (default: small on a CPU, latent_256 on CUDA)",
    )
    add("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override one value")
    add("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), help="ZeRO stages (default all)")
    add("--processes", nargs="+", type=int, help="numbers of processes (default 1 2, on CUDA 1 to all GPUs)")
    add("--rounds", type=int, default=3, help="times that every point is measured anew (default 3)")
    add("--steps", type=int, default=5, help="measured steps of each point in a round (default 5)")
    add(
        "--warmup",
        type=int,
        default=1,
        help="steps before them (default 1, then three for memory in the first round)",
    )
    add("--seconds", type=float, default=0.6, help="time of each measurement of the machine (default 0.6)")
    add("--smoke", action="store_true", help="a tiny model, stages 0 and 2, few repetitions")
    add("--model-only", action="store_true", help="measure nothing: model the points of the result file anew")
    add("--calibrate", action="store_true", help="set the planner by the steps measured on GPUs, and stop")
    add("--output", type=Path, metavar="FILE", help="result file (default benchmarks/results/scaling.json)")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if arguments.processes is None:
        count = torch.cuda.device_count() if cuda else 2
        arguments.processes = [1 << i for i in range(count.bit_length()) if 1 << i <= count]
    counts = [*arguments.processes, arguments.rounds, arguments.steps, arguments.warmup]
    if any(n < 1 for n in counts):
        raise UserError("--processes, --rounds, --steps and --warmup are whole numbers of at least 1")
    if cuda and max(arguments.processes) > torch.cuda.device_count():
        raise UserError(f"--processes {max(arguments.processes)}: there are {torch.cuda.device_count()} GPUs")
    arguments.stages = arguments.stages or ([0, 2] if arguments.smoke else [0, 1, 2, 3])
    if 0 not in arguments.stages or 1 not in arguments.processes:
        raise UserError("stage 0 on 1 process is what the model is calibrated on; keep it among the points")
    if arguments.smoke:
        arguments.rounds, arguments.steps, arguments.seconds = 1, 1, 0.01
    if arguments.output is None:
        if arguments.smoke:
            raise UserError("--smoke needs --output FILE: the result file is for measurements")
        arguments.output = recording.default_path("scaling", torch.device("cuda")) if cuda else OUTPUT
    return arguments


def measured_config(arguments: argparse.Namespace) -> Row:
    """The configuration of the points as plain values, of one process and without a ZeRO stage."""
    if arguments.config or torch.cuda.is_available():
        name = arguments.config or str(recording.ROOT / "configs" / "latent_256.json")
        values = without_auto(load_config(name, arguments.overrides)).model_dump(mode="json")
    else:
        values = merge(SMALL, TINY if arguments.smoke else {})
    quiet = {
        "run": {"steps": 10_000, "init_from": None},
        "logging": {"every_steps": 1000, "tensorboard": False, "wandb": False},
        "sampling": {"every_steps": 0},
        "evaluation": {"every_steps": 0},
        "validation": {"every_steps": 0, "share": 0.0, "path": None},
        "alignment": {"kind": "none"},
    }
    batch = {"data": {"global_batch": values["data"]["micro_batch"]}}
    return parse_config(merge(merge(values, quiet), batch), "scaling").model_dump(mode="json")


def of_point(values: Row, stage: int, processes: int, output: str = "") -> Row:
    """The configuration of one point."""
    changes: Row = {
        "data": {"global_batch": values["data"]["micro_batch"] * processes},
        "deepspeed": {"zero_optimization": scaling_model.point_section(stage)},
    }
    if output:
        changes["run"] = {"output_dir": output}
    return merge(values, changes)


def launch(jobs: list[Row], processes: int, folder: Path) -> list[list[Row]]:
    """Results of each job from each of `processes` workers; UserError with the last lines if one fails."""
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **MALLOC}
    running = []
    for rank in range(processes):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | shared
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [
            sys.executable,
            "-m",
            "millrace.benchmarks.models.scaling_worker",
            str(folder / "jobs.json"),
            str(folder / f"{rank}.json"),
        ]
        with (folder / f"{rank}.log").open("w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        while any(process.poll() is None for process in running) and not any(p.poll() for p in running):
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(process.returncode for process in running):
        # One that failed by itself, before those that were then ended.
        rank = max(range(processes), key=lambda i: running[i].returncode)
        last = (folder / f"{rank}.log").read_text().strip().splitlines()[-8:]
        raise UserError("a worker failed:\n" + "\n".join(last))
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return [list(job) for job in zip(*results, strict=True)]


def measure(arguments: argparse.Namespace, values: Row, folder: Path) -> tuple[dict[str, Row], list[Row]]:
    """What the machine reaches with each number of processes, and the points."""
    config = parse_config(values, "scaling")
    state = 4 * scaling_model.shape_of(config).parameters
    tokens = scaling_model.tokens_of(config)
    job: Row = {
        "kind": "machine",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": config.precision.compute,
        "seconds": arguments.seconds,
        "rows": config.data.micro_batch * tokens[0],
        "width": config.model.width,
        "columns": 3 * config.model.width,
        "copied": state,
        "sizes": [max(2**16, state // part) for part in (256, 16, 4, 1)],
    }
    jobs: dict[tuple[int, int | None], Row] = {}
    for processes in arguments.processes:
        jobs[processes, None] = job
        for stage in arguments.stages:
            own = of_point(values, stage, processes, str(folder / f"run-{processes}-{stage}"))
            steps = {"warmup": arguments.warmup, "steps": arguments.steps}
            jobs[processes, stage] = {"kind": "steps", "config": own, "text_tokens": tokens[1], **steps}
    found: dict[tuple[int, int | None], list[list[Row]]] = {key: [] for key in jobs}
    for i in range(arguments.rounds):
        # One after another in processes of their own, so that memory is that of a fresh one. A trial saves
        # the time to start.
        groups = [[key] for key in jobs]
        if arguments.smoke:
            groups = [[key for key in jobs if key[0] == processes] for processes in arguments.processes]
        for j, group in enumerate(groups):
            asked = [jobs[key] | {"memory": i == 0} for key in group]
            results = launch(asked, group[0][0], folder / f"round-{i}-{j}")
            for key, result in zip(group, results, strict=True):
                found[key].append(result)
                print(progress(i, *key, result), flush=True)
    machine = {
        str(processes): scaling_model.best([scaling_model.slowest(one) for one in rounds])
        for (processes, stage), rounds in found.items()
        if stage is None
    }
    points = [
        scaling_model.point(stage, processes, rounds)
        for (processes, stage), rounds in found.items()
        if stage is not None
    ]
    return machine, points


def progress(i: int, processes: int, stage: int | None, found: list[Row]) -> str:
    """A line about what was measured."""
    line = f"round {i + 1}, {processes} process(es), "
    if stage is None:
        return line + f"each {min(one['gemm_flops_per_second'] for one in found) / 1e9:.0f} GFLOP/s"
    steps = zip(*(one["seconds"] for one in found), strict=True)
    return line + f"ZeRO {stage}: {statistics.median(max(step) for step in steps):.3f} s"


def calibrate() -> int:
    """Write the slack of every GPU with a measured step where the planner reads it."""
    points = scaling_model.gpu_points(recording.RESULTS)
    if not points:
        raise UserError("no step measured on a GPU is among the results; run benchmarks/throughput.py on one")
    print(report.gpu_table(points).text())
    recording.write(CALIBRATION, json.loads(CALIBRATION.read_text()) | scaling_model.calibration(points))
    print(f"written to {CALIBRATION}")
    return 0


def main() -> int:
    """Measure, model, and write both."""
    arguments = parse()
    if arguments.calibrate:
        return calibrate()
    if arguments.model_only:
        try:
            content = json.loads(arguments.output.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{arguments.output}: no result to model anew: {error}") from None
    else:
        values = measured_config(arguments)
        with tempfile.TemporaryDirectory(prefix="millrace-scaling-") as folder:
            machine, points = measure(arguments, values, Path(folder))
        content = {
            "benchmark": "scaling",
            **recording.environment(),
            "smoke": arguments.smoke,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "config": values,
            "machine": machine,
            "points": points,
        }
    content["rows"] = scaling_model.predict(content)
    content["gpu_points"] = scaling_model.gpu_points(recording.RESULTS)
    content["modelled"] = [] if content["smoke"] else scaling_model.modelled()
    recording.write(arguments.output, content)
    print(report.table(content["rows"]).text(), report.largest_errors(content["rows"]), sep="\n\n")
    accepted = scaling_model.accepted(content["rows"])
    verdict = "a trial, not judged" if content["smoke"] else "accepted" if accepted else "NOT accepted"
    print(verdict)
    print(draw_beside(report.draw, content, arguments.output))
    return 0 if content["smoke"] or accepted else 1


if __name__ == "__main__":
    run_command(main)
