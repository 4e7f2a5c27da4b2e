"""`train.py --plan`: what it says, on every configuration, without opening or writing anything."""

import re
import sys
from pathlib import Path

import pytest

from millrace.engine import train
from millrace.engine.config import Config
from millrace.engine.config.loading import (
    load_config,
    parse_config,
)
from millrace.engine.distributed.deepspeed_engine import zero_stage
from millrace.engine.model.flops import training_flops
from millrace.engine.plan import plan
from millrace.engine.planning.fit_check import (
    GIB,
    estimate_bytes,
)
from millrace.engine.util.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.json") if path.name != "schema.json")

PRX = 1_170_691_648
FUSION = 2 * 1792 * 1792 + 1792
EXPECTED = {
    "latent_256": (PRX, 256, None),
    "latent_256_tread": (PRX, 256, (69.6, 1.44)),
    "latent_256_sprint": (PRX + FUSION + 1792, 256, (55.3, 1.81)),
    "latent_256_sprint_paper": (PRX + FUSION, 256, (51.1, 1.96)),
    "jit_1024": (1_177_215_744, 1024, None),
    "jit_1024_tread": (1_177_215_744, 1024, (65.8, 1.52)),
    "jit_1024_sprint": (1_177_215_744 + FUSION + 1792, 1024, (50.3, 1.99)),
}
"""Parameters, image tokens, and per cent of the dense FLOPs with their quotient, of published runs."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_configuration_has_a_plan(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), "--plan"])
    assert train.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "model",
        "tokens",
        "routing",
        "training FLOPs per image",
        f"memory of each of 1 process(es), ZeRO {zero_stage(load_config(path))}",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXPECTED)
def test_published_runs(name):
    parameters, tokens, routed = EXPECTED[name]
    config = load_config(CONFIGS / f"{name}.json")
    model, size, routing, work, _ = plan(config)
    assert model.startswith(f"model: {parameters:,} parameters, width 1792, depth 16")
    assert size == f"tokens: {tokens} of an image, 256 of a caption"
    assert routing.startswith(f"routing: {config.routing.policy}")
    if routed is None:
        assert "gain" not in work
        assert float(work.split()[4]) == pytest.approx(training_flops(config, tokens, 256), rel=1e-3)
        return
    share, gain = re.search(r"\((.*)%\); expected gain: steps up to (.*) times as fast", work).groups()
    assert (float(share), float(gain)) == routed


def test_memory_is_that_of_one_process():
    config = parse_config({"deepspeed": {"zero_optimization": {"stage": 2}}}, "test")
    found = [plan(config, processes)[-1] for processes in (1, 8)]
    for line, processes in zip(found, (1, 8), strict=True):
        parts = estimate_bytes(config, 2, processes, 8)
        assert line.startswith(f"memory of each of {processes} process(es), ZeRO 2: about ")
        assert f"about {sum(parts.values()) / GIB:.1f} GiB" in line
        assert f"Adam moments {8 * PRX / processes / GIB:.2f}" in line
        assert "EMA" not in line  # the run keeps none


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"resolution": 250}}, "data.resolution 250 is not a multiple of the 16 pixels"),
        (
            {"data": {"resolution": 272}, "routing": {"policy": "sprint", "structured": True}},
            r"routing.structured does not fit pictures of 272 pixels: grid is \(17, 17\)",
        ),
    ],
)
def test_what_the_start_would_refuse(values, message):
    with pytest.raises(UserError, match=message):
        plan(Config.model_validate(values))


def test_processes_are_counted_from_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "x.json", "--plan", "0"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--plan 0: the number of processes is 1 or more" in capsys.readouterr().err
