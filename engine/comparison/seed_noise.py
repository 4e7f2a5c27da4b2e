"""Seed noise: how far runs of one setting lie apart, and the interval that a difference has by it.

Held-out pictures of two runs can be paired, but the pairs of one pair of runs share what the seeds did to its
two trainings. So the error of a difference has two parts, and the first does not shrink with more pictures:

    error² = error of the seeds² + error of the pictures²

The error of the seeds comes from the first of these that there is:

    three seeds in common       sd(d_s) / sqrt(n), d_s differences of runs with the same seed; n - 1
    the same of more settings   sigma sqrt((a² + b²) / n), sigma the relative spread over blocks of a seed, of
                                all settings that have the n seeds; (settings - 1) (n - 1), two or more
    two seeds of any setting    s sqrt(1 / n_a + 1 / n_b), s pooled over all settings; sum of (n_g - 1)
    one seed each               FACTOR times the spread of the difference along the training; FREEDOM

The last number is that of the degrees of freedom. They are joined as Welch and Satterthwaite do (Biometrics
Bulletin 2, 1946), and the interval is Student's.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
FACTOR = 2.5
"""Standard deviation between pairs of seeds over the spread along the training: 2.3 as root mean square over
the pairs of `python -m benchmarks seed_pairs`, rounded up."""
FREEDOM = 4
"""Degrees of freedom that are given to the error of a single pair of runs: it is known roughly."""
LEAST_SPREAD = 0.002
"""Error of the seeds of a single pair, relative to the value, at least: the same runs have 0.0032."""
FEWEST = 5
"""Measurements in the second half of a training from which a spread is taken."""
MOST_SEEDS = 30
LEAST_FREEDOM = 2
"""Degrees of freedom from which runs are paired by seed; with one, Student's t is 12.7."""


class Error(NamedTuple):
    """A standard error."""

    value: float
    freedom: float
    """Degrees of freedom."""
    basis: str
    """For people."""


class Interval(NamedTuple):
    """A difference of two settings, and where it lies by the noise."""

    difference: float
    """Of the second from the first."""
    seeds: Error
    pictures: Error | None
    """None where there are no pairs of pictures."""

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return math.hypot(self.seeds.value, self.pictures.value if self.pictures else 0.0)

    @property
    def half(self) -> float:
        """Half the width."""
        return half_width(self.seeds, self.pictures)

    @property
    def decided(self) -> bool:
        """Whether zero lies outside."""
        return abs(self.difference) > self.half


def quantile(freedom: float) -> float:
    """Student's t that |t| stays below with CONFIDENCE."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def half_width(seeds: Error, pictures: Error | None) -> float:
    """Half the width of the interval of a difference with these errors."""
    parts = [seeds] if pictures is None else [seeds, pictures]
    squares = [part.value**2 for part in parts]
    total = sum(squares)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(square**2 / part.freedom for square, part in zip(squares, parts, strict=True))
    return quantile(freedom) * math.sqrt(total)


def paired(differences: Sequence[float]) -> Error:
    """Of the mean of differences between runs with the same seed."""
    count = len(differences)
    return Error(statistics.stdev(differences) / math.sqrt(count), count - 1, f"{count} seeds, paired")


def blocked(settings: Sequence[Mapping[int, float]], seeds: Sequence[int], level: float) -> Error:
    """Of a difference between the means of two of many settings over seeds that all of them have.

    A randomized block design, a seed a block: each value is divided by the mean of its setting, what all
    settings have in common with a seed is taken away, and the rest is the noise.

    Args:
        level: root of the sum of squares of the two means.
    """
    means = [statistics.fmean(values[seed] for seed in seeds) for values in settings]
    rows = [[values[seed] / mean for seed in seeds] for values, mean in zip(settings, means, strict=True)]
    common = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    rest = sum((value - base) ** 2 for row in rows for value, base in zip(row, common, strict=True))
    freedom = (len(rows) - 1) * (len(seeds) - 1)
    error = level * math.sqrt(rest / freedom / len(seeds))
    return Error(error, freedom, f"{len(seeds)} seeds, paired, spread of {len(rows)} settings")


def pooled_spread(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation between seeds relative to the mean, over all settings with several seeds, and its
    degrees of freedom; None without any."""
    known = [group for group in groups if len(group) > 1 and statistics.fmean(group)]
    parts = [(statistics.variance(g) / statistics.fmean(g) ** 2, len(g) - 1) for g in known]
    freedom = sum(count for _, count in parts)
    if not freedom:
        return None
    return math.sqrt(sum(variance * count for variance, count in parts) / freedom), freedom


