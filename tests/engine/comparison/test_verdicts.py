"""Verdicts on made-up runs, whose differences and noise are known."""

import math
import random

import pytest

from millrace.engine.comparison import seed_noise
from millrace.engine.comparison.run_curves import HELD_OUT, Curve, RunCurves
from millrace.engine.comparison.verdicts import compare, compare_pair, group

EMA, MODEL = HELD_OUT["ema"], HELD_OUT["model"]
COUNTS = range(400, 4_801, 400)


def run(seed, rate, losses, *, end=None, counts=COUNTS, name=EMA, digest="a", pictures=None):
    """A run whose held-out loss takes these values; `end` replaces the last."""
    values = dict(zip(counts, losses, strict=True))
    if end is not None:
        values[max(values)] = end
    curve = Curve(values, dict.fromkeys(values, digest))
    if pictures is not None:
        curve.losses[max(values)] = pictures
    return RunCurves(f"{rate}-{seed}", seed, {"optimizer.lr": rate}, 16, {name: curve})


def flat(seed, rate, end, **options):
    return run(seed, rate, [1.0] * len(COUNTS), end=end, **options)


def noisy(generator, seed, rate, level=1.0, offset=0.0, wander=0.002):
    """A falling loss; its seed moves all of it, and each measurement."""
    losses = [level * (1 + 0.5 * math.exp(-i / 3)) + offset + generator.gauss(0, wander) for i in range(12)]
    return run(seed, rate, losses, name=MODEL)


def test_runs_that_differ_in_seed_are_one_setting():
    runs = [flat(0, 1, 1.0), flat(0, 2, 1.0), flat(1, 1, 1.0)]
    first, second = group(runs)
    assert ([r.seed for r in first.runs], [r.seed for r in second.runs]) == ([0, 1], [0])
    (found,) = compare([first, second])
    assert found.differing == {"optimizer.lr": (1, 2)}
    assert (first.letter, found.setting.letter) == ("A", "B")


def test_three_seeds_in_common_are_paired():
    """Differences -0.02, -0.03, -0.04: -0.03 ± 4.3027 * 0.01 / sqrt(3)."""
    runs = [flat(s, 1, 1.0 + s / 10) for s in range(3)]
    runs += [flat(s, 2, 1.0 + s / 10 - 0.02 - s / 100) for s in range(3)]
    (found,) = compare(group(runs))
    (row, *_) = found.rows
    assert row.interval.difference == pytest.approx(-0.03)
    assert row.interval.half == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert row.verdict == "better"
    assert found.sentence.startswith("better by held-out loss, EMA at 4,800 samples: -2.73 % ± 2.26 %")


def test_many_settings_with_the_same_seeds_share_their_noise():
    """Blocks of a seed, of which two settings are the paired test with relative values."""
    generator = random.Random(3)
    values = {rate: [1 + 0.05 * s + generator.gauss(0, 0.001) for s in range(3)] for rate in (1, 2, 3, 4, 5)}
    values[2] = [value * 0.995 for value in values[2]]
    runs = [flat(s, rate, values[rate][s]) for rate in values for s in range(3)]
    second = compare(group(runs))[0].rows[0]
    assert second.interval.seeds.freedom == 8
    assert "3 seeds, paired, spread of 5 settings" in second.interval.seeds.basis
    assert second.interval.seeds.value == pytest.approx(0.001 * math.sqrt(2 / 3), rel=0.5)
    assert second.verdict == "better"
    two = [dict(enumerate(values[rate])) for rate in (1, 2)]
    means = [sum(one.values()) / 3 for one in two]
    relative = [b / means[1] - a / means[0] for a, b in zip(*(one.values() for one in two), strict=True)]
    blocks = seed_noise.blocked(two, [0, 1, 2], math.sqrt(2))
    assert blocks.value == pytest.approx(seed_noise.paired(relative).value)
    assert blocks.freedom == 2


def test_other_seeds_share_the_spread_of_all_settings():
    """Each has 0.99 and 1.01: s = 0.0141, two degrees of freedom, 4.3027 * s * sqrt(1 / 2 + 1 / 2)."""
    runs = [flat(0, 1, 0.99), flat(1, 1, 1.01), flat(2, 2, 0.99), flat(3, 2, 1.01)]
    (found,) = compare(group(runs))
    interval = found.rows[0].interval
    assert interval.half == pytest.approx(4.30265 * math.sqrt(2e-4), rel=1e-3)
    assert found.rows[0].verdict == "not decided"
    # A third setting with one seed borrows that spread.
    runs.append(flat(7, 3, 1.2))
    _, third = compare(group(runs))
    assert third.rows[0].verdict == "worse"
    assert third.rows[0].interval.half == pytest.approx(4.30265 * math.sqrt(2e-4 * 1.5 / 1), rel=1e-2)


