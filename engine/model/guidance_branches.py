"""Branches of classifier-free guidance: which evaluations of the denoiser (NFE) a picture takes, and when.

A guided prediction is weak + s (strong - weak); a method says what the two branches are:

| method      | strong                 | weak                                                 |
|-------------|------------------------|------------------------------------------------------|
| cfg         | caption                | no caption                                           |
| self        | caption, `strong_drop` | caption (or none), `weak_drop` of the tokens bypass  |
| path_drop   | caption                | no caption, the routed blocks do not run             |
| none, s = 1 | caption                | there is none                                        |

Nothing here touches a tensor, so costs can be counted before anything is built.
"""

from itertools import pairwise
from typing import NamedTuple

from millrace.engine.config import Config, Routing, Sampling, weak_drop

TRAIN_TIMES = 1000
"""`num_train_timesteps` of diffusers' scheduler, as every published PRX pipeline has it."""


class Branch(NamedTuple):
    """One evaluation of the denoiser."""

    captioned: bool = True
    """With the picture's caption, or with the empty one."""
    drop: float = 0.0
    """Share of tokens that bypass the routed blocks."""
    skip: bool = False
    """Whether the routed blocks do not run at all."""


class Step(NamedTuple):
    """A solver step from time `start` to `end`; Heun's also looks at `end`."""

    start: float
    end: float
    twice: bool


def solver_steps(sampling: Sampling, time_shift: float) -> list[Step]:
    """Steps from noise (t = 1) to data (t = 0): even ones under t -> s t / (1 + (s - 1) t).

    The last step of Heun's method would look at t = 0, where nothing was trained: it is Euler's.
    """

    def shifted(t: float) -> float:
        return time_shift * t / (1 + (time_shift - 1) * t)

    count = sampling.steps
    if sampling.times == "even":
        even = [i / count for i in range(count, -1, -1)]
    else:
        # diffusers shifts the smallest of its training times, and that once more with all others.
        least = shifted(1 / TRAIN_TIMES)
        even = [1 - (1 - least) * i / max(count - 1, 1) for i in range(count)] + [0.0]
    times = [shifted(t) for t in even]
    heun = sampling.solver == "heun"
    return [Step(t, after, heun and after > 0) for t, after in pairwise(times)]


def branches(sampling: Sampling, routing: Routing, t: float) -> tuple[Branch, ...]:
    """The strong branch at time t and, where there is guidance, the weak one."""
    low, high = sampling.interval
    strong = Branch(drop=sampling.strong_drop)
    if not sampling.guided or not low <= t <= high:
        return (strong,)
    match sampling.method:
        case "cfg":
            return strong, Branch(captioned=False)
        case "self":
            weak = weak_drop(sampling, routing)
            return strong, Branch(captioned=not sampling.weak_unconditional, drop=weak)
        case "path_drop":
            return strong, Branch(captioned=False, skip=True)
        case other:
            raise ValueError(f"no guidance is built for {other!r}")


def evaluations(config: Config) -> list[Branch]:
    """Every evaluation of the denoiser that one picture takes under `config.sampling`."""
    sampling, found = config.sampling, []
    for start, end, twice in solver_steps(sampling, config.objective.time_shift):
        for t in (start, end) if twice else (start,):
            found += branches(sampling, config.routing, t)
    return found


def describe(config: Config) -> str:
    """The sampling in one line for people."""
    sampling = config.sampling
    times = "" if sampling.times == "even" else f" at the times of {sampling.times}"
    count = len(evaluations(config))
    line = f"{sampling.steps} steps of {sampling.solver}{times}, {count} evaluations a picture"
    if not sampling.guided:
        return f"{line}, no guidance"
    line += f", guidance {sampling.method} with scale {sampling.guidance:.4g}"
    if sampling.method == "self":
        line += f" from drop {weak_drop(sampling, config.routing):.4g} to {sampling.strong_drop:.4g}"
        if sampling.weak_unconditional:
            line += " and from no caption to the caption"
    low, high = sampling.interval
    return line if (low, high) == (0, 1) else f"{line} for t in [{low:.4g}, {high:.4g}]"
