"""`train.py` as a user calls it."""

import json
import subprocess

import pytest
import torch
from PIL import Image

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config

pytestmark = pytest.mark.slow


def test_a_run_on_one_process(runs, tmp_path):
    """From a folder that is neither the repository nor the script's, with everything that a run writes."""
    output = tmp_path / "run"
    changes = {
        "checkpoint": {"every_steps": 2, "keep": 2},
        "sampling": {"every_steps": 6, "steps": 2, "count": 4},
        "logging": {"tensorboard": True, "every_steps": 4},
    }
    done = subprocess.run(
        runs.command(output, changes, arguments=("--set", "run.steps=6")),
        env=runs.environment() | {"PYTHONPROFILEIMPORTTIME": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "finished: 6 steps, 48 samples, 0 steps skipped" in done.stderr
    assert "master weights (this rank)       float32" in done.stderr
    # What was imported is on stderr too: nothing of the tuning of autoencoders.
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line
    }
    assert "millrace.engine.losses.total" in imported
    assert not {name for name in imported if name.startswith("millrace.engine.repa_e")}
    # The log is read from the device every 4 steps and before each checkpoint, and misses none.
    assert [record["step"] for record in runs.log(output)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in list_checkpoints(output / "checkpoints")] == [4, 6]
    grid = json.loads(Image.open(output / "samples" / "step-00000006.png").text["millrace"])
    assert grid["model"].endswith("step 6, ema weights")
    assert (output / "samples" / "prompts.txt").read_text().splitlines() == grid["prompts"]
    assert len(grid["prompts"]) == 4
    assert list((output / "tensorboard").iterdir())
    resolved = load_config(output / "config.json")
    assert resolved == load_config(output.with_suffix(".json"), ["run.steps=6"])


def test_help_shows_examples(runs):
    done = runs.script("train", "--help")
    assert done.returncode == 0
    for word in (
        "--config",
        "--set",
        "--smoke",
        "--resume",
        "examples:",
        "torchrun --nproc-per-node 8 engine/train.py",
    ):
        assert word in done.stdout


def test_no_configuration_is_a_usage_error(runs):
    done = runs.script("train")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config FILE is needed")


def test_print_config_is_the_resolved_configuration(runs, tmp_path):
    done = runs.train(tmp_path / "run", arguments=("--print-config", "--set", "optimizer.lr=0.5"))
    assert done.returncode == 0
    assert Config.model_validate_json(done.stdout).optimizer.lr == 0.5
    assert not (tmp_path / "run").exists()


def test_print_config_looks_into_the_stages(runs, tmp_path):
    stages = 'stages=[{"at": 3, "dta": {}}]'
    done = runs.train(tmp_path / "run", arguments=("--print-config", "--set", stages))
    assert done.returncode == 2
    assert done.stderr == "error: stage 'stage 1': unknown key 'dta'; did you mean 'data'?\n"


def test_print_schema_is_json(runs):
    done = runs.script("train", "--print-schema")
    assert done.returncode == 0
    assert set(Config.model_fields) < set(json.loads(done.stdout)["properties"])


def test_a_run_starts_from_the_weights_of_another(runs, tmp_path):
    """`run.init_from`: a run's folder, whose own config.json is not a diffusers one."""
    assert runs.here(tmp_path / "first", {"run": {"steps": 2}}).error is None
    weights, _ = checkpoint_state(tmp_path / "first")
    changes = {"run": {"steps": 1, "init_from": str(tmp_path / "first")}, "optimizer": {"lr": 1e-30}}
    assert runs.here(tmp_path / "second", changes, {"ema": {"enabled": False}}).error is None
    found, _ = checkpoint_state(tmp_path / "second")
    # One update of 1e-30 shows only where a weight is zero.
    assert all(torch.allclose(found[name], weights[name], rtol=0, atol=1e-29) for name in weights)


def test_what_changed_since_the_checkpoint_is_said(runs, tmp_path):
    first = runs.train(tmp_path / "run", arguments=("--set", "run.steps=1"))
    assert first.returncode == 0
    more = ("--resume", "auto", "--set", "run.steps=2", "--set", "objective.time_uniform=0.5")
    done = runs.train(tmp_path / "run", arguments=more)
    assert done.returncode == 0
    assert "warning: changed since the checkpoint: objective.time_uniform, run.steps" in done.stderr
    assert f"saved {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}" in done.stderr


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_a_smoke_run_can_be_repeated(runs, tmp_path, folder):
    given = ("--set", f"run.output_dir={tmp_path / folder}") if folder else ()
    for _ in range(2):
        done = runs.train(tmp_path / "run", arguments=("--smoke", *given))
        assert done.returncode == 0, done.stderr
        assert "finished: 4 steps" in done.stderr
    if folder:
        other = ("--smoke", *given, "--set", "optimizer.lr=0.5")
        done = runs.train(tmp_path / "run", arguments=other)
        assert done.returncode == 2
        assert "already holds a run" in done.stderr
