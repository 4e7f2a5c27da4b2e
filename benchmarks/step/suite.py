"""The throughput suite: every row of the post's tables with a speed, and the peers, in one run.

The state of a run is its result file, written before and after every case. On one GPU the cases run in a
process of their own, watched by the command: an error on the device, which a process does not survive, costs
one case, and a fresh process goes on with the others.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from millrace.benchmarks.report import recording, throughput_report
from millrace.benchmarks.report import suite_report as report
from millrace.benchmarks.step import peer_steps, sample_pictures, waterfall
from millrace.benchmarks.step import step_measurement as measurement
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config
from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError

Row = dict[str, Any]

RESTART = 75
"""Exit code of a process that has recorded an error and should not go on: its device may be unusable."""
GRACE = 30.0
"""Seconds past the time limit after which a case is stopped."""


class Case(NamedTuple):
    """One measurement."""

    config: str
    conditioning: str
    peer: str | None = None
    fp8: str | None = None
    """`precision.fp8.backend`, where that is not the configuration's."""

    @property
    def name(self) -> str:
        """How the command, the log and the results call it."""
        name = f"{self.config}/{self.peer or self.conditioning}"
        return f"{name}, FP8 {self.fp8}" if self.fp8 else name


FP8_BACKENDS = ("torch", "torchao", "transformer_engine")
"""Of `precision.fp8`, named as the packages that they need."""


def all_cases(conditioning: Sequence[str]) -> list[Case]:
    """Every case, the most telling first.

    Baselines and routed rows on the first inputs, those on cached ones with the baselines in FP8 and the
    peers that stand beside them, the other rows on the first inputs, then everything else. Rows that differ
    from their baseline by the autoencoder are not measured on cached inputs, where none runs.
    """
    names = [row["config"] for row in report.post_rows()]
    baselines = list(dict.fromkeys(row["baseline"] for row in report.post_rows()))
    configs = {name: load_config(throughput_report.CONFIGS / f"{name}.json") for name in names}
    routed = [name for name in names if configs[name].routing.policy != "none"]
    routed.sort(key=lambda name: -configs[name].data.resolution)  # where routing matters
    first = [*baselines, *routed]
    others = [name for name in names if name not in first]
    base = {
        row["config"]: configs[row["baseline"]].conditioning.autoencoder.kind for row in report.post_rows()
    }
    of_autoencoder = {name for name in names if configs[name].conditioning.autoencoder.kind != base[name]}
    kinds = list(conditioning)
    peers = [Case(name, "cached", peer) for name in baselines for peer in peer_steps.PEERS]
    cases = [
        *(Case(name, kinds[0]) for name in first),
        *(Case(name, "cached") for name in first if "cached" in kinds),
        *(Case(name, "cached", None, backend) for backend in FP8_BACKENDS for name in baselines),
        *peers,
        *(Case(name, kinds[0]) for name in others),
        *(Case(name, kind) for kind in kinds[1:] for name in (*first, *others)),
        *(Case(name, "cached", peer_steps.PEERS[0]) for name in routed),
    ]
    measured = (case for case in cases if case.conditioning != "cached" or case.config not in of_autoencoder)
    return list(dict.fromkeys(measured))


def choose(cases: list[Case], wanted: Sequence[str] | None) -> list[Case]:
    """The cases that are named, or all. Raises UserError for a name that is none."""
    known = {case.name: case for case in cases}
    for name in wanted or ():
        if name not in known:
            raise UserError(f"--case {name!r} is not in the suite; it has {', '.join(known)}")
    return [known[name] for name in wanted] if wanted else cases


