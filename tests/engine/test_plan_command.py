"""`python -m millrace.engine.plan`: what it recommends, and what it says of bad input."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.engine import plan
from millrace.engine.config.loading import load_config
from millrace.engine.config.stages import resolve_stages
from millrace.engine.planning import search
from millrace.engine.planning.activations import Traced
from millrace.engine.planning.report import plan as plan_lines
from millrace.engine.util.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICK = str(CONFIGS / "quickstart.json")


def lines(*words):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert plan.main(["--config", QUICK, *words]) == 0
    return printed.getvalue().splitlines()


def test_the_recommendation_and_its_reasons():
    found = lines("--gpus", "8", "--set", "data.global_batch=64")
    heads = [line.partition(":")[0] for line in found]
    wanted = ["model", "routing", "devices", "as configured", "ZeRO stage", "micro-batch"]
    wanted += ["activation checkpointing", "memory", "host memory", "step", "speed", "duration", "settings"]
    assert heads[: len(wanted)] == wanted
    values = {line.partition(": ")[0]: line.partition(": ")[2] for line in found}
    assert values["devices"] == "8 x H200 SXM"
    stage, micro_batch = values["ZeRO stage"], values["micro-batch"].partition(",")[0]
    assert f"why ZeRO {stage}" in values
    assert f"why micro-batch {micro_batch}" in values
    assert f"why checkpointing {values['activation checkpointing']}" in values
    assert re.search(r"[\d.]+ GB of 129.7 GB usable", values["memory"])
    assert f"--set deepspeed.zero_optimization.stage={stage}" in values["settings"]
    # Days and hours, for the steps of the run, follow from the seconds of a step.
    seconds = float(values["step"].partition(" s:")[0])
    images = float(re.match(r"([\d,]+) images/s", values["speed"])[1].replace(",", ""))
    assert images == pytest.approx(64 / seconds, rel=0.01)
    assert "for 900 steps, 57,600 images" in values["duration"]
    assert any(line.startswith("Assumed, not measured:") for line in found)
    taken = [line for line in found if line.endswith("<- taken")]
    assert len(taken) == 1
    assert taken[0].split()[:2] == [stage, micro_batch]


def test_the_configuration_as_it_is():
    """The same settings by hand cost the same; what does not divide the batch is no run, and it says so."""
    zero = ["--set", "deepspeed.zero_optimization.stage=0"]
    given = ["--gpus", "2", "--set", "data.global_batch=32", "--set", "data.micro_batch=16", *zero]
    found = lines(*given)
    memory, seconds = re.search(
        r"as configured: ZeRO 0, micro-batch 16, checkpointing none: ([\d.]+) GB, ([\d.]+) s a step",
        next(line for line in found if line.startswith("as configured")),
    ).groups()
    row = next(line.split() for line in found if line.split()[:3] == ["0", "16", "none"])
    assert (row[3], row[5]) == (memory, seconds)
    other = lines(*given, "--set", "data.micro_batch=12")
    (reason,) = (line for line in other if line.startswith("as configured"))
    assert reason.startswith("as configured: data.global_batch 32 is not a multiple of data.micro_batch 12")


def test_a_faster_row_that_is_not_taken_has_its_reason(monkeypatch):
    """With little to compute, ZeRO 3 hides its communication and stage 1 is within 5 % of it."""
    traced = Traced(10**9, 10**9, 10**9, 10**12)
    monkeypatch.setattr(search, "trace", lambda *_: traced)
    config = load_config(CONFIGS / "latent_256.json")
    found = plan_lines(config, 16)
    table = found[next(i for i, line in enumerate(found) if line.lstrip().startswith("ZeRO  ")) + 1 :]
    assert table[0].split()[:3] == ["3", "16", "none"]
    assert next(line for line in table if line.endswith("<- taken")).split()[0] == "1"
    (reason,) = (line for line in found if line.startswith("why not the fastest"))
    assert "ZeRO 3 with checkpointing none is" in reason
    assert "within the 5% that the model cannot tell" in reason
    assert not any(line.startswith("why not") for line in plan_lines(config, 1))


def test_the_settings_are_a_run_s(capsys, monkeypatch):
    found = lines("--gpus", "2", "--set", "data.global_batch=32")
    words = next(line for line in found if line.startswith("settings: ")).removeprefix("settings: ").split()
    from millrace.engine import train

    given = ["train.py", "--config", QUICK, *words, "--print-config"]
    monkeypatch.setattr(sys, "argv", given)
    assert train.main() == 0
    assert '"stage": 1' in capsys.readouterr().out


def test_every_stage_of_a_run_is_planned():
    second = '[{"at": 300, "name": "finer", "data": {"resolution": 64}}]'
    found = lines("--set", f"stages={second}")
    assert [line for line in found if line.startswith("== ")] == [
        "== steps 0 to 300",
        "== steps 300 to 900: finer",
    ]
    assert sum("256 tokens of an image" in line for line in found) == 1
    assert any(line.startswith("whole run: ") for line in found)
    # What is printed can be typed, and sets every stage.
    (settings,) = (line for line in found if line.startswith("settings: "))
    typed = ["--set", f"stages={second}", *shlex.split(settings.removeprefix("settings: "))]
    config = load_config(QUICK, [word for word in typed if word != "--set"])
    sizes = [line.split()[1].rstrip(",") for line in found if line.startswith("micro-batch: ")]
    assert [str(stage.config.data.micro_batch) for stage in resolve_stages(config)] == sizes
    assert resolve_stages(config)[1].config.data.resolution == 64


def test_this_machine():
    found = lines("--device", "cpu", "--gpus", "2", "--set", "data.global_batch=4")
    assert "devices: 2 x processor of this machine" in found
    assert not any(line.startswith("Assumed") for line in found)


def test_a_slow_loader_is_the_step():
    found = lines("--loader", "1", "--set", "data.global_batch=32")
    assert any(line.startswith("step: 32 s") and "waiting for the loader" in line for line in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "3", "--set", "data.global_batch=32"], "data.global_batch 32 is not a multiple of 3"),
        (["--set", "data.resolution=33"], "data.resolution 33 is not a multiple"),
        (["--set", "model.wdith=3"], "wdith"),
        (["--set", "run.steps=many"], "run.steps"),
    ],
)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(UserError) as raised:
        lines(*words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_as_a_module():
    command = [sys.executable, "-m", "millrace.engine.plan", "--config", "nowhere.json", "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.json: no such configuration file; ")
    assert done.stderr.count("\n") == 1
