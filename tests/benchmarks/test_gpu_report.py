"""The GPU report: order, time and outcomes of its stages, with a Python that prints its arguments."""

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.sh"
TOOLS = ("bash", "env", "dirname", "date", "mkdir", "find", "sleep", "timeout")
STAGES = (
    "install",
    "build csrc",
    "tests of the kernels",
    "kernels",
    "throughput suite",
    "routing",
    "tests of the engine",
)

PYTHON = """#!/usr/bin/env bash
case "$*" in
    *get_device_name*) {gpu} ;;
    *find_spec*) for name in {absent}; do [[ "$*" == *"'$name'"* ]] && exit 1; done; exit 0 ;;
    *"import millrace"*) exit 0 ;;
    {cases}
    *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def report(tmp_path):
    """Run the script with only what it needs on the PATH, so that nvcc is not found and nothing is built."""

    def run(*arguments, gpu='echo "NVIDIA H200"', absent="", cases=""):
        python = tmp_path / "python"
        python.write_text(PYTHON.format(gpu=gpu, absent=absent, cases=cases))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        for tool in TOOLS:
            (tmp_path / tool).symlink_to(shutil.which(tool))
        environment = {"PATH": str(tmp_path), "PYTHON": str(python)}
        command = ["bash", SCRIPT, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def summary(done):
    """Stage -> outcome, as the script's last table has it."""
    lines = done.stdout.partition("== summary")[2].partition("\n\n")[0].splitlines()[1:]
    return dict(line.split(": ", 1) for line in lines)


def failures(outcomes):
    """Stages that did not do what they should have done; what is missing on a machine is no failure."""
    return sum(outcome.startswith(("failed", "left out, no time")) for outcome in outcomes.values())


def limits(done):
    """Seconds that each stage that ran was given."""
    return [int(seconds) for seconds in re.findall(r"at most (\d+) s", done.stdout)]


def test_runs_everything_in_order_and_hands_arguments_on(report):
    done = report("--seconds", "1000", "--set", "a.b=1")
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = summary(done)
    assert tuple(outcomes) == STAGES
    assert outcomes["install"] == "not needed"
    assert outcomes["build csrc"] == "left out, missing: nvcc cmake"
    assert all(outcomes[stage].startswith("passed") for stage in STAGES[2:])
    assert "ran -m pytest -q -m cuda tests/kernels tests/csrc" in done.stdout
    (suite,) = (line for line in done.stdout.splitlines() if line.startswith("ran benchmarks/throughput"))
    assert "/suite-NVIDIA-H200-" in suite
    assert suite.endswith("--set a.b=1")
    (kernels,) = (line for line in done.stdout.splitlines() if line.startswith("ran -m benchmarks kernels"))
    assert "--set" not in kernels
    for place, line in ((1, kernels), (2, suite)):
        wanted = int(re.search(r"--seconds (\d+)", line)[1])
        assert wanted == limits(done)[place] * 9 // 10, "it must stop before it is stopped"


def test_unused_time_goes_to_the_later_stages(report):
    done = report("--seconds", "1000")
    given = limits(done)
    assert all(limit <= 1000 for limit in given)
    assert 980 <= given[-1] <= 1000, "the last stage may use all that is left"
    assert given[1] > 300, "the kernels have at least their share"


def test_failures_are_counted_and_stop_nothing(report):
    done = report(cases="*--suite*) exit 3 ;;\n    *benchmarks*kernels*) exit 1 ;;")
    assert done.returncode == 2
    outcomes = summary(done)
    assert outcomes["kernels"].startswith("failed: exit code 1")
    assert outcomes["throughput suite"].startswith("failed: exit code 3")
    assert outcomes["tests of the engine"].startswith("passed")


def test_a_bare_machine_still_measures_the_kernels(report):
    done = report(absent="deepspeed diffusers")
    assert done.returncode == 0
    outcomes = summary(done)
    assert outcomes["tests of the kernels"].startswith("passed")
    assert outcomes["kernels"].startswith("passed")
    assert outcomes["throughput suite"] == "left out, missing: deepspeed"
    assert outcomes["routing"] == "left out, missing: deepspeed diffusers"
    assert outcomes["tests of the engine"] == "left out, missing: deepspeed"


def test_a_stage_out_of_time_is_stopped(report):
    done = report("--seconds", "30", cases="*benchmarks*kernels*) exec sleep 90 ;;")
    outcomes = summary(done)
    stopped = re.fullmatch(r"failed: out of time \((\d+) s\), (\d+) s", outcomes["kernels"])
    given, taken = map(int, stopped.groups())
    assert given < 20, "the stages after it have their share"
    assert given <= taken < given + 20, "a busy machine may be slow to notice"
    assert outcomes["throughput suite"].startswith("passed")
    assert done.returncode == failures(outcomes)


def test_stages_without_time_count_as_failed(report):
    done = report("--seconds", "2", cases="*tests/kernels*) exec sleep 3 ;;")
    outcomes = summary(done)
    without = [stage for stage, outcome in outcomes.items() if outcome == "left out, no time"]
    assert without
    assert done.returncode == failures(outcomes)


def test_needs_a_gpu(report):
    done = report(gpu="exit 1")
    assert done.returncode == 64
    assert "no CUDA device" in done.stderr


@pytest.mark.parametrize("seconds", ["0", "soon", ""])
def test_refuses_a_time_that_is_none(report, seconds):
    done = report("--seconds", seconds)
    assert done.returncode == 64
    assert "--seconds" in done.stderr