class Run:
    """The cases of one run and their file.

    Args:
        arguments: of the command.
        output: where the result goes; None keeps it in memory.
        folder: for what the runs write; removed by the caller.
    """

    def __init__(self, arguments: argparse.Namespace, output: Path | None, folder: Path) -> None:
        self.arguments, self.output, self.folder = arguments, output, folder
        self.cases = choose(all_cases(arguments.conditioning), arguments.case)
        self.pictures: Path | None = None
        self.micro_batches: dict[int, int] = {}
        self.watched = arguments.continue_file
        self.result = read(output) if self.watched and output else None
        if self.result is None:
            self.result = self._begin()

    def _begin(self) -> Row:
        kind = "cpu" if self.arguments.smoke or not torch.cuda.is_available() else "cuda"
        return {
            "benchmark": "suite",
            "suite": self.arguments.suite,
            **recording.environment(),
            "device": kind,
            "smoke": self.arguments.smoke,
            "seconds_limit": self.arguments.seconds,
            "running": None,
            "cases": [],
            "table": report.derive([]),
        }

    def run(self) -> None:
        """Measure what has no row yet. Exits with RESTART after an error in a watched process."""
        for case in self.cases:
            if case.name in {row["case"] for row in self.result["cases"]}:
                continue
            if not self._agree(self._time_for(case)):
                self._add(without(case, "left out", "no time left (--seconds)"))
                continue
            self.result["running"] = case.name
            self._write()
            row, fatal = self._measure(case)
            self._add(row)
            if fatal and self.watched:
                raise SystemExit(RESTART)

    def _measure(self, case: Case) -> tuple[Row, bool]:
        """The row of a case, and whether an unexpected error ended it."""
        if case.peer and (reason := peer_steps.missing()):
            return without(case, "left out", reason), False
        if case.fp8 and (reason := self._fp8_missing(case.fp8)):
            return without(case, "left out", reason), False
        started = time.perf_counter()
        fatal = False
        try:
            row = self._figures(case) | {"case": case.name, "status": "measured"}
        except UserError as error:
            row = without(case, "failed", str(error))
        except Exception as error:  # whatever it is, the other cases are worth measuring
            first = next(iter(str(error).strip().splitlines()), "")
            row, fatal = without(case, "failed", f"{type(error).__name__}: {first}"), True
        return row | {"seconds": time.perf_counter() - started}, fatal

    def _figures(self, case: Case) -> Row:
        path = str(throughput_report.CONFIGS / f"{case.config}.json")
        arguments = self.arguments
        if case.fp8:
            fp8 = [*arguments.overrides, f"precision.fp8.backend={case.fp8}"]
            arguments = argparse.Namespace(**vars(arguments) | {"overrides": fp8, "profile": None})
        config = self._resolve(case, path, arguments)
        if case.peer:
            return peer_steps.measure(path, config, case.peer, arguments)
        if case.config not in {row["baseline"] for row in report.post_rows()}:
            arguments = argparse.Namespace(**vars(arguments) | {"profile": None})
        what = measurement.Measured(case.config, config)
        row = measurement.measure(path, what, case.conditioning, arguments) | {"fp8": case.fp8}
        # Rows that are set against each other have the same micro-batch, if it fits all of them.
        smallest = self.micro_batches.get(config.data.resolution, row["micro_batch"])
        self.micro_batches[config.data.resolution] = min(smallest, row["micro_batch"])
        if "profile" in row:
            waterfall.write(row.pop("profile"), waterfall.target(self.arguments, self.output, case.name))
        return row

    def _fp8_missing(self, backend: str) -> str | None:
        """Why a way to do FP8 products is not measured, or None; what the GPU lacks the run says itself."""
        if importlib.util.find_spec(backend) is None:
            return f"{backend} is not installed"
        if backend == "transformer_engine" and self.result["device"] != "cuda":
            return "transformer_engine runs on CUDA alone"
        return None

    def _resolve(self, case: Case, path: str, arguments: argparse.Namespace) -> Config:
        # Rows are set against each other: their micro-batches are not chosen for each of them.
        defaults = [f"data.micro_batch={Config().data.micro_batch}"]
        if case.conditioning in ("live", "pictures") and not self.arguments.smoke:
            defaults += self._pictures(path)
        folder = self.folder / case.name.replace("/", "-").replace(", ", "-").replace(" ", "-")
        first = argparse.Namespace(**vars(arguments) | {"stage": [1]})
        config = measurement.resolve(path, first, folder, defaults)[0].config
        samples = self.micro_batches.get(config.data.resolution, config.data.micro_batch)
        return config if samples >= config.data.micro_batch else measurement.with_micro_batch(config, samples)

    def _pictures(self, path: str) -> list[str]:
        """Overrides for pictures to decode, made once; none if the command line says where they are."""
        if any(
            item.startswith(("data.source", "data.path", "data.mixture")) for item in self.arguments.overrides
        ):
            return []
        if self.pictures is None:
            tokens = load_config(path, self.arguments.overrides).conditioning.text.max_tokens
            mine = self.folder / f"pictures-{process_group.local_rank()}"
            self.pictures = sample_pictures.write(mine, tokens)
        return ["data.source=folder", f"data.path={self.pictures}"]

    def _time_for(self, case: Case) -> bool:
        """Whether the time that is left would do for the longest case so far of the same kind."""
        if self.arguments.until is None:
            return True
        rows = [row for row in self.result["cases"] if row["seconds"]]
        alike = [row for row in rows if bool(row.get("peer")) == bool(case.peer)] or rows
        longest = max((row["seconds"] for row in alike), default=0.0)
        return time.time() + longest < self.arguments.until

    @staticmethod
    def _agree(here: bool) -> bool:
        """What the first process decides."""
        return process_group.gather_objects(here)[0] if process_group.world_size() > 1 else here

    def _add(self, row: Row) -> None:
        self.result["cases"].append(row)
        self.result["running"] = None
        self._write()
        if is_first():
            print(progress(row), flush=True)

    def _write(self) -> None:
        if is_first():
            write(self.result, self.output)


