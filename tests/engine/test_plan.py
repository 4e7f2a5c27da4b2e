"""`train.py --plan`: the planner's report, for every configuration, without opening or writing anything."""

import re
import sys
from pathlib import Path

import pytest

from millrace.engine import plan as plan_command
from millrace.engine import train
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config
from millrace.engine.planning import search
from millrace.engine.planning.activations import Traced
from millrace.engine.planning.report import plan
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


@pytest.fixture
def quick(monkeypatch):
    """Traces of 1 GB a sample in place of real ones, which have tests of their own."""

    def trace(config, samples, edge, text_tokens, stage):
        return Traced(*(samples * 10**9 for _ in Traced.__dataclass_fields__))

    monkeypatch.setattr(search, "trace", trace)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_configuration_has_a_plan(path, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), "--plan", "8"])
    assert train.main() == 0
    heads = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"model", "routing", "devices", "as configured", "memory", "speed", "settings"} <= heads
    assert list(tmp_path.iterdir()) == []


def test_both_commands_print_the_same(quick, monkeypatch, capsys):
    printed = []
    given = ["--config", str(CONFIGS / "latent_256.json"), "--set", "data.global_batch=64"]
    for command, words in ((train, ["--plan", "4"]), (plan_command, ["--gpus", "4"])):
        monkeypatch.setattr(sys, "argv", ["command", *given, *words])
        assert command.main() == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "devices: 4 x H200 SXM" in printed[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_published_runs(name, quick):
    parameters, tokens, routed = EXPECTED[name]
    config = load_config(CONFIGS / f"{name}.json")
    model, routing = plan(config, 8)[:2]
    assert model.startswith(f"model: {parameters:,} parameters; {tokens} tokens of an image, 256 of a capt")
    assert routing.startswith(f"routing: {config.routing.policy}")
    if routed is None:
        assert routing == "routing: none"
        return
    share, gain = re.search(
        r"; ([\d.]+)% of the dense FLOPs, so steps are up to (.*) times", routing
    ).groups()
    assert (float(share), float(gain)) == routed


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
        plan(Config.model_validate(values), 1)