def test_pictures_alone_decide_nothing():
    """Every picture is worse by 0.1 %, as by an unlucky seed: the pairs are sure, the seeds are not."""
    losses = [0.9, 1.0, 1.1, 1.2] * 16
    first = flat(0, 1, 1.05, pictures=losses)
    second = flat(1, 2, 1.05 * 1.001, pictures=[x * 1.001 for x in losses])
    found = compare_pair(first, second)
    row = found.rows[0]
    assert abs(row.interval.difference) > 10 * row.interval.pictures.value
    assert row.verdict == "not decided"
    assert "more seeds of each" in found.sentence


def test_few_pictures_widen_the_interval():
    same = [flat(s, 1, 1.0, pictures=[0.5, 1.5]) for s in range(3)]
    other = [flat(s, 2, 0.9 + s / 1e6, pictures=[0.1, 1.7 + 2 * s / 1e6]) for s in range(3)]
    (found,) = compare(group(same + other))
    assert found.rows[0].verdict == "not decided"
    assert "more held-out pictures" in found.sentence


def test_other_pictures_are_not_compared():
    runs = [flat(0, 1, 1.0), flat(0, 2, 0.5, digest="b")]
    (found,) = compare(group(runs))
    assert found.rows[0].verdict == "-"
    assert found.rows[0].remark == "not the same held-out pictures, times and noise"
    assert found.sentence.startswith("no verdict: ")


def test_nothing_is_interpolated():
    first = run(0, 1, [3.0, 2.0, 1.0], counts=(100, 200, 300))
    second = run(0, 2, [3.0, 2.0], counts=(100, 200))
    row = compare_pair(first, second).rows[0]
    assert (row.samples, row.first, row.second) == (200, 2.0, 2.0)
    third = run(0, 2, [3.0, 2.5], counts=(110, 210))
    row = compare_pair(first, third).rows[0]
    assert (row.first, row.second, row.verdict) == (2.0, 2.5, "not decided")
    assert row.remark == "no number of samples in common: at 200 and 210"


def test_few_measurements_of_one_seed_decide_nothing():
    first = run(0, 1, [3.0, 2.0, 1.0], counts=(1, 2, 3))
    second = run(0, 2, [9.0, 9.0, 9.0], counts=(1, 2, 3))
    found = compare_pair(first, second)
    assert found.rows[0].verdict == "not decided"
    assert "two more seeds of each would give an interval" in found.sentence


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_settings_that_are_equal_are_told_apart_in_one_case_of_twenty(seeds):
    generator, tries = random.Random(seeds), 600
    wrong = 0
    for _ in range(tries):
        runs = [
            noisy(generator, seed, rate, offset=generator.gauss(0, 0.01))
            for rate in (1, 2)
            for seed in range(seeds)
        ]
        (found,) = compare(group(runs))
        wrong += found.rows[0].verdict != "not decided"
    assert 0.02 < wrong / tries < 0.08


def test_as_many_seeds_as_it_says_decide():
    """The difference of 2 % stays, and the seeds' spread of 2 %."""
    generator = random.Random(5)
    pairs = [(1 + generator.gauss(0, 0.02), 1.02 + generator.gauss(0, 0.02)) for _ in range(3)]
    runs = [flat(s, rate, pairs[s][rate - 1]) for s in range(3) for rate in (1, 2)]
    (found,) = compare(group(runs))
    interval = found.rows[0].interval
    needed = seed_noise.seeds_to_decide(interval, 3, shared=True)
    assert f"about {needed - 3} more seeds of each" in found.sentence
    one = interval.seeds.value * math.sqrt(3)

    def half(n):
        return seed_noise.half_width(seed_noise.Error(one / math.sqrt(n), n - 1, ""), None)

    assert half(needed) < abs(interval.difference) <= half(needed - 1)


def test_a_difference_that_grows_is_told_in_steps():
    first = run(0, 1, [1.0] * 12)
    second = run(0, 2, [1.0 - 0.0004 * i + 1e-6 * (-1) ** i for i in range(12)])
    found = compare_pair(first, second)
    assert found.rows[0].verdict == "not decided"
    assert "more steps, as the difference grows now" in found.sentence