def without(case: Case, status: str, reason: str) -> Row:
    """The row of a case that has no figures."""
    return {
        "case": case.name,
        "status": status,
        "reason": reason,
        "config": case.config,
        "conditioning": case.conditioning,
        "peer": case.peer,
        "fp8": case.fp8,
        "seconds": 0.0,
    }


def is_first() -> bool:
    """Whether this is the process that writes and prints; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def read(output: Path) -> Row | None:
    """The result in a file, or None."""
    return json.loads(output.read_text()) if output.exists() else None


def write(result: Row, output: Path | None) -> None:
    """Derive the table and write the result, if it has a file."""
    result["table"] = report.derive(result["cases"])
    if output is not None:
        recording.write(output, result)


def progress(row: Row) -> str:
    """A line about a case that has ended."""
    if row["status"] != "measured":
        return f"{row['case']}: {row['status']}: {row['reason']}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    speed = row["images_per_second_per_device"]
    batch, seconds = row["micro_batch"], row["seconds"]
    return f"{row['case']}: {speed:.1f} images/s per device{mfu}, batch {batch}, {seconds:.0f} s"


def watch(
    command: Sequence[str], output: Path, until: float | None, start: Callable[..., Any] = subprocess.Popen
) -> None:
    """Run `command`, which continues the run in `output`, until every case has a row.

    A case during which the process dies, or that is not over GRACE seconds after `until`, becomes a failed
    row. Raises UserError if the process dies outside of any case.
    """
    while True:
        process = start(command)
        try:
            code = process.wait(None if until is None else max(until + GRACE - time.time(), 1))
        except subprocess.TimeoutExpired:
            code = stop(process)
        except KeyboardInterrupt:
            stop(process)
            raise
        if code == 0:
            return
        result = read(output)
        running = result and result["running"]
        if running:
            case = next(case for case in all_cases(("cached", "pictures", "live")) if case.name == running)
            row = without(case, "failed", how_it_ended(code))
            result["cases"].append(row)
            result["running"] = None
            write(result, output)
            print(progress(row), flush=True)
        elif code != RESTART:
            raise UserError(f"the process that measures ended before its first case: {how_it_ended(code)}")


def stop(process: "subprocess.Popen[Any]") -> int:
    """Interrupt a process, or kill it; its exit code."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def main(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure the suite, here or in processes that this one watches, and print the tables."""
    choose(all_cases(arguments.conditioning), arguments.case)  # a mistake is told at once
    output = arguments.output
    on_gpu = torch.cuda.is_available() and not arguments.smoke
    if output is None and on_gpu:
        output = recording.RESULTS / f"suite-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    if arguments.seconds and arguments.until is None:
        arguments.until = time.time() + arguments.seconds
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if arguments.continue_file or output is None or not alone or not (on_gpu or arguments.watch):
        run = Run(arguments, output, folder)
        try:
            run.run()
        finally:
            if is_first() and not arguments.continue_file:
                _print(run.result, output)
        return
    output.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "millrace.benchmarks.throughput",
        *sys.argv[1:],
        "--continue-file",
        "--output",
        str(output),
    ]
    if arguments.until is not None:
        command += ["--until", str(arguments.until)]
    try:
        watch(command, output, arguments.until)
    finally:
        if output.exists():
            _print(read(output), output)


def _print(result: Row, output: Path | None) -> None:
    print(report.text(result))
    if output is not None:
        print(f"written to {output}")
