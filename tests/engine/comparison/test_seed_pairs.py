"""Verdicts on trained runs: seeds are not told apart, a learning rate changed tenfold is."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from millrace.benchmarks.quality.seed_pairs import RATES, config_of, curves_of, judged, measured, verdicts
from millrace.benchmarks.report.recording import RESULTS
from millrace.engine.comparison.run_curves import read_run
from millrace.engine.comparison.seed_noise import FACTOR, LEAST_SPREAD
from millrace.engine.comparison.verdicts import compare, compare_pair, group
from millrace.engine.trainer import train

STEPS, EVERY = 120, 10
FRESH = [("same", 0), ("same", 1), ("same", 2), ("tenfold", 3), ("tenth", 4)]


@pytest.fixture(scope="module")
def recorded():
    """What `python -m benchmarks seed_pairs` wrote."""
    return json.loads((RESULTS / "seed_pairs.json").read_text())


def test_twenty_pairs_of_seeds(recorded):
    found = judged(recorded["runs"])
    assert found == recorded["verdicts"]
    assert sum(found["pairs"].values()) == 20
    assert found["pairs"]["not decided"] >= 19
    every = found["all pairs"]
    assert every["not decided"] / sum(every.values()) >= 0.95


def test_a_learning_rate_changed_tenfold(recorded):
    assert max(run["samples_seen"][-1] for run in recorded["runs"]) == 300 * 16
    found = judged(recorded["runs"])
    assert set(found["tenth"]) == {"worse"}
    assert "worse" not in found["tenfold"]
    assert found["tenfold"]["better"] / sum(found["tenfold"].values()) > 0.9


def test_constants_are_those_of_the_runs(recorded):
    """The noise between seeds, its ratio to the course of a difference, and what pictures alone would say."""
    found = measured(recorded["runs"])
    assert FACTOR * 0.8 < found.ratio <= FACTOR
    assert LEAST_SPREAD < found.spread < 2.5 * LEAST_SPREAD
    assert found.by_pictures > 0.25


def test_three_seeds_a_setting_find_it_too(recorded):
    chosen = [run for run in recorded["runs"] if run["seed"] < 3 and run["name"] in ("same", "tenfold")]
    first, second = group([curves_of(run) for run in chosen])
    assert (len(first.runs), len(second.runs)) == (3, 3)
    (found,) = compare([first, second])
    assert found.rows[0].verdict == "better"
    assert "3 seeds, paired" in found.sentence


def train_all(folder):
    for name, seed in FRESH:
        changes = {"run": {"steps": STEPS}, "validation": {"every_steps": EVERY}}
        train(config_of(Path(folder) / f"{name}-{seed}", seed, RATES[name], **changes))


def test_freshly_trained_runs(runs, tmp_path):
    runs.apart(train_all, str(tmp_path))
    curves = {name: [] for name in RATES}
    for name, seed in FRESH:
        curves[name].append(read_run(tmp_path / f"{name}-{seed}"))
    assert verdicts(combinations(curves["same"], 2)) == {"not decided": 3}
    first = curves["same"][0]
    for name in ("tenfold", "tenth"):
        found = compare_pair(first, curves[name][0])
        assert found.differing == {"optimizer.lr": (2e-3, 2e-3 * RATES[name])}
        assert found.rows[0].verdict in ("better", "worse"), found.sentence
    assert compare_pair(first, curves["tenth"][0]).rows[0].verdict == "worse"
