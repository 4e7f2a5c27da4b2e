"""Mixture weights: how many samples of each step come from each part of a mixture.

With s_p(k) the normalised weight of part p at step k and G the samples of a step, part p is owed

    T_p(k) = G (s_p(0) + ... + s_p(k))

samples after step k. The plan C_p(k) holds, for every k and p,

    sum_p C_p(k) = G (k + 1),    C_p(k) >= C_p(k - 1),    |C_p(k) - T_p(k)| < 1,

so every step is full, and at no time is a part a whole sample away from its share. Rounding each step by the
largest remainder and carrying the rest over does not always keep the last line: a part may be rounded up just
before its weight falls to zero. What keeps it is earliest deadline first, as in the chairman assignment
problem (R. Tijdeman, Discrete Mathematics 32, 1980): sample j of part p may be taken once T_p > j - 1 and
must be by the time T_p >= j; among those that may, the ones that must be soonest come first.

In other words C_p = floor(T_p) + a_p with a_p in {0, 1}. How many parts are ahead (a_p = 1) at step k is
known, G (k + 1) - sum floor(T_p); which ones is the choice, and a part ahead stays so until T_p catches up.
"""

import numpy as np

from millrace.engine.config.data import Points

CHUNK = 4096
"""Steps computed at a time."""
_DIGITS = 6
_SNAP = 10.0**-_DIGITS
"""A T_p this near to an integer is that integer: sums of floats miss it by their rounding."""


class SharePlan:
    """The counts C_p(k) for weights that are numbers or functions of the step.

    Args:
        weights: of n parts, each a number or (step, value) points; not all zero at any step.
        global_batch: G.
        first_step: step of the run at which k is 0.
    """

    def __init__(self, weights: list[float | Points], global_batch: int, first_step: int = 0) -> None:
        self._batch = global_batch
        ends = [weight[-1][0] for weight in weights if not isinstance(weight, float)]
        # Shares are constant from the last row of this table on.
        steps = np.arange(max(0, *ends, first_step) - first_step + 1)
        at = np.stack([_along(weight, steps + first_step) for weight in weights], 1)
        shares = at / at.sum(1, keepdims=True)
        self._owed = global_batch * np.cumsum(shares, 0)
        self._rate = global_batch * shares[-1]
        self._starts = [np.zeros(len(weights), np.int64)]
        self._recent: dict[int, np.ndarray] = {}

    def given(self, steps: int) -> np.ndarray:
        """Samples (n,) int64 that each part gave in the first `steps` steps."""
        number, row = divmod(steps, CHUNK)
        while number >= len(self._starts):
            self._starts.append(self._chunk(len(self._starts) - 1)[-1])
        return self._starts[number] if row == 0 else self._chunk(number)[row - 1]

    def _chunk(self, number: int) -> np.ndarray:
        """C of the steps [number, number + 1) CHUNK: (CHUNK, n) int64."""
        if number not in self._recent:
            if len(self._recent) == 2:
                self._recent.pop(min(self._recent))
            self._recent[number] = self._count(number * CHUNK, self._starts[number])
        return self._recent[number]

    def _count(self, first: int, start: np.ndarray) -> np.ndarray:
        """C (CHUNK, n) of the steps from `first` on, where the parts gave `start` (n,) before."""
        owed = self._targets(np.arange(first - 1, first + CHUNK))
        floor = np.floor(owed).astype(np.int64)
        before, whole = floor[:-1], floor[1:]
        ahead = self._batch * np.arange(first + 1, first + CHUNK + 1) - whole.sum(1)
        # Equal remainders stay equal whatever the rounding of their sums.
        fraction = np.round(owed[1:] - whole, _DIGITS)
        due = np.stack([self._first_step(p, whole[:, p] + 1) for p in range(whole.shape[1])], 1)
        # Best last in the order of keys: owed anything at all, soonest due, largest remainder, first part.
        order = np.lexsort((-fraction, due, fraction == 0), axis=1)
        free = np.argsort(order, axis=1) < ahead[:, None]
        same = before == whole
        # Nearly always the free choice keeps everyone who must stay ahead; only the other steps are walked.
        clash = np.zeros(CHUNK, bool)
        clash[1:] = (free[:-1] & same[1:] & ~free[1:]).any(1)
        clashes = np.flatnonzero(clash)
        last, k = start > before[0], 0
        chosen = free.copy()
        while k < CHUNK:
            stay = last & same[k]
            if (stay & ~free[k]).any():
                ranked = order[k][~stay[order[k]]]
                chosen[k] = stay
                chosen[k, ranked[: ahead[k] - stay.sum()]] = True
                last, k = chosen[k], k + 1
                continue
            later = clashes[np.searchsorted(clashes, k, side="right") :]
            k = int(later[0]) if len(later) else CHUNK
            last = free[k - 1]
        return whole + chosen

    def _targets(self, steps: np.ndarray) -> np.ndarray:
        """T (len(steps), n) after each of `steps`; -1 is before the first."""
        inside = np.clip(steps, 0, len(self._owed) - 1)
        owed = self._owed[inside] + (steps - inside)[:, None].clip(min=0) * self._rate
        owed[steps < 0] = 0
        near = np.rint(owed)
        return np.where(np.abs(owed - near) < _SNAP, near, owed)

    def _first_step(self, part: int, values: np.ndarray) -> np.ndarray:
        """First step at which T of `part` is at least each of `values`: float64, infinite for never."""
        owed = self._owed[:, part]
        steps = np.searchsorted(owed, values - _SNAP).astype(np.float64)
        beyond = steps == len(owed)
        rate = self._rate[part]
        if not rate:
            steps[beyond] = np.inf
            return steps
        wait = (values[beyond] - _SNAP - owed[-1]) / rate
        steps[beyond] = len(owed) - 1 + np.ceil(wait)
        return steps


def _along(value: float | Points, steps: np.ndarray) -> np.ndarray:
    if isinstance(value, float):
        return np.full(len(steps), value)
    at, values = zip(*value, strict=True)
    return np.interp(steps, at, values)
