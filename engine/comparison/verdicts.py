"""Verdicts on runs: settings grouped over seeds, differences with intervals, a sentence for each setting.

The first run's setting is what the others are compared with. Quantities are taken at the largest number of
samples that all runs of both settings have been measured at; nothing is interpolated.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from millrace.engine.comparison.run_curves import HELD_OUT, SPEED, TRAINING, RunCurves
from millrace.engine.comparison.seed_noise import (
    CONFIDENCE,
    FEWEST,
    Error,
    Interval,
    between_seeds,
    of_pictures,
    seeds_to_decide,
    single,
    slope_of_course,
    spread_of_course,
)

HIGHER = (SPEED,)
"""Quantities of which more is better."""
_DISTRUST = 10.0
"""No more than so many times the training so far is extrapolated."""


class Setting(NamedTuple):
    """Runs that differ in nothing but their seed."""

    letter: str
    runs: list[RunCurves]

    @property
    def seeds(self) -> dict[int, RunCurves]:
        """Its runs by seed; of a seed that was trained twice the last."""
        return {run.seed: run for run in self.runs}


class Row(NamedTuple):
    """One quantity of two settings."""

    quantity: str
    samples: int | None
    """Samples seen; None for what is of the whole run."""
    first: float
    second: float
    interval: Interval | None
    """None where the noise is not known."""
    verdict: str
    """better, worse, not decided; faster or slower; - where none is given."""
    remark: str = ""


class Comparison(NamedTuple):
    """A setting beside the first."""

    setting: Setting
    differing: dict[str, tuple[Any, Any]]
    """Settings by `section.key`: of the first, of this one."""
    rows: list[Row]
    sentence: str
    """The verdict in words."""


def group(runs: Sequence[RunCurves]) -> list[Setting]:
    """The settings of runs in the order of the runs."""
    found: list[Setting] = []
    for run in runs:
        for setting in found:
            if setting.runs[0].settings == run.settings:
                setting.runs.append(run)
                break
        else:
            found.append(Setting(_letter(len(found)), [run]))
    return found


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"S{number + 1}"


def compare(settings: Sequence[Setting]) -> list[Comparison]:
    """Every setting beside the first."""
    return [_beside(settings[0], setting, settings) for setting in settings[1:]]


def compare_pair(first: RunCurves, second: RunCurves) -> Comparison:
    """Two runs as if they were of two settings."""
    settings = [Setting("A", [first]), Setting("B", [second])]
    return compare(settings)[0]


def differing_settings(first: RunCurves, second: RunCurves) -> dict[str, tuple[Any, Any]]:
    """What two runs set differently, by `section.key`."""
    keys = sorted(first.settings.keys() | second.settings.keys())
    pairs = {key: (first.settings.get(key), second.settings.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _beside(first: Setting, second: Setting, settings: Sequence[Setting]) -> Comparison:
    runs = first.runs + second.runs
    names = [name for name in first.runs[0].curves if all(name in run.curves for run in runs)]
    order = [*HELD_OUT.values(), *(n for n in names if n not in (*HELD_OUT.values(), TRAINING)), TRAINING]
    rows = [_row(name, first, second, settings) for name in order if name in names]
    rows.append(_speed(first, second, settings))
    found = [row for row in rows if row is not None]
    differing = differing_settings(first.runs[0], second.runs[0])
    return Comparison(second, differing, found, _sentence(found, first, second))


def _row(name: str, first: Setting, second: Setting, settings: Sequence[Setting]) -> Row | None:
    """A curve at the end of what both settings have."""
    runs = first.runs + second.runs
    common = sorted(set.intersection(*(set(run.curves[name].values) for run in runs)))
    remark = ""
    if common:
        at = dict.fromkeys(map(id, runs), common[-1])
    else:  # the nearest to the end of the shortest run
        end = min(max(run.curves[name].values) for run in runs)
        at = {id(run): min(run.curves[name].values, key=lambda n: abs(n - end)) for run in runs}
        counts = " and ".join(f"{n:,}" for n in sorted(set(at.values())))
        remark = f"no number of samples in common: at {counts}"
    value = {id(run): run.curves[name].values[at[id(run)]] for run in runs}
    means = [statistics.fmean(value[id(run)] for run in setting.runs) for setting in (first, second)]
    row = Row(name, max(at.values()), means[0], means[1], None, "-", remark)
    if name == TRAINING:
        return row._replace(remark=remark or "of what each was trained on, by its own terms")
    pictures = None
    if name in HELD_OUT.values():
        if len({run.curves[name].sets[at[id(run)]] for run in runs}) > 1:
            return row._replace(remark="not the same held-out pictures, times and noise")
        pictures = _pictures(name, first, second, at)
    groups = [
        {seed: run.curves[name].values[common[-1]] for seed, run in setting.seeds.items()}
        for setting in settings
        if common and all(common[-1] in _values(run, name) for run in setting.runs)
    ]
    difference, seeds = between_seeds(_by_seed(first, value), _by_seed(second, value), groups)
    if seeds is None:
        seeds = _error_of_course(name, runs, means[0])
    if seeds is None:
        held_out = name in HELD_OUT.values()
        short = f"one seed, and fewer than {FEWEST} common measurements in the second half of the training"
        unknown = short if held_out else "one seed: the noise between seeds is not known"
        return row._replace(verdict="not decided", remark=remark or unknown)
    interval = Interval(difference, seeds, pictures)
    return row._replace(interval=interval, verdict=_word(name, interval))


def _by_seed(setting: Setting, value: dict[int, float]) -> dict[int, float]:
    """Values of a setting's runs, which are given by their id."""
    return {seed: value[id(run)] for seed, run in setting.seeds.items()}


