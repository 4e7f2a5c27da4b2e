"""The guidance benchmark: what it tries on which model, its judges, its rows, and the table of the docs."""

import json
import sys
from pathlib import Path

import pytest
import torch

from millrace.benchmarks.quality import guidance as benchmark
from millrace.engine.config.loading import parse_config
from millrace.engine.data.sources.digits import DigitsSource
from millrace.engine.evaluation.recall import recall
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import sampling_flops
from millrace.engine.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


CPU = torch.device("cpu")


def config(source="builtin", **routing):
    values = {
        "model": {
            "width": 32,
            "depth": 3,
            "heads": 1,
            "patch_size": 8,
            "in_channels": 3,
            "context_dim": 16,
        },
        "conditioning": {"text": {"kind": "hash"}, "autoencoder": {"kind": "pixels"}},
        "data": {"source": source, "resolution": 32, "path": "x" if source == "folder" else None},
        "precision": {"compute": "float32"},
        "routing": routing,
        "sampling": {"steps": 3, "solver": "heun", "guidance": 4.0},
    }
    return parse_config(values, "test")


SPRINT = {"policy": "sprint", "start": 1, "end": 1}
TREAD = {"policy": "tread", "start": 1, "end": 1}


@pytest.mark.parametrize(
    ("routing", "methods"),
    [
        ({}, {"none", "cfg"}),
        (TREAD, {"none", "cfg", "self"}),
        (TREAD | {"drop": 0.0}, {"none", "cfg"}),
        (SPRINT, {"none", "cfg", "self", "path_drop"}),
    ],
)
def test_every_guidance_of_a_training_is_tried(routing, methods):
    run = config(**routing)
    found = benchmark.settings(run, (1.5, 3.0))
    assert {change["method"] for change in found.values()} == methods
    for change in found.values():
        sampling = benchmark.sampling_config(run, change).sampling
        assert (sampling.steps, sampling.solver) == (3, "heun")
    kinds = (len(found) - 1) // 4
    assert len(found) == 1 + 2 * 2 * kinds
    assert sum("interval" in change for change in found.values()) == 2 * kinds


def test_solver_steps_may_be_set():
    assert benchmark.sampling_config(config(), {"method": "none"}, 9).sampling.steps == 9


def test_digits_are_judged_by_what_they_show(monkeypatch):
    """Real pictures are read rightly and are at no distance from themselves; mixed up they are not."""
    run = config("digits")
    judge = benchmark.judge_of(run, None)
    test = DigitsSource("test")
    assert judge.prompts == [test.captions(i).long for i in range(len(test))]
    real = benchmark._views(run, test)
    found = judge.measure(real)
    assert set(found) == {"accuracy", "frechet"}
    assert found["accuracy"] > 0.9
    assert found["frechet"] < 1e-6
    assert judge.measure(real.roll(1, 0))["accuracy"] < 0.3
    assert judge.measure(-real)["frechet"] > 1


def test_builtin_pictures_are_judged_by_recall():
    run = config()
    judge = benchmark.judge_of(run, 7)
    assert len(judge.prompts) == 7
    pictures = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = benchmark._views(run, benchmark.open_source(run.data))
    own = torch.tensor([0, 0, 1, 1, 2, 2, 3])  # long and short caption of each
    assert judge.measure(pictures) == {"recall": recall(pictures, views, own)}
    assert judge.measure(views[own]) == {"recall": 1.0}


def test_other_data_have_no_judge():
    with pytest.raises(UserError, match=r"data.source folder: judges there are for digits and builtin only"):
        benchmark.judge_of(config("folder"), None)


def test_rows_of_a_run(monkeypatch, tmp_path, capsys):
    run = config(**SPRINT)
    denoiser = Denoiser(run.model, run.routing)
    denoiser.init_weights(0)
    monkeypatch.setattr(benchmark, "checkpoint_state", lambda folder, _weights: (denoiser.state_dict(), run))
    monkeypatch.setattr(benchmark, "checkpoint_folder", lambda folder: folder)
    words = ["guidance.py", "--run", "a=x", "--scale", "2", "--pictures", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "g.json")])
    assert benchmark.main() == 0
    written = json.loads((tmp_path / "g.json").read_text())
    rows = written["rows"]
    assert written["benchmark"] == "guidance"
    assert [row["guidance"] for row in rows] == list(benchmark.settings(run, (2.0,)))
    judge = benchmark.judge_of(run, 3)
    texts = benchmark.open_sampler(Path("x"), CPU)[0].text_encoder.encode(judge.prompts).embeddings
    for row in rows:
        chosen = run.model_copy(update={"sampling": benchmark.Sampling(**row["sampling"])})
        assert row["flops_per_picture"] == sampling_flops(chosen, 16, len(texts) / 3, 1)
        assert 0 <= row["recall"] <= 1
        assert row["pictures"] == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["run", "guidance", "recall", "GFLOP/picture", "x", "none"]
    assert shown[1].split()[-1] == "1.00"
    assert len(shown) == len(rows) + 2


@pytest.mark.parametrize("words", [[], ["--run", "folder"], ["--run", "=folder"]])
def test_command_line_that_names_no_run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["guidance.py", *words])
    with pytest.raises(SystemExit):
        benchmark.parse()


def test_costs_in_the_docs_are_those_of_the_function():
    assert benchmark.costs() in (ROOT / "docs" / "guidance.md").read_text()
