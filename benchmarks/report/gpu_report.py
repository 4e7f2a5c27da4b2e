"""The first hour on a GPU: tests, measurements and a summary, most telling first, within a time.

benchmarks/gpu_report.sh --minutes 30
PYTHON=.venv/bin/python benchmarks/gpu_report.sh --minutes 60
benchmarks/gpu_report.sh --rehearse       # no GPU: plants every failure in every stage, prints the verdicts

Python with torch, Triton, NumPy and pytest is enough for the kernels; a stage whose packages or programs
are missing is left out and says what installs them. If this checkout cannot be installed, it is put on the
path. Each stage may take its share of the time that is left; what it does not use, the later ones have. A
stage that fails, or runs out of time, does not stop the others. What was measured is JSON in
benchmarks/results/, written as it comes; at the end one more file says how every stage went, and a summary in
Markdown is printed. The exit code is the number of stages that failed, 64 without a GPU.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = 64
TRAINING = ("deepspeed", "pydantic", "einops", "safetensors", "psutil")
"""Packages without which nothing trains."""
HINTS = {
    "nvcc": "a CUDA toolkit",
    "cmake": "pip install cmake",
    "compute-sanitizer": "a CUDA toolkit",
    "deepspeed": "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
}
"""What brings a program or package; for all others `pip install NAME`."""


class Stage(NamedTuple):
    name: str
    share: int
    """Of the time, beside the shares of the stages that are left."""
    needs: tuple[str, ...]
    """Python packages, programs as `bin:NAME`, and devices as `gpus:NUMBER`."""
    command: Callable[[int, "Job"], list[str]]
    """From the seconds that it has."""


class Job(NamedTuple):
    """What the stages share."""

    python: str
    capability: int
    stem: str
    """GPU and time, for the names of files."""

    def result(self, name: str, ending: str = "json") -> str:
        """A file in benchmarks/results/."""
        return str(RESULTS / f"{name}-{self.stem}.{ending}")

    def pytest(self, *words: str) -> list[str]:
        """A command."""
        return [self.python, "-m", "pytest", "-q", *words]

    def benchmark(self, name: str, *words: object) -> list[str]:
        """A command."""
        return [self.python, "-m", "millrace.benchmarks", name, *map(str, words)]


def _build(_: int, job: Job) -> list[str]:
    script = 'cmake -S . -B build -DPython3_EXECUTABLE="$0" && cmake --build build --parallel'
    return ["bash", "-c", script, job.python]


def _sanitizer(_: int, job: Job) -> list[str]:
    tests = job.pytest("-m", "cuda and smoke", "tests/kernels/attention")
    return ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", *tests]


def _compile(_: int, job: Job) -> list[str]:
    # Also fills Triton's cache from several processes, so that the stages after it need not compile.
    return job.benchmark("resources", "--chips", job.capability, "--output", job.result("resources"))


def _suite(*conditioning: str) -> Callable[[int, Job], list[str]]:
    def command(seconds: int, job: Job) -> list[str]:
        output = job.result("-".join(["suite", *conditioning]))
        words = ("--suite", "post", "--seconds", seconds * 9 // 10, "--profile", "--output", output)
        return job.benchmark("throughput", *words, "--conditioning", *conditioning)

    return command


def _routing(_: int, job: Job) -> list[str]:
    size = ("--width", 1792, "--image-tokens", 1024, "--batch", 16)
    return job.benchmark("routing", "--device", "cuda", "--compile", *size, "--output", job.result("routing"))


def _saving(_: int, job: Job) -> list[str]:
    return job.benchmark("saving", "--width", 1792, "--depth", 16, "--output", job.result("saving"))


def _kernels(seconds: int, job: Job) -> list[str]:
    # It starts no case after nine tenths of its time, so that the last one can end.
    words = ("--record-choices", "--seconds", seconds * 9 // 10, "--output", job.result("kernels"))
    return job.benchmark("kernels", *words)


def _samples(_: int, job: Job) -> list[str]:
    folder = f"runs/gpu-report-{job.stem}"
    train = f'"$0" -m millrace.engine.cli train --config quickstart --set run.output_dir={folder}'
    grid = job.result("samples", "png")
    sample = f'"$0" -m millrace.engine.cli sample --checkpoint {folder} --recall --grid {grid}'
    return ["bash", "-c", f"{train} && {sample}", job.python]


STAGES = (
    Stage(
        "smallest tests",
        6,
        ("pytest", "triton"),
        lambda _, job: job.pytest("-m", "cuda and smoke", "tests/kernels"),
    ),
    Stage("build csrc", 8, ("bin:nvcc", "bin:cmake"), _build),
    Stage("compile", 8, ("triton",), _compile),
    Stage("sanitizer", 6, ("pytest", "triton", "bin:compute-sanitizer"), _sanitizer),
    Stage(
        "tests of the kernels",
        14,
        ("pytest", "triton"),
        lambda _, job: job.pytest("-m", "cuda", "tests/kernels", "tests/csrc"),
    ),
    Stage(
        "training",
        6,
        ("pytest", *TRAINING),
        lambda _, job: job.pytest("-m", "cuda", "tests/engine/test_first_gpu_run.py"),
    ),
    # Norms under autocast where reductions run beside the backward pass: DeepSpeed pull request 6993.
    Stage(
        "norms under overlap",
        3,
        ("pytest", *TRAINING, "gpus:2"),
        lambda _, job: job.pytest("-m", "cuda", "tests/engine/test_overlapped_norms.py"),
    ),
    Stage("samples", 6, TRAINING, _samples),
    Stage("kernels", 20, ("triton",), _kernels),
    Stage("post, pictures", 16, TRAINING, _suite("pictures")),
    Stage("post, cached and live", 16, TRAINING, _suite("cached", "live")),
    Stage("routing", 5, (*TRAINING, "diffusers"), _routing),
    Stage("saving", 3, TRAINING, _saving),
    Stage(
        "tests of the engine",
        6,
        ("pytest", *TRAINING),
        lambda _, job: job.pytest(
            "-m", "cuda", "tests", "--ignore", "tests/kernels", "--ignore", "tests/csrc"
        ),
    ),
    Stage(
        "planner",
        3,
        TRAINING,
        lambda _, job: job.benchmark("scaling", "--calibrate"),
    ),
)


class Verdict(NamedTuple):
    stage: str
    outcome: str
    """passed, left out, failed."""
    reason: str
    seconds: float

    def line(self) -> str:
        """For the summary."""
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.outcome}{reason} ({self.seconds:.0f} s)"


def missing(needs: tuple[str, ...]) -> list[str]:
    """Those that are not there, each with the line that brings it."""
    found = []
    for need in needs:
        if need.startswith("gpus:"):
            found += _absent_gpus(int(need.removeprefix("gpus:")))
            continue
        name = need.removeprefix("bin:")
        there = shutil.which(name) if need.startswith("bin:") else importlib.util.find_spec(name)
        if there is None:
            found.append(f"{name} ({HINTS.get(name, f'pip install {name}')})")
    return found


def _absent_gpus(wanted: int) -> list[str]:
    import torch

    there = torch.cuda.device_count()
    return [f"{wanted} GPUs, one for each process that reduces (there: {there})"] if there < wanted else []


def run(command: list[str], limit: float, environment: dict[str, str], out: int | None) -> tuple[str, str]:
    """Outcome and reason of a command that is interrupted after `limit` seconds, and killed 20 s later."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=out, stderr=out
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        # An interrupt, so that programs publish what they have; then the hard way.
        for kind in (signal.SIGINT, signal.SIGKILL):
            os.killpg(process.pid, kind)
            try:
                process.wait(20)
                break
            except subprocess.TimeoutExpired:
                continue
        return "failed", f"out of time after {limit:.0f} s"
    return ("passed", "") if code == 0 else ("failed", f"exit code {code}")


