"""A training run that receives SIGTERM at a chosen moment on one of its ranks, or waits for a slow one.

How a test starts one stands in test_clusters.py.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from millrace.engine import train as command
from millrace.engine import trainer as module
from millrace.engine.cli import run_command
from millrace.engine.data import SampleStream
from millrace.engine.distributed import process_group, signals, watchdog
from millrace.engine.evaluation.run_samples import RunSamples
from millrace.engine.optim.optimizer_step import OptimizerStep
from millrace.engine.trainer import Trainer
from millrace.engine.util.errors import UserError

MOMENTS = {
    "it is built": (Trainer, "_build_model", 1),
    "it waits for a batch": (Trainer, "next_batch", 9),
    "it computes": (Trainer, "sample_losses", 9),
    "gradients are applied": (OptimizerStep, "apply", 3),
    "it draws samples": (RunSamples, "make", 1),
    "it saves": (module, "save_checkpoint", 1),
    "a stage ends": (module, "save_checkpoint", 2),
    "the next stage is built": (Trainer, "_build_model", 2),
    "the last step": (OptimizerStep, "apply", 9),
}
"""Where SIGTERM comes: at the n-th call of a function. Steps have 4 micro-batches on one rank, 2 on two."""


def run_until(words: list[str], moment: str, asked: int, stuck: int) -> None:
    """`millrace train` with SIGTERM at `moment` on rank `asked`.

    At the moment "no data comes" rank `stuck` reads from a pipe that stays empty, from step 4 on.
    """
    rank, ranks = (int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("WORLD_SIZE", 1)))
    signals.DATA_SECONDS, watchdog.LOOK = 1.0, 0.2
    if moment == "no data comes":
        _empty_pipe(SampleStream, 8 * 3, rank == stuck, rank == asked)
    elif rank == asked:
        owner, name, number = MOMENTS[moment]
        if name in ("next_batch", "sample_losses"):
            number = (number - 1) // ranks + 1
        _at_call(owner, name, number, _sigterm)
    run_command(lambda: command.main(words))


def polls(folder: Path, asked: int, at: int, count: int) -> tuple[list[str | None], int, int]:
    """What `count` polls in a row say when rank `asked` is asked before number `at`; the all-reduces of all
    polls, and the gathers of objects."""
    process_group.initialize(torch.device("cpu"))
    reductions, gathers = [], []
    _at_call(signals.dist, "all_reduce", 0, lambda: None, reductions)
    _at_call(signals, "gather_objects", 0, lambda: None, gathers)
    found = []
    with signals.StopRequests(folder) as requests:
        for number in range(count):
            if number == at and process_group.rank() == asked:
                _sigterm()
            found.append(requests.poll().stop)
        found.append(requests.poll(now=True).stop)
    return found, len(reductions), len(gathers)


def fetch(folder: Path, failing: int | None) -> str:
    """Fetch a file under `leaders_first`; says who did, or how it failed."""
    process_group.initialize(torch.device("cpu"))
    number = process_group.rank()

    def action() -> str:
        if number == failing:
            raise UserError("the hub does not answer")
        found = "cache" if (folder / "file").exists() else "hub"
        time.sleep(0.2)  # in which ranks that do not wait would look too
        (folder / "file").touch()
        return found

    try:
        return process_group.leaders_first(action)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def run_slowly(words: list[str], slow: int, seconds: float) -> None:
    """`millrace train` whose rank `slow` waits `seconds` for the data of step 4."""
    watchdog.LOOK, watchdog.QUIET, watchdog.LIMIT = 0.1, 0.4, 0.8
    if int(os.environ["RANK"]) == slow:
        _at_call(Trainer, "next_batch", 3 * 2 + 1, lambda: time.sleep(seconds))
    run_command(lambda: command.main(words))


def _sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _at_call(
    owner: object, name: str, number: int, action: Callable[[], None], calls: list | None = None
) -> None:
    """Do `action` before the call of this number; `calls` grows with each."""
    original, calls = getattr(owner, name), [] if calls is None else calls

    def called(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, called)


def _empty_pipe(owner: type, first: int, stuck: bool, asked: bool) -> None:
    """From sample `first` on a stuck rank's loader waits for a pipe, and SIGTERM comes to the one asked."""
    original, (pipe, _) = owner._start, os.pipe()

    def start(stream: SampleStream, i: int, *rest: object) -> object:
        if i >= first:
            if asked:
                _sigterm()
            if stuck:
                os.read(pipe, 1)
        return original(stream, i, *rest)

    owner._start = start
