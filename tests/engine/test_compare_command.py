"""millrace compare on folders of runs: table, verdicts, files."""

import json

import pytest

from millrace.engine import compare
from millrace.engine.config.loading import merge
from millrace.engine.util.errors import UserError


@pytest.fixture
def made(runs, tmp_path):
    """`made(name, changes, loss)` -> folder of a run of 12 validations and two evaluations."""

    def make(name, changes, loss, *, fid=20.0, speed=50.0):
        folder = tmp_path / name
        folder.mkdir()
        config = runs.config(folder, {"run": {"steps": 120}, "ema": {"enabled": False}}, changes)
        (folder / "config.json").write_text(config.model_dump_json())
        log = [
            {"step": step, "loss": 2.0, "images_per_second": speed + step % 3, "grad_norm": 1.0}
            for step in range(1, 121)
        ]
        log += [{"step": step, "evaluation": {"fid": fid + 120 / step}} for step in (60, 120)]
        (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in log))
        held_out = [
            {
                "step": step,
                "samples_seen": 8 * step,
                "stage": "",
                "weights": "model",
                "loss": loss + 1 / step,
                "by_time": [loss],
                "set": "f00d",
                "losses": [loss + 1 / step + place / 10 - 0.15 for place in range(4)],
            }
            for step in range(10, 121, 10)
        ]
        text = "".join(f"{json.dumps(record)}\n" for record in held_out)
        (folder / "validation.jsonl").write_text(text + '{"step": 130, "sam')  # cut off
        return folder

    return make


def seeds_of(made, name, changes, losses, **options):
    return [
        made(f"{name}-{seed}", merge(changes, {"run": {"seed": seed}}), loss, **options)
        for seed, loss in enumerate(losses)
    ]


def test_table_and_files(made, capsys, tmp_path):
    usual = seeds_of(made, "usual", {}, [1.0, 1.01, 0.99])
    better = seeds_of(made, "better", {"optimizer": {"lr": 2e-3}}, [0.9, 0.905, 0.895], fid=15.0, speed=40.0)
    output = tmp_path / "beside"
    assert compare.main([*map(str, usual + better), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"A  {', '.join(map(str, usual))} (seeds: 0, 1, 2)"
    assert lines[1] == f"B  {', '.join(map(str, better))} (seeds: 0, 1, 2): optimizer.lr 0.001 -> 0.002"
    rows = {line.split("  ")[1].strip() or line: line for line in lines if line.startswith("B  ")}
    assert rows["held-out loss, model"].endswith("better")
    assert "  960  " in rows["held-out loss, model"]
    assert rows["FID"].endswith("better")
    assert "slower [" in rows["images/s"]
    assert "-  [" not in rows["training loss"]
    assert "of the machines that they ran on" in out
    assert "B: better by held-out loss, model at 960 samples: -9." in out
    report = json.loads((output / "comparison.json").read_text())
    (found,) = report["comparisons"]
    assert found["differing"] == {"optimizer.lr": [0.001, 0.002]}
    row = found["rows"][0]
    assert row["verdict"] == "better"
    assert row["interval"]["difference"] == pytest.approx(-0.1)
    assert row["interval"]["seeds"]["freedom"] == 2
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_logging_and_folders_make_no_setting(made, capsys):
    runs_of_one = [
        made("a", {"run": {"seed": 1}}, 1.0),
        made("b", {"run": {"seed": 2}, "logging": {"every_steps": 3}, "checkpoint": {"keep": 2}}, 1.0),
    ]
    with pytest.raises(UserError, match="all runs have the same settings but for the seed"):
        compare.main([str(run) for run in runs_of_one])


def test_without_matplotlib_there_is_no_picture(made, capsys, tmp_path, monkeypatch):
    import builtins

    usual, real = [made("a", {}, 1.0), made("b", {"optimizer": {"lr": 2e-3}}, 1.2)], builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert compare.main([*map(str, usual), "--output", str(tmp_path / "out")]) == 0
    assert "comparison.json; no picture: No module named 'matplotlib'" in capsys.readouterr().out


def test_without_anything_to_judge_by(made, capsys):
    usual = [made("a", {}, 1.0), made("b", {"optimizer": {"lr": 2e-3}}, 1.2)]
    for folder in usual:
        (folder / "validation.jsonl").unlink()
        steps = [line for line in (folder / "log.jsonl").read_text().splitlines() if "evaluation" not in line]
        (folder / "log.jsonl").write_text("\n".join(steps) + "\n")
    compare.main([str(folder) for folder in usual])
    out = capsys.readouterr().out
    assert "B: no verdict: no held-out loss and no metric in common; set validation.every_steps" in out
    (usual[0] / "log.jsonl").write_text("")
    with pytest.raises(UserError, match=r"log\.jsonl has no steps yet"):
        compare.main([str(folder) for folder in usual])
