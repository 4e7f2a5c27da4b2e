"""Progress of preparation: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

from millrace.engine.util.progress_bar import bar_size

_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Progress of one phase over parts of known weight, of which more than the finished ones is known.

    Args:
        total: weight of all parts.
        done: weight of those that an earlier run has finished.
        each: weight of one sample where that is known beforehand.
    """

    def __init__(self, phase: str, total: float, done: float = 0, each: float | None = None) -> None:
        self._phase, self._total, self._each = phase, max(total, 1e-9), each
        self._initial = self._weight = done
        self._finished_items = self._items = self._images = self._rejects = 0
        self._started = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm(total=self._total, initial=done, desc=phase, bar_format=layout, **bar_size())

    def report(self, samples: int, rejects: int) -> None:
        """Count samples and rejects that were just dealt with."""
        self._images += samples
        self._rejects += rejects
        self._items += samples + rejects
        self._show()

    def finish_part(self, weight: float, items: int) -> None:
        """A part of `weight` with `items` samples and rejects, all reported, is finished."""
        self._weight += weight
        self._finished_items += items
        self._show()

    def close(self) -> None:
        """Take the bar away, or write a last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._items:
            self._line()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(max(0.0, self._done() - self._bar.n))
        elif time.monotonic() - self._shown >= _EVERY:
            self._line()

    def _line(self) -> None:
        self._shown = time.monotonic()
        share = (self._done() - self._initial) / max(self._total - self._initial, 1e-9)
        passed = self._shown - self._started
        left = f"{passed * (1 - share) / share:.0f} s left" if 0 < share < 1 else f"{passed:.0f} s"
        counts = f"{self._done() / self._total:.0%}, {self._counts()}, {left}"
        print(f"{self._phase}: {counts}", file=sys.stderr, flush=True)

    def _counts(self) -> str:
        rate = self._images / max(time.monotonic() - self._started, 1e-9)
        rejects = f", {self._rejects:,} rejected" if self._rejects else ""
        return f"{self._images:,} images, {rate:.1f} images/s{rejects}"

    def _done(self) -> float:
        """Weight that is done, by what a sample of the finished parts weighs."""
        each = self._each
        if each is None:
            each = (self._weight - self._initial) / self._finished_items if self._finished_items else 0.0
        return min(self._total, self._weight + each * (self._items - self._finished_items))
