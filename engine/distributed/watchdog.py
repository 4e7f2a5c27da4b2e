"""Watchdog: names the rank and the phase that a stalled step waits for, before the collectives' timeout.

All ranks enter the same phases in the same order and count them; the rank with the lowest count is the one
that the others wait for. A thread beside the training looks every few seconds. While steps end within QUIET
seconds nothing is sent; then each rank writes where it is to the job's store, and rank 0 says who is behind:

    step 41 has not ended for 130 s: rank 3 (gpu07) is in 'data' for 129 s; 7 ranks wait for it

It says so at a limit, again at twice that, and so on, and once when the run goes on. Slow steps are no stall:
the limit is at least SLOW of the longest step so far, and the first step of a stage, which compiles, has the
limit of a long phase.
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch.distributed as dist

from millrace.engine.distributed.process_group import rank, world_size

log = logging.getLogger(__name__)

LOOK = 5.0
"""Seconds between two looks."""
QUIET = 60.0
"""Seconds in one step after which a rank writes where it is."""
LIMIT = 120.0
"""Seconds in one step after which rank 0 says who is behind."""
SLOW = 4
"""The limit, in longest steps."""
LONG = 900.0
"""The same where a rank is in a phase that takes minutes in a healthy run; half the collectives' timeout."""

LONG_PHASES = ("start", "save", "samples")
_SHOWN = 8

Store = dist.Store


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    count: int
    """Phases that it has entered."""
    step: int
    phase: str
    entered: float
    """Clock at which it entered the phase, in seconds."""
    begun: float
    """Clock at which the step or a long phase of it began."""


@dataclass(frozen=True)
class Report:
    """Where a stalled rank says that it is."""

    count: int
    phase: str
    seconds: float
    """In the phase."""
    host: str


class Watchdog:
    """Watches the phases that the trainer enters.

    Args:
        stalled: called in the thread at every look at which the step has not ended for two looks, with the
            job's store (None with one process).
        say: shows a line; called on rank 0.
    """

    def __init__(
        self, stalled: Callable[[Store | None], None] | None = None, say: Callable[[str], None] = log.warning
    ) -> None:
        self._stalled, self._say = stalled, say
        now = time.monotonic()
        self._at = Place(0, 0, "start", now, now)
        self._longest = 0.0
        self._first = True
        """Whether no step has ended since the start of the stage."""
        self._seen: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Begin to watch; the process group is there."""
        self._store = _job_store() if world_size() > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()

    def place(self) -> str:
        """Where this rank is, in words."""
        return "while it started" if self._at.phase == "start" else f"after step {self._at.step}"

    def enter(self, step: int, phase: str) -> None:
        """This rank begins a phase of the step after `step`."""
        now, at = time.monotonic(), self._at
        long = phase in LONG_PHASES or at.phase in LONG_PHASES
        fresh = step != at.step or long
        if step != at.step and not long:
            self._longest = max(self._longest, 0.0 if self._first else now - at.begun)
            self._first = False
        self._first |= phase == "start"
        self._at = Place(at.count + 1, step, phase, now, now if fresh else at.begun)

    def _watch(self) -> None:
        said: Place | None = None
        limit = 0.0
        try:
            while not self._ended.wait(LOOK):
                at, now = self._at, time.monotonic()
                if said is not None and at.begun != said.begun:
                    self._say(f"step {said.step + 1}: the run goes on")
                    said, limit = None, 0.0
                if self._stalled is not None and now - at.begun >= 2 * LOOK:
                    self._stalled(self._store)
                if self._store is None or now - at.begun < QUIET:
                    continue
                report = Report(at.count, at.phase, now - at.entered, socket.gethostname())
                self._store.set(_key(rank()), json.dumps(vars(report)))
                if rank() == 0:
                    reports = self._reports(now)
                    if now - at.begun >= (limit or self._limit(reports)):
                        self._say(describe(at.step + 1, now - at.begun, reports, world_size()))
                        said, limit = at, 2 * (now - at.begun)
        except (RuntimeError, OSError) as error:  # the store has gone, with the job
            log.debug("watchdog ends: %s", error)

    def _limit(self, reports: dict[int, Report]) -> float:
        if self._first or any(report.phase in LONG_PHASES for report in reports.values()):
            return LONG
        return max(LIMIT, SLOW * self._longest)

    def _reports(self, now: float) -> dict[int, Report]:
        """By rank, where the ranks are that have written within the last looks."""
        ranks = [number for number in range(world_size()) if self._store.check([_key(number)])]
        for number, text in zip(ranks, self._store.multi_get([_key(n) for n in ranks]), strict=True):
            if self._seen.get(number, ("", 0.0))[0] != text:  # seconds grow with every report
                self._seen[number] = (text, now)
        fresh = {number: text for number, (text, at) in self._seen.items() if now - at < 4 * LOOK}
        return {number: Report(**json.loads(text)) for number, text in sorted(fresh.items())}


def _job_store() -> Store:
    """The job's store, over a connection of its own: the main thread may wait in another."""
    return dist.distributed_c10d._get_default_store().clone()


def _key(number: int) -> str:
    return f"watchdog/{number}"


def describe(step: int, seconds: float, reports: dict[int, Report], ranks: int) -> str:
    """One line: which ranks are behind, in which phase, and how many wait for them."""
    last = min(report.count for report in reports.values())
    behind = {number: report for number, report in reports.items() if report.count == last}
    silent = [number for number in range(ranks) if number not in reports]
    together = len(behind) == len(reports)
    parts = []
    if silent:
        parts.append(f"no sign of rank {_some(silent)}: stopped, or the machine or its network is gone")
    if together:
        phase = next(iter(behind.values())).phase
        parts.append(f"{len(behind)} of {ranks} ranks are in '{phase}'")
        if not silent and phase in ("compute", "update"):
            parts.append("so a collective or a device hangs (NCCL_DEBUG=INFO says more)")
    else:
        parts += [
            f"rank {number} ({report.host}) is in '{report.phase}' for {report.seconds:.0f} s"
            for number, report in list(behind.items())[:_SHOWN]
        ]
        if len(behind) > _SHOWN:
            parts.append(f"so are {len(behind) - _SHOWN} more")
        parts.append(f"{len(reports) - len(behind)} rank(s) wait")
    return f"step {step} has not ended for {seconds:.0f} s: {'; '.join(parts)}"


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (" and more" if len(numbers) > _SHOWN else "")
