"""Verdicts on trained runs: seeds are not told apart, a learning rate changed tenfold is."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from millrace.benchmarks.quality.seed_pairs import RATES, config_of, curves_of, judged, verdicts
from millrace.benchmarks.report.recording import RESULTS
from millrace.engine.comparison.run_curves import HELD_OUT, read_run
from millrace.engine.comparison.seed_noise import FACTOR, LEAST_SPREAD, spread_of_course
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
    assert set(found["tenfold"]) == {"better"}
    assert set(found["tenth"]) == {"worse"}


def test_pictures_alone_would_decide_by_seed(recorded):
    """What the first part of the error is for."""
    same = [curves_of(run) for run in recorded["runs"] if run["name"] == "same"]
    intervals = [compare_pair(a, b).rows[0].interval for a, b in combinations(same, 2)]
    wrong = sum(abs(i.difference) > 2 * i.pictures.value for i in intervals)
    assert wrong / len(intervals) > 0.25


def test_constants_are_those_of_the_runs(recorded):
    """The ratio of the noise between seeds to the course of a difference, and the noise itself."""
    same = [curves_of(run) for run in recorded["runs"] if run["name"] == "same"]
    ratios, sizes = [], []
    for a, b in combinations(same, 2):
        course = [
            b.curves[HELD_OUT["model"]].values[n] - a.curves[HELD_OUT["model"]].values[n]
            for n in a.curves[HELD_OUT["model"]].values
        ]
        ema = [run.curves[HELD_OUT["ema"]].values for run in (a, b)]
        end = ema[1][max(ema[1])] - ema[0][max(ema[0])]
        ratios.append((end / spread_of_course(course)) ** 2)
        sizes.append((end / ema[0][max(ema[0])]) ** 2)
    assert (sum(ratios) / len(ratios)) ** 0.5 == pytest.approx(FACTOR, rel=0.15)
    assert LEAST_SPREAD < (sum(sizes) / len(sizes)) ** 0.5 < 2.5 * LEAST_SPREAD


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