def run_stages(
    stages: tuple[Stage, ...],
    job: Job,
    seconds: float,
    environment: dict[str, str],
    most: float = math.inf,
    quiet: bool = False,
) -> list[Verdict]:
    """Every stage within its share of the time that is left.

    Args:
        seconds: for all of them.
        most: seconds of one stage.
        quiet: without what the stages print, and without a word about them.
    """
    began, verdicts = time.monotonic(), []
    say = (lambda *_, **__: None) if quiet else print
    for i, stage in enumerate(stages):
        left = seconds - (time.monotonic() - began)
        limit = min(most, left * stage.share / sum(other.share for other in stages[i:]))
        started = time.monotonic()
        say(f"\n== {stage.name}", flush=True)
        if absent := missing(stage.needs):
            outcome, reason = "left out", f"missing: {', '.join(absent)}"
        elif limit < 1:
            outcome, reason = "failed", "no time left"
        else:
            command = stage.command(int(limit), job)
            say(f"   at most {limit:.0f} s: {' '.join(command)}", flush=True)
            outcome, reason = run(command, limit, environment, subprocess.DEVNULL if quiet else None)
        verdicts.append(Verdict(stage.name, outcome, reason, time.monotonic() - started))
        say(f"   {verdicts[-1].line()}", flush=True)
    return verdicts