def pooled(spread: float, freedom: int, level: float, first: int, second: int) -> Error:
    """Of a difference between means of `first` and `second` seeds about `level`, with a relative spread."""
    error = spread * abs(level) * math.sqrt(1 / first + 1 / second)
    return Error(error, freedom, f"{first} and {second} seeds, pooled spread {spread:.2%}")


def between_seeds(
    first: Mapping[int, float], second: Mapping[int, float], settings: Sequence[Mapping[int, float]]
) -> tuple[float, Error | None]:
    """Difference of two settings, given the value of each by seed, and its error.

    Args:
        settings: values of all settings that share their spread, these two among them.

    The error is None where every setting has one seed.
    """
    shared = sorted(first.keys() & second.keys())
    alike = [
        values for values in settings if values.keys() >= set(shared) and statistics.fmean(values.values())
    ]
    if (len(alike) - 1) * (len(shared) - 1) >= LEAST_FREEDOM:
        differences = [second[seed] - first[seed] for seed in shared]
        means = [statistics.fmean(values[seed] for seed in shared) for values in (first, second)]
        error = paired(differences) if len(alike) == 2 else blocked(alike, shared, math.hypot(*means))
        return statistics.fmean(differences), error
    level = statistics.fmean(first.values())
    difference = statistics.fmean(second.values()) - level
    found = pooled_spread([list(values.values()) for values in settings])
    if found is None:
        return difference, None
    return difference, pooled(*found, level, len(first), len(second))


def spread_of_course(differences: Sequence[float]) -> float | None:
    """Spread of a difference along the training around a straight line, in its second half; None where there
    are fewer than FEWEST measurements.

    A setting that is better moves the line; what seeds do moves the difference around it as well.
    """
    late = differences[len(differences) // 2 :]
    count = len(late)
    if count < FEWEST:
        return None
    middle, mean = (count - 1) / 2, statistics.fmean(late)
    slope = sum((i - middle) * d for i, d in enumerate(late)) / sum((i - middle) ** 2 for i in range(count))
    rest = sum((d - mean - slope * (i - middle)) ** 2 for i, d in enumerate(late))
    return math.sqrt(rest / (count - 2))


def single(spread: float, level: float) -> Error:
    """Of the difference of two runs with one seed each, whose difference has this spread along the training;
    `level` is the value that it is a difference of."""
    error = math.hypot(FACTOR * spread, LEAST_SPREAD * level)
    return Error(error, FREEDOM, "one seed, from the course of the training")


def of_pictures(differences: Sequence[float]) -> Error:
    """Of a mean over held-out pictures, by the differences of each picture's losses."""
    count = len(differences)
    return Error(statistics.stdev(differences) / math.sqrt(count), count - 1, f"{count} pictures")


def seeds_to_decide(found: Interval, count: int, shared: bool) -> int | None:
    """Seeds of each setting with which the difference, if it stays, would be decided; None above MOST_SEEDS.

    Args:
        count: seeds of each that there are.
        shared: whether the same seeds are, or would be, trained in both.
    """
    one = found.seeds.value * math.sqrt(count)
    for n in range(max(count + 1, 3), MOST_SEEDS + 1):
        error = Error(one / math.sqrt(n), n - 1 if shared else 2 * (n - 1), "")
        if abs(found.difference) > half_width(error, found.pictures):
            return n
    return None


def slope_of_course(counts: Sequence[int], differences: Sequence[float]) -> tuple[float, float] | None:
    """Slope of a difference by samples seen in the second half of the training, and its standard error."""
    x, y = counts[len(counts) // 2 :], differences[len(differences) // 2 :]
    spread = spread_of_course(differences)
    if spread is None:
        return None
    middle = statistics.fmean(x)
    square = sum((value - middle) ** 2 for value in x)
    mean = statistics.fmean(y)
    slope = sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / square
    return slope, spread / math.sqrt(square)
