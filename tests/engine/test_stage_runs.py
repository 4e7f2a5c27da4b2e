"""Runs of several stages: they train, say what changes, and go on from anywhere as if never stopped."""

import json
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from millrace.engine import evaluate, export, sample
from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier
from millrace.engine.evaluation.features import tiny_features, tiny_networks

pytestmark = pytest.mark.slow

KEYS = ["builtin/astronaut", "builtin/chelsea", "builtin/coffee"]


def stages(folder):
    """REPA, then larger pictures without it, then fine-tuning on a few chosen ones; files go to `folder`."""
    teacher, keys = folder / "teacher", folder / "keys.txt"
    if not teacher.exists():
        torch.manual_seed(0)
        save_classifier(SmallClassifier(classes=3, width=4), teacher)
        keys.write_text("\n".join(KEYS) + "\n")
    return {
        "run": {"steps": 9},
        "data": {"aspect": "mixed"},
        "checkpoint": {"every_steps": 2, "keep": 20},
        "alignment": {
            "kind": "repa",
            "block": 1,
            "teacher": {"kind": "classifier", "path": str(teacher), "dtype": "float32"},
        },
        "stages": [
            {
                "at": 3,
                "name": "larger",
                "alignment": {"kind": "none"},
                "data": {"resolution": 24, "micro_batch": 4},
                "optimizer": {"lr": 5e-4},
            },
            {
                "at": 6,
                "name": "sft",
                "data": {"keys": str(keys), "long_caption": 1.0, "global_batch": 4},
                "schedule": {"kind": "constant", "warmup": 2},
            },
        ],
    }


KILLS = 6


def zero(number):
    return {"deepspeed": {"zero_optimization": {"stage": number}}}


@pytest.fixture(scope="module")
def staged(runs, tmp_path_factory):
    """Folder with whole-<ZeRO stage> and killed-<i>, which were killed and resumed."""
    root = tmp_path_factory.mktemp("staged")
    names = [f"whole-{number}" for number in (0, 2)]
    jobs = [runs.job(root / name, stages(root), zero(int(name[-1]))) for name in names]
    rng = random.Random(3)
    killed = []
    for i in range(KILLS):
        moment = (names[i % 2], (i + rng.random()) / KILLS)
        killed.append(runs.job(root / f"killed-{i}", stages(root), zero(2 * (i % 2)), killed=moment))
    runs.forked([*jobs, *killed])
    results = runs.forked([replace(job, killed=None, resume="auto") for job in killed])
    assert [result.error for (result,) in results.values()] == [None] * KILLS
    return root


def test_the_log_tells_the_stages(runs, staged):
    records = runs.log(staged / "whole-0")
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["stage"] for record in records] == [""] * 3 + ["larger"] * 3 + ["sft"] * 3
    assert [set(record["losses"]) for record in records] == [{"flow", "repa"}] * 3 + [{"flow"}] * 6
    # The cosine of the first two stages ends at `final` before the third; that one warms up again.
    assert [record["lr"] for record in records[5:]] == pytest.approx([0.05 * 5e-4, 2.5e-4, 5e-4, 5e-4])


@pytest.mark.parametrize("i", range(KILLS))
def test_killed_anywhere_and_resumed_is_bit_identical(runs, staged, i):
    runs.assert_same_bits(staged / f"killed-{i}", staged / f"whole-{2 * (i % 2)}")


@pytest.mark.parametrize(("step", "stage", "pixels"), [(3, None, 16), (4, "larger", 24), (9, "sft", 24)])
def test_commands_take_the_settings_of_the_checkpoint_s_stage(staged, tmp_path, capsys, step, stage, pixels):
    """A checkpoint at a boundary is the last of the stage before it."""
    folder = dict(list_checkpoints(staged / "whole-0" / "checkpoints"))[step]
    words = ["--checkpoint", str(folder), "--prompt", "a cat", "--steps", "1", "--output", str(tmp_path)]
    assert sample.main(words) == 0
    assert [Image.open(path).size for path in tmp_path.glob("*.png")] == [(pixels, pixels)]
    where = f"EMA weights of {folder}, step {step}{f', stage {stage!r}' if stage else ''}"
    assert f"{where}: {pixels} x {pixels} pixels\n" in capsys.readouterr().out
    assert export.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert f"{where}, in float32, format diffusers\n" in capsys.readouterr().out


def test_the_command_evaluates_what_the_run_evaluated(runs, tmp_path, capsys):
    """Of a later stage with another size, time shift and guidance: every digit of the log."""
    changes = {
        "run": {"steps": 4},
        "sampling": {"steps": 2, "every_steps": 2},
        "evaluation": {
            "every_steps": 2,
            "samples": 6,
            "cache": str(tmp_path / "statistics"),
            "features": tiny_features(tiny_networks(tmp_path / "networks")),
        },
        "stages": [
            {
                "at": 2,
                "name": "larger",
                "data": {"resolution": 32},
                "objective": {"time_shift": 3.0},
                "sampling": {"guidance": 1.5},
            }
        ],
    }
    run = tmp_path / "run"
    assert runs.here(run, changes).error is None
    assert "step 4, ema weights, 32 px: FID" in capsys.readouterr().err
    logged = {line["step"]: line["evaluation"] for line in runs.log(run) if "evaluation" in line}
    for step, folder in list_checkpoints(run / "checkpoints"):
        assert evaluate.main(["--checkpoint", str(folder), "--output", str(tmp_path / "scores.json")]) == 0
        report = json.loads((tmp_path / "scores.json").read_text())
        assert report["metrics"] == {name: logged[step][name] for name in report["metrics"]}
        assert report["resolution"] == (16 if step == 2 else 32)
    for step, size, guidance in ((2, 16, 5.0), (4, 32, 1.5)):
        made_by = json.loads(Image.open(run / "samples" / f"step-{step:08d}.png").text["millrace"])
        assert made_by["size"] == [size, size]
        assert made_by["sampling"]["guidance"] == guidance


def test_a_boundary_is_a_checkpoint_and_is_announced(runs, tmp_path, capsys):
    assert runs.here(tmp_path / "run", stages(tmp_path)).error is None
    said = capsys.readouterr().err
    assert "stage 1 of 3: steps 1 to 3\n" in said
    changed = "alignment.kind, data.micro_batch, data.resolution, optimizer.lr"
    assert f"stage 2 of 3 (larger): steps 4 to 6; changed: {changed}\n" in said
    assert (
        "stage 3 of 3 (sft): steps 7 to 9; changed: data.global_batch, data.keys, data.long_caption" in said
    )
    assert "data: 22 pictures" in said
    assert "data: 3 pictures" in said
    published = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert published >= {"step-00000003", "step-00000006", "step-00000009"}
    held = {
        step: set(CheckpointReader(path).names())
        for step, path in list_checkpoints(tmp_path / "run" / "checkpoints")
    }
    assert any(name.startswith("master/alignment.") for name in held[3])
    assert not any("/alignment." in name for name in held[6])
    assert "finished: 9 steps, 60 samples" in said
