"""The GPU report: order, time and verdicts of its stages, with programs that need no GPU."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.benchmarks.__main__ import PROGRAMS
from millrace.benchmarks.report import gpu_report as report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.sh"
JOB = report.Job(sys.executable, 90, "H200-now")


def stage(name, program="", share=1, needs=()):
    return report.Stage(name, share, needs, lambda _seconds, job: [job.python, "-S", "-c", program])


def run(*stages, seconds=3600.0, most=60.0):
    verdicts = report.run_stages(stages, JOB, seconds, dict(os.environ), most, quiet=True)
    return {verdict.stage: verdict for verdict in verdicts}


def test_a_stage_that_fails_stops_nothing():
    found = run(stage("one", "raise SystemExit(3)"), stage("two"), stage("three", "import os; os.abort()"))
    assert [verdict.outcome for verdict in found.values()] == ["failed", "passed", "failed"]
    assert (found["one"].reason, found["three"].reason) == ("exit code 3", "exit code -6")


def test_what_is_missing_is_named_with_what_brings_it():
    found = run(
        stage("one", needs=("pytest", "no_such", "bin:cmake_of_nobody")), stage("two", needs=("pytest",))
    )
    assert found["one"].outcome == "left out"
    wanted = "missing: no_such (pip install no_such), cmake_of_nobody (pip install cmake_of_nobody)"
    assert found["one"].reason == wanted
    assert found["two"].outcome == "passed"


def test_a_stage_for_several_processes_says_why_one_gpu_is_not_enough(monkeypatch):
    (norms,) = [stage for stage in report.STAGES if "gpus:2" in stage.needs]
    planned = norms._replace(command=stage("norms").command)
    found = {}
    for there in (1, 2):
        monkeypatch.setattr("torch.cuda.device_count", lambda there=there: there)
        found[there] = run(planned)[norms.name]
    wanted = "missing: 2 GPUs, one for each process that reduces (there: 1)"
    assert (found[1].outcome, found[1].reason) == ("left out", wanted)
    assert found[2].outcome == "passed"


def test_time_that_is_not_used_goes_to_the_later_stages(monkeypatch):
    given = []
    monkeypatch.setattr(report, "run", lambda command, limit, *_: given.append(limit) or ("passed", ""))
    run(stage("one", share=1), stage("two", share=1), stage("three", share=2), seconds=400.0, most=1e9)
    assert given == pytest.approx([100, 400 / 3, 400], abs=1)


def test_a_stage_without_time_has_failed():
    found = run(stage("one"), stage("two"), seconds=0.5)
    assert {(verdict.outcome, verdict.reason) for verdict in found.values()} == {("failed", "no time left")}


def test_a_stage_out_of_time_may_publish_what_it_has(tmp_path):
    """It gets an interrupt, which Python programs see as an exception."""
    program = f"""
import time
try:
    print("started", flush=True); open({str(tmp_path / "started")!r}, "w").close(); time.sleep(60)
finally:
    open({str(tmp_path / "published")!r}, "w").close()
"""
    began = time.monotonic()
    found = run(stage("slow", program), stage("next"), most=3.0)
    assert found["slow"].reason == "out of time after 3 s"
    assert found["next"].outcome == "passed"
    assert (tmp_path / "published").exists()
    assert time.monotonic() - began < 30


def test_every_failure_planted_in_every_stage_is_seen(monkeypatch, capsys):
    planted = {"wrong kernel": "raise AssertionError", "missing package": None}
    monkeypatch.setattr(report, "PLANTED", planted)
    monkeypatch.setattr(report, "STAGES", report.STAGES[:3])
    assert report.rehearse(sys.executable) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3
    assert all(line.endswith("{'passed': 4} |") for line in lines[2:])
    monkeypatch.setattr(report, "PLANTED", {"nothing": "pass"})
    assert report.rehearse(sys.executable) == 3, "a failure that is not seen counts"


@pytest.mark.parametrize("stage", report.STAGES, ids=[stage.name for stage in report.STAGES])
def test_commands_name_what_there_is(stage):
    command = stage.command(1000, JOB)
    words = [word for word in command if word.startswith("tests/")]
    assert all((ROOT / word).exists() for word in words)
    if "millrace.benchmarks" in command:
        assert command[command.index("millrace.benchmarks") + 1] in PROGRAMS
    if "--seconds" in command:
        assert command[command.index("--seconds") + 1] == "900", "it must stop before it is stopped"


def test_pictures_come_before_cached_inputs_and_the_smallest_tests_first():
    names = [stage.name for stage in report.STAGES]
    assert names[0] == "smallest tests"
    assert names.index("post, pictures") < names.index("post, cached and live")


FAKE = """#!/usr/bin/env bash
case "$*" in
    *"pip install"*) echo "error: project.license must be valid exactly by one definition" >&2; exit {pip} ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("pip", "said"), [(0, "installed"), (1, "on the path, because it cannot be installed")]
)
def test_a_checkout_that_cannot_be_installed_is_put_on_the_path(tmp_path, pip, said):
    python = tmp_path / "python"
    python.write_text(FAKE.format(pip=pip))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment, how = report.environment_with_millrace(str(python))
    assert how.startswith(said)
    if pip:
        assert "project.license must be valid" in how
        assert "pip install 'setuptools>=77,<82'" in how
        code = "import millrace.benchmarks, os; print(os.path.realpath(millrace.benchmarks.__path__[0]))"
        # Without site-packages, where this checkout is installed.
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stdout.strip() == str(ROOT / "benchmarks"), done.stderr


def test_the_end_is_a_file_and_a_summary_to_paste(tmp_path, monkeypatch, capsys):
    stages = (stage("one"), stage("two", "raise SystemExit(1)"), stage("three", needs=("no_such",)))
    monkeypatch.setattr(report, "STAGES", stages)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(
        report, "gpu", lambda _: ("NVIDIA H200", 90, "torch 2.11.0, CUDA 13.0, Python 3.12.1")
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report.sh", "--minutes", "1"])
    assert report.main() == 1
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("report-NVIDIA-H200-*.json")
    content = json.loads(path.read_text())
    assert [one["outcome"] for one in content["stages"]] == ["passed", "failed", "left out"]
    summary = printed[printed.index("### Millrace on NVIDIA H200 (torch 2.11.0") :]
    assert re.search(r"\| two \| failed: exit code 1 \(\d+ s\) \|", summary)


def test_the_script_hands_its_arguments_on():
    environment = dict(os.environ) | {"PYTHON": sys.executable}
    for words, code, said in (
        (["--help"], 0, "usage: gpu_report.sh"),
        (["--minutes", "0"], 2, "--minutes 0: expected more than 0"),
        (["--minutes", "soon"], 2, "invalid float value"),
    ):
        done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == code
        assert said in done.stdout + done.stderr


def test_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(report, "gpu", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gpu_report.sh"])
    assert report.main() == 64
    assert "torch sees no CUDA device" in capsys.readouterr().err