def environment_with_millrace(python: str) -> tuple[dict[str, str], str]:
    """Variables with which `import millrace` finds this checkout, and how that was brought about."""
    environment = dict(os.environ)
    found = "import millrace.benchmarks as b, os; print(os.path.realpath(b.__path__[0]))"
    done = subprocess.run([python, "-c", found], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode == 0 and Path(done.stdout.strip()) == ROOT / "benchmarks":
        return environment, "installed before"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--editable",
        ".",
    ]
    done = subprocess.run(install, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        return environment, "installed"
    last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    package = Path(tempfile.mkdtemp(prefix="millrace-")) / "millrace"
    package.mkdir()
    for name in ("engine", "kernels", "benchmarks", "configs"):
        (package / name).symlink_to(ROOT / name)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    hint = "pip install 'setuptools>=77,<82' mends it"
    return environment, f"on the path, because it cannot be installed ({last}); {hint}"


def gpu(python: str) -> tuple[str, int, str] | None:
    """Name, compute capability and versions of the first GPU; None without one."""
    code = (
        "import torch, platform; c = torch.cuda.get_device_capability();"
        "print(torch.cuda.get_device_name(), 10 * c[0] + c[1], torch.__version__, torch.version.cuda,"
        " platform.python_version(), sep='|')"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return None
    name, capability, *versions = done.stdout.strip().splitlines()[-1].split("|")
    return name, int(capability), "torch {}, CUDA {}, Python {}".format(*versions)


def markdown(title: str, verdicts: list[Verdict], files: list[str]) -> str:
    """The summary to paste."""
    lines = [f"### Millrace on {title}", "", "| stage | outcome |", "| --- | --- |"]
    lines += [f"| {verdict.stage} | {verdict.line()} |" for verdict in verdicts]
    return "\n".join([*lines, "", *(f"- `{name}`" for name in files)])


PLANTED = {
    "wrong kernel": "raise AssertionError('largest error 0.3, allowed 0.01')",
    "out of memory": "raise MemoryError('CUDA out of memory')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "time-out": "import time; time.sleep(60)",
    "missing package": None,
}
"""Failures of a stage, as programs; None: a package that is nowhere."""


def rehearse(python: str) -> int:
    """Give every stage every failure, one at a time; returns how many verdicts are wrong."""
    wrong = 0
    print(f"| stage | {' | '.join(PLANTED)} | other stages |")
    print("| --- " * (len(PLANTED) + 2) + "|", flush=True)
    for place, stage in enumerate(STAGES):
        cells, others = [], Counter[str]()
        for program in PLANTED.values():
            planned = [_stand_in(one, "") for one in STAGES]
            planned[place] = _stand_in(stage, program or "", ("no_such_package",) if program is None else ())
            job = Job(python, 90, "rehearsal")
            verdicts = run_stages(tuple(planned), job, 3600, dict(os.environ), most=2.0, quiet=True)
            mine = verdicts.pop(place)
            cells.append(f"{mine.outcome}, {mine.reason}")
            others.update(verdict.outcome for verdict in verdicts)
            wrong += mine.outcome != ("left out" if program is None else "failed")
        wrong += others.total() - others["passed"]
        print(f"| {stage.name} | {' | '.join(cells)} | {dict(others)} |", flush=True)
    return wrong


def _stand_in(stage: Stage, program: str, needs: tuple[str, ...] = ()) -> Stage:
    """A stage that runs this program in place of its own, without torch."""
    return stage._replace(needs=needs, command=lambda _, job: [job.python, "-S", "-c", program])


def main() -> int:
    """Everything that needs a GPU; the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_report.sh",
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N", help="for all of it (default 30)")
    parser.add_argument("--rehearse", action="store_true", help="no GPU: plant every failure in every stage")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes:g}: expected more than 0")
    if arguments.rehearse:
        return rehearse(sys.executable)
    found = gpu(sys.executable)
    if found is None:
        print(
            "error: torch sees no CUDA device; install a CUDA build of torch, and look at nvidia-smi",
            file=sys.stderr,
        )
        return NO_GPU
    name, capability, versions = found
    environment, installed = environment_with_millrace(sys.executable)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    job = Job(sys.executable, capability, f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{stamp}")
    print(f"GPU: {name}, {versions}; {arguments.minutes:g} minutes; this checkout is {installed}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    verdicts = run_stages(STAGES, job, 60 * arguments.minutes, environment)
    files = sorted(path.name for path in RESULTS.glob(f"*{job.stem}.*"))
    content = {
        "benchmark": "gpu_report",
        "time": stamp,
        "gpu": name,
        "versions": versions,
        "checkout": installed,
        "stages": [verdict._asdict() for verdict in verdicts],
        "files": files,
    }
    Path(job.result("report")).write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{markdown(f'{name} ({versions})', verdicts, files)}")
    return sum(verdict.outcome == "failed" for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
