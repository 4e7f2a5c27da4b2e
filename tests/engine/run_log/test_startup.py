"""The text that a run prints before its first step."""

from types import SimpleNamespace

import pytest
import torch

from millrace.engine.config.stages import resolve_stages
from millrace.engine.distributed import deepspeed_engine, process_group
from millrace.engine.run_log.startup import introduction
from millrace.engine.util.errors import UserError

SHAPES = [("img_in.weight", (32, 48)), ("img_in.bias", (32,))]
ROWS = [("master weights (this rank)", "float32 (1,568)"), ("gradient reduction", "float32")]


def text(config, stage=0, kernels=""):
    stages = resolve_stages(config)
    prepare = SimpleNamespace(
        device=torch.device("cpu"),
        text_encoder=SimpleNamespace(identity="hash-16", kernels=kernels),
        autoencoder=SimpleNamespace(identity="pixels"),
    )
    return introduction(stages, stages[stage], SHAPES, range(30), prepare, ROWS)


def test_every_line(runs, tmp_path):
    assert text(runs.config(tmp_path, {"model": {"attention_backend": "sdpa"}})) == [
        "model: 1,568 parameters, width 32, depth 2",
        "data: 30 pictures (builtin); text: hash-16; pictures as pixels",
        "job: 1 process(es) on cpu, ZeRO 0, 4 x 2 samples per process and step",
        "routing: none",
        "attention: sdpa",
        "precision audit:",
        "  master weights (this rank)       float32 (1,568)",
        "  gradient reduction               float32",
    ]


def test_names_the_backend_of_geglu_where_it_was_asked_for(runs, tmp_path, monkeypatch):
    changes = {"model": {"attention_backend": "sdpa", "geglu_backend": "liger"}}
    config = runs.config(tmp_path, changes)
    monkeypatch.setattr("millrace.engine.run_log.startup.liger_obstacle", lambda _: "it is not installed")
    with pytest.raises(UserError, match=r"^model.geglu_backend liger: it is not installed; pip install '"):
        text(config)
    monkeypatch.setattr("millrace.engine.run_log.startup.liger_obstacle", lambda _: None)
    lines = text(config)
    assert lines[lines.index("attention: sdpa") + 1] == "geglu: liger"


def test_names_the_kernels_of_a_text_encoder(runs, tmp_path):
    kernels = "liger-kernel 0.8.5 (RMSNorm, RoPE, GeGLU)"
    lines = text(runs.config(tmp_path, {"model": {"attention_backend": "sdpa"}}), kernels=kernels)
    assert lines[lines.index("attention: sdpa") + 1] == f"text encoder's kernels: {kernels}"


@pytest.mark.parametrize(
    ("processes", "stage", "micro_batch", "line"),
    [
        (1, 1, 8, "job: 1 process(es) on cpu, ZeRO 1, 1 x 8 samples per process and step"),
        (2, 2, 2, "job: 2 process(es) on cpu, ZeRO 2, 2 x 2 samples per process and step"),
        (8, 3, 1, "job: 8 process(es) on cpu, ZeRO 3, 1 x 1 samples per process and step"),
    ],
)
def test_processes_stage_and_accumulation(runs, tmp_path, monkeypatch, processes, stage, micro_batch, line):
    for module in (process_group, deepspeed_engine):
        monkeypatch.setattr(module, "world_size", lambda: processes)
    changes = {
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "data": {"global_batch": 8, "micro_batch": micro_batch},
    }
    assert text(runs.config(tmp_path, changes))[2] == line


def test_a_run_of_stages_begins_with_its_stage(runs, tmp_path):
    changes = {"stages": [{"at": 2, "name": "large", "data": {"resolution": 32}}]}
    config = runs.config(tmp_path, changes)
    assert text(config)[0] == "stage 1 of 2: steps 1 to 2"
    assert text(config, 1)[0] == "stage 2 of 2 (large): steps 3 to 6; changed: data.resolution"
    assert text(config)[1].startswith("model: ")


def test_warnings_about_guidance_only_where_pictures_are_made(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("millrace.engine.run_log.startup.guidance_warnings", lambda *_: ["warning: beware"])
    assert "warning: beware" in text(runs.config(tmp_path, {"sampling": {"every_steps": 2}}))
    assert "warning: beware" in text(runs.config(tmp_path, {"evaluation": {"every_steps": 2}}))
    assert "warning: beware" not in text(runs.config(tmp_path))


@pytest.mark.slow
def test_a_run_prints_it_before_its_first_step(runs, tmp_path, capsys):
    runs.here(tmp_path / "run", {"run": {"steps": 1}})
    shown = capsys.readouterr().err.splitlines()
    job = shown.index("job: 1 process(es) on cpu, ZeRO 0, 4 x 2 samples per process and step")
    (first,) = (i for i, line in enumerate(shown) if line.startswith("step 1/1 "))
    assert job < shown.index("precision audit:") < first
