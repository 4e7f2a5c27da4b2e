"""The waterfall of a step: its roofline, its files, and a real step of a small model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from millrace.benchmarks import throughput
from millrace.benchmarks.models import traffic
from millrace.benchmarks.report import profile_report
from millrace.benchmarks.report.charts import words
from millrace.benchmarks.step import waterfall
from millrace.engine.config.loading import load_config
from millrace.engine.config.smoke import smoke
from millrace.engine.planning.automatic import without_auto

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


LIMITS = {"copy_bytes_per_second": 1e12, "gemm_flops_per_second": 1e14}


def test_the_roofline_is_the_ledger_at_the_measured_rates(tmp_path):
    overrides = [f"run.output_dir={tmp_path}", "conditioning.text.kind=hash"]
    config = without_auto(smoke(load_config(ROOT / "configs" / "jit_1024_tread.json", overrides), overrides))
    lengths = [16] * config.data.micro_batch
    found = waterfall.roofline(config, LIMITS, lengths, 1000, 2, 5e9)
    counted = traffic.steps.with_values(config, {"model": {"attention_backend": "varlen"}})
    entries = traffic.record(counted, "ours", lengths).entries
    flops = sum(entry.cost.flops for entry in entries if entry.cost.kind == "attention")
    assert found["attention"] == pytest.approx(2 * flops / 1e14)
    moved = sum(
        entry.cost.moved
        for entry in entries
        if entry.cost.kind == "other" and entry.operator.startswith("millrace::")
    )
    assert moved > 0
    assert found["fused kernels"] == pytest.approx(2 * moved / 1e12)
    assert found["optimizer"] == pytest.approx(32 * 1000 / 1e12)
    assert found["data and conditioning"] == pytest.approx(2 * len(lengths) * 5e9 / 1e14)
    assert (found["communication"], found["host gaps"]) == (0.0, 0.0)
    other = waterfall.roofline(config, LIMITS, lengths, 0, 1, 0.0)
    assert found["GEMM"] == pytest.approx(2 * other["GEMM"])
    casts = 6 + 2 * 6  # of the weights once, of the gradients in both micro-batches
    assert found["other operators"] - 2 * other["other operators"] == pytest.approx(casts * 1000 / 1e12)


@pytest.mark.parametrize(
    ("folder", "output", "path"),
    [
        (".", "a/b.json", "a/b-profile-latent_256-cached"),
        (".", None, "runs/profiles/profile-latent_256-cached"),
        ("x", "a/b.json", "x/profile-latent_256-cached"),
    ],
)
def test_where_a_profile_goes(folder, output, path):
    arguments = SimpleNamespace(profile=folder)
    assert waterfall.target(arguments, output and Path(output), "latent_256/cached") == Path(path)


def test_a_profiled_step_of_a_small_model(monkeypatch, tmp_path, capsys):
    config, output = ROOT / "configs" / "latent_256_tread.json", tmp_path / "out.json"
    arguments = ["--config", config, "--smoke", "--steps", "1", "--output", output, "--profile"]
    arguments += ["--set", "data.workers=0"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, arguments)])
    assert throughput.main() == 0
    stem = tmp_path / "out-profile-latent_256_tread-cached"
    found = json.loads(stem.with_suffix(".json").read_text())
    seconds = found["seconds"]
    assert tuple(seconds) == waterfall.CATEGORIES
    assert sum(seconds.values()) == pytest.approx(found["step_seconds"], rel=1e-6)
    for category in ("GEMM", "attention", "fused kernels", "other operators", "optimizer", "host gaps"):
        assert seconds[category] > 0, category
    assert seconds["communication"] < 0.05 * found["step_seconds"], "one process has nobody to talk to"
    bounds = found["roofline_seconds"]
    assert set(bounds) == set(waterfall.CATEGORIES)
    assert 0 < bounds["GEMM"] < found["step_seconds"]
    assert found["ceilings"]["gemm_flops_per_second"] > 0
    assert found["unprofiled_step_seconds_median"] > 0
    assert found["heaviest"][0]["seconds"] > 0
    assert found["commit"] is None or len(found["commit"]) == 40
    shown = words(stem.with_suffix(".svg").read_text())
    assert set(waterfall.CATEGORIES) <= set(shown)
    assert "host gaps" in capsys.readouterr().out
    (row,) = json.loads(output.read_text())["rows"]
    assert "profile" not in row, "it has a file of its own"


def test_without_a_roofline_the_picture_says_so(tmp_path):
    found = {
        "seconds": dict.fromkeys(waterfall.CATEGORIES, 0.125),
        "step_seconds": 1.0,
        "roofline_seconds": None,
        "roofline_missing": "Triton is not installed",
        "device": "cpu",
        "cpu": "Some CPU",
        "devices": 1,
        "config": "a",
        "conditioning": "cached",
        "micro_batch": 2,
        "global_batch": 4,
        "smoke": True,
        "versions": {"torch": torch.__version__},
    }
    profile_report.draw(found, tmp_path / "p.svg")
    assert "ms; no roofline: Triton is not installed" in words((tmp_path / "p.svg").read_text())
    assert profile_report.table(found).rows[0][2] == "12.5%"
