import random
from fractions import Fraction

import numpy as np
import pytest

from millrace.engine.data.sources.mixture_shares import CHUNK, SharePlan


def weight_at(weight, step):
    """Exact value at a step of a weight that was written in decimals."""
    if isinstance(weight, float):
        return Fraction(str(weight))
    steps = [at for at, _ in weight]
    if step <= steps[0] or step >= steps[-1]:
        return Fraction(weight[0 if step <= steps[0] else -1][1])
    right = next(i for i, at in enumerate(steps) if at > step)
    (a, low), (b, high) = weight[right - 1], weight[right]
    return Fraction(low) + (Fraction(high) - Fraction(low)) * Fraction(step - a, b - a)


def owed(weights, batch, steps, first=0):
    """T of each step as exact fractions: a list of lists."""
    rows, total = [], [Fraction(0)] * len(weights)
    for k in range(steps):
        now = [weight_at(weight, first + k) for weight in weights]
        total = [t + batch * w / sum(now) for t, w in zip(total, now, strict=True)]
        rows.append(total)
    return rows


def reference(weights, batch, steps, horizon):
    """Earliest deadline first, one sample after another; a sample due after `horizon` steps is never due."""
    targets = owed(weights, batch, horizon)
    given, rows = [0] * len(weights), []
    for k in range(steps):
        for _ in range(batch):
            may = [p for p, t in enumerate(targets[k]) if t > given[p]]

            def urgency(p, k=k):
                due = next((j for j in range(k, horizon) if targets[j][p] >= given[p] + 1), horizon)
                return due, -(targets[k][p] - int(targets[k][p])), p

            given[min(may, key=urgency)] += 1
        rows.append(list(given))
    return rows


WEIGHTS = {
    "equal": [1.0, 1.0],
    "one": [3.0],
    "shares": [0.7, 0.2, 0.1],
    "rare": [1.0, 0.01, 0.02],
    "seven": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "crossfade": [((0, 1.0), (30, 0.0)), ((0, 0.0), (30, 1.0))],
    "bump": [1.0, ((5, 0.0), (10, 8.0), (11, 8.0), (20, 0.0)), 0.5],
    "off": [1.0, 1.5, ((7, 1.0), (8, 0.0)), ((7, 2.0), (8, 0.0))],
}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_counts_are_those_of_the_rule_applied_sample_by_sample(weights, batch):
    plan = SharePlan(weights, batch)
    assert [plan.given(k + 1).tolist() for k in range(50)] == reference(weights, batch, 50, 250)


def test_every_step_is_full_and_no_part_is_a_sample_away_from_its_share():
    rng = random.Random(1)
    worst = 0
    for _ in range(60):
        batch, first = rng.choice([1, 2, 5, 8]), rng.choice([0, 0, 11])
        weights = [1.0]
        for _ in range(rng.randint(0, 6)):
            steps = sorted(rng.sample(range(60), rng.randint(1, 4)))
            points = tuple((step, float(rng.choice([0, 0, 1, 2, 7]))) for step in steps)
            weights.append(points if rng.random() < 0.6 else float(rng.choice([0, 1, 5, 20])))
        plan, before = SharePlan(weights, batch, first), np.zeros(len(weights))
        for k, targets in enumerate(owed(weights, batch, 100, first)):
            given = plan.given(k + 1)
            assert given.dtype == np.int64
            assert given.sum() == batch * (k + 1)
            assert (given >= before).all()
            away = max(abs(n - t) for n, t in zip(given.tolist(), targets, strict=True))
            assert away < 1
            worst, before = max(worst, away), given
    assert worst > 0.8  # the bound is not far from what happens


def test_shares_that_give_whole_numbers_are_met_exactly_at_every_step():
    plan = SharePlan([0.7, 0.2, 0.1], 10)
    for k in (1, 2, 3, 1000, 123_457, 1_000_000):
        assert plan.given(k).tolist() == [7 * k, 2 * k, k]


def test_a_part_of_weight_zero_gives_nothing_and_comes_and_goes():
    plan = SharePlan([1.0, 0.0, ((10, 0.0), (11, 1.0), (20, 1.0), (21, 0.0))], 4)
    assert [plan.given(k).tolist() for k in (10, 11, 21, 30)] == [
        [40, 0, 0],
        [44, 0, 0],
        [64, 0, 20],
        [100, 0, 20],
    ]


def test_steps_are_those_of_the_run():
    weights = [((100, 1.0), (110, 0.0)), 1.0]
    late = SharePlan(weights, 8, first_step=105)
    assert late.given(40).tolist() == SharePlan([((0, 0.5), (5, 0.0)), 1.0], 8).given(40).tolist()
    assert SharePlan(weights, 8, first_step=500).given(40).tolist() == [0, 320]


def test_any_order_of_questions_gives_the_same_answers():
    weights = [1.0, 0.003, ((0, 0.0), (2 * CHUNK, 1.0)), 0.0004]
    steps = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 5]
    forward = SharePlan(weights, 2)
    expected = {k: forward.given(k).tolist() for k in steps}
    backward = SharePlan(weights, 2)
    assert {k: backward.given(k).tolist() for k in reversed(steps)} == expected
    for k in steps:
        assert SharePlan(weights, 2).given(k).tolist() == expected[k]


def test_a_long_run_is_replayed_quickly():
    """Not a time limit: how many steps were walked one by one, which is what would be slow."""
    calls = []

    class Counting(SharePlan):
        def _count(self, first, start):
            calls.append(first)
            return super()._count(first, start)

    plan = Counting([0.6, ((0, 0.3), (50_000, 0.1)), 0.05], 256)
    assert plan.given(1_000_000).sum() == 256_000_000
    assert calls == list(range(0, 1_000_000, CHUNK))