def _values(run: RunCurves, name: str) -> dict[int, float]:
    curve = run.curves.get(name)
    return curve.values if curve is not None else {}


def _error_of_course(name: str, runs: Sequence[RunCurves], level: float) -> Error | None:
    """Of a held-out loss, from the measurements of one pair of runs; None for a metric, whose noise between
    seeds its course does not tell. An average is as calm as it is made, so that the course of the weights
    themselves counts where it is there."""
    if name not in HELD_OUT.values():
        return None
    curves = [name for name in reversed(HELD_OUT.values()) if all(name in run.curves for run in runs)]
    one, two = (run.curves[curves[0]].values for run in runs)
    spread = spread_of_course([two[n] - one[n] for n in sorted(one.keys() & two.keys())])
    return None if spread is None else single(spread, level)


def _pictures(name: str, first: Setting, second: Setting, at: dict[int, int]) -> Error | None:
    """From the losses of single pictures, averaged over seeds."""
    sides = []
    for setting in (first, second):
        rows = [run.curves[name].losses.get(at[id(run)]) for run in setting.runs]
        if not all(rows) or len({len(row) for row in rows}) > 1:
            return None
        sides.append([statistics.fmean(column) for column in zip(*rows, strict=True)])
    if len(sides[0]) != len(sides[1]) or len(sides[0]) < 2:
        return None
    return of_pictures([b - a for a, b in zip(*sides, strict=True)])


def _word(name: str, interval: Interval) -> str:
    if not interval.decided:
        return "not decided"
    lower = interval.difference < 0
    if name == SPEED:
        return "slower" if lower else "faster"
    return "better" if lower else "worse"


def _speed(first: Setting, second: Setting, settings: Sequence[Setting]) -> Row | None:
    """Images/s over the whole runs; with one seed each, by the spread between parts of the run."""
    runs = first.runs + second.runs
    if any(run.speed is None for run in runs):
        return None
    value = {id(run): run.speed for run in runs}
    means = [statistics.fmean(value[id(run)] for run in setting.runs) for setting in (first, second)]
    groups = [{seed: run.speed for seed, run in s.seeds.items() if run.speed is not None} for s in settings]
    difference, seeds = between_seeds(_by_seed(first, value), _by_seed(second, value), groups)
    if seeds is None and all(len(run.speeds) > 2 for run in runs):
        errors = [statistics.stdev(run.speeds) / math.sqrt(len(run.speeds)) for run in runs]
        freedom = sum(len(run.speeds) - 1 for run in runs)
        seeds = Error(math.hypot(*errors), freedom, "one run each, from its parts")
    row = Row(SPEED, None, means[0], means[1], None, "-", "of the machines that they ran on")
    if seeds is None:
        return row
    interval = Interval(difference, seeds, None)
    return row._replace(interval=interval, verdict=_word(SPEED, interval))


def _sentence(rows: list[Row], first: Setting, second: Setting) -> str:
    """The verdict of the first quantity that can be judged."""
    judged = [row for row in rows if row.verdict != "-" and row.quantity != SPEED]
    if not judged:
        return "no verdict: no held-out loss and no metric in common; set validation.every_steps"
    row = judged[0]
    if row.interval is None:
        return f"not decided by {row.quantity}: {row.remark}; two more seeds of each would give an interval"
    found, count = row.interval, min(len(first.runs), len(second.runs))
    percent, width = 100 * found.difference / row.first, 100 * found.half / row.first
    text = f"{row.verdict} by {row.quantity} at {row.samples:,} samples: {percent:+.2f} % ± {width:.2f} %"
    text += f" ({100 * CONFIDENCE:g} %; {found.seeds.basis})"
    if found.decided:
        return text
    shared = set(first.seeds) == set(second.seeds)
    seeds = seeds_to_decide(found, count, shared)
    ways = []
    if seeds is not None:
        ways.append(f"about {seeds - count} more seeds of each")
    elif found.pictures is not None and abs(found.difference) <= 2 * found.pictures.value:
        ways.append("more held-out pictures (validation.samples)")
    if steps := _steps_to_decide(row, first, second):
        ways.append(f"about {steps:,} more steps, as the difference grows now")
    if not ways:
        return f"{text}; equal within that: more than 30 seeds would be needed"
    return f"{text}; {' or '.join(ways)} would decide if the difference stays"


def _steps_to_decide(row: Row, first: Setting, second: Setting) -> int | None:
    """Further steps after which a difference that grows as it does now leaves the interval; None where it
    does not grow, or it would take too long."""
    assert row.interval is not None
    one, two = first.runs[0].curves[row.quantity].values, second.runs[0].curves[row.quantity].values
    counts = sorted(one.keys() & two.keys())
    found = slope_of_course(counts, [two[n] - one[n] for n in counts])
    if found is None:
        return None
    slope, error = found
    if slope * row.interval.difference <= 0 or abs(slope) < 2 * error:
        return None
    more = (row.interval.half - abs(row.interval.difference)) / abs(slope)
    if more > _DISTRUST * counts[-1]:
        return None
    return max(1, math.ceil(more / second.runs[0].global_batch))
