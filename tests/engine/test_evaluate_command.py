"""engine/evaluate.py as a command on a trained run, on one process and on two."""

import json
import sys

import pytest

from millrace.engine import evaluate
from millrace.engine.export import main as export
from millrace.engine.util.errors import UserError

CHANGES = {"run": {"steps": 2}, "sampling": {"steps": 2, "guidance": 2.0}}


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "run"
    assert runs.here(output, CHANGES).error is None
    return output


@pytest.fixture
def command(trained, monkeypatch, capsys, tmp_path):
    """`command(words)` -> (report, what was said): a smoke evaluation in this process."""

    def call(*words, checkpoint=trained):
        path = tmp_path / "scores.json"
        start = ("evaluate.py", "--checkpoint", checkpoint, "--smoke", "--cache", tmp_path, "--output", path)
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*start, *words)])
        monkeypatch.delenv("RANK", raising=False)  # training here joined a job
        capsys.readouterr()
        assert evaluate.main() == 0
        return json.loads(path.read_text()), capsys.readouterr()

    return call


def test_report_and_table(command):
    report, told = command()
    assert report["metrics"].keys() == {"fid", "cmmd", "dino_mmd"}
    assert all(value > 0 for value in report["metrics"].values())
    assert (report["samples"], report["reference"], report["smoke"]) == (32, 22, True)
    assert report["checkpoint"].endswith("step-00000002")
    assert (report["sampling"]["steps"], report["sampling"]["guidance"]) == (2, 2.0)
    assert report["networks"]["cmmd"]["identity"].startswith("CLIP-24, weights ")
    assert report["images_per_second"] > 0
    lines = told.out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "FID", "CMMD", "DINO-MMD", "model", "samples", "reference", "sampling", "MFU", "feature", "device"
    ]  # fmt: skip
    assert f"{report['metrics']['fid']:.6g}" in lines[0]
    assert lines[3].endswith("EMA weights of " + report["checkpoint"] + ", step 2; 16 px")
    assert "guidance cfg with scale 2" in told.out
    assert told.err.count("is comparable to no other") == 3
    again, told = command()
    assert again["metrics"] == report["metrics"]
    assert "statistics of" not in told.err


def test_what_the_command_may_change(command, tmp_path):
    report, told = command(
        "--metrics",
        "cmmd",
        "--samples",
        5,
        "--reference-samples",
        7,
        "--guidance",
        1,
        "--steps",
        1,
        "--seed",
        3,
    )
    assert list(report["metrics"]) == ["cmmd"]
    assert (report["samples"], report["reference"], report["evaluation"]["seed"]) == (5, 7, 3)
    assert "no guidance" in told.out
    other, _ = command(
        "--metrics", "cmmd", "--samples", 5, "--reference-samples", 7, "--guidance", 1, "--seed", 3
    )
    assert other["metrics"] != report["metrics"]


def test_exported_weights(command, trained, runs, tmp_path):
    folder, config = tmp_path / "exported", tmp_path / "config.json"
    export(["--checkpoint", str(trained), "--output", str(folder)])
    config.write_text(json.dumps(runs.values(trained, CHANGES)))
    report, _ = command("--config", config, "--metrics", "cmmd", checkpoint=folder)
    wanted, _ = command("--metrics", "cmmd")
    assert report["metrics"]["cmmd"] == pytest.approx(wanted["metrics"]["cmmd"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reference", "/nowhere"), "--reference /nowhere: no such file or folder"),
        (("--features.fid", "/nowhere"), "cannot load '/nowhere'.*set --features.fid"),
        (("--set", "evaluation.samples=1"), "--set evaluation.samples=1: evaluation.samples"),
        (("--output", "/proc/nowhere/x.json"), "--output /proc/nowhere/x.json: cannot be written"),
    ],
)
def test_refusals(command, words, message):
    with pytest.raises(UserError, match=message) as caught:
        command(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(command, trained, runs, tmp_path):
    path = tmp_path / "two.json"
    words = [
        "--checkpoint",
        trained,
        "--smoke",
        "--cache",
        tmp_path / "theirs",
        "--samples",
        70,
        "--output",
        path,
    ]
    done = runs.script("evaluate", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    two, (one, _) = json.loads(path.read_text()), command("--samples", 70)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["reference_identity"] == two["reference_identity"]
    for metric, value in one["metrics"].items():
        assert two["metrics"][metric] == pytest.approx(value, rel=1e-9)
    assert done.stdout.count("DINO-MMD") == 1  # rank 0 alone prints
