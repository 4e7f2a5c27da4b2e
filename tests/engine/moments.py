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
from millrace.engine.checkpoint import checkpoints
from millrace.engine.checkpoint.background_saves import BackgroundSaves, HostCopy
from millrace.engine.checkpoint.manifest import ShardIndex
from millrace.engine.cli import run_command
from millrace.engine.config.loading import parse_config
from millrace.engine.data import SampleStream
from millrace.engine.distributed import process_group, signals, watchdog
from millrace.engine.evaluation.run_samples import RunSamples
from millrace.engine.optim.optimizer_step import OptimizerStep
from millrace.engine.trainer import Trainer, train
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import HashingFile
from tests.engine.jobs import Job, run

MOMENTS = {
    "it is built": (Trainer, "_build_model", 1),
    "it waits for a batch": (Trainer, "next_batch", 9),
    "it computes": (Trainer, "sample_losses", 9),
    "gradients are applied": (OptimizerStep, "apply", 3),
    "it draws samples": (RunSamples, "make", 1),
    "it saves": (BackgroundSaves, "begin", 1),
    "a stage ends": (BackgroundSaves, "begin", 2),
    "the next stage is built": (Trainer, "_build_model", 2),
    "the last step": (OptimizerStep, "apply", 9),
}
"""Where SIGTERM comes: at the n-th call of a function. Steps have 4 micro-batches on one rank, 2 on two."""


def run_until(words: list[str], moment: str, asked: int, stuck: int) -> None:
    """`millrace train` with SIGTERM at `moment` on rank `asked`.

    At the moment "no data comes" rank `stuck` reads from a pipe that stays empty, from step 4 on.
    """
    rank, ranks = process_rank(), int(os.environ.get("WORLD_SIZE", 1))
    signals.DATA_SECONDS, watchdog.LOOK = 1.0, 0.2
    if moment == "no data comes":
        _empty_pipe(SampleStream, 8 * 3, rank == stuck, rank == asked)
    elif rank == asked:
        owner, name, number = MOMENTS[moment]
        if name in ("next_batch", "sample_losses"):
            number = (number - 1) // ranks + 1
        _at_call(owner, name, number, _sigterm)
    run_command(lambda: command.main(words))


PHASES = {
    "the state is copied": (BackgroundSaves, "begin", 2),
    "the thread begins": (HostCopy, "wait", 2),
    "a folder is made": (checkpoints, "_new_staging", 2),
    "ranks agree on the folder": (process_group, "gather_apart", 4),
    "a shard is begun": (checkpoints, "write_shard", 2),
    "a shard is half written": (HashingFile, "write", 90),
    "the index is written": (ShardIndex, "to_json", 2),
    "ranks agree that all is written": (process_group, "gather_apart", 5),
    "it is sealed": (checkpoints, "_seal", 2),
    "the manifest is written": (checkpoints, "write_manifest", 2),
    "its name is synced": (checkpoints, "sync_folder", 2),
    "old ones are pruned": (checkpoints, "_prune", 2),
    "ranks agree that it is published": (process_group, "gather_apart", 6),
    "training takes note": (BackgroundSaves, "finish", 2),
}
"""Phases of the second background save, by the call that begins each."""
OF_THE_FIRST = {
    "a folder is made", "it is sealed", "the manifest is written", "its name is synced", "old ones are pruned"
}  # fmt: skip
"""Phases that the first rank alone goes through."""


def die_in(job: Job, phase: str, dying: int) -> None:
    """Train until rank `dying` comes to a phase of its second save, and is killed with -9 there."""
    if process_rank() == dying:
        _at_call(*(MOMENTS | PHASES)[phase], lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(job)


def watch_resources(job: Job, every: int) -> list[tuple[int, int, int]]:
    """Train; after every so many steps resident KiB, open files and threads of this process."""
    seen, take_step = [], Trainer.train_step

    def watched(trainer: Trainer) -> bool:
        taken = take_step(trainer)
        if trainer.step % every == 0:
            status = Path("/proc/self/status").read_text()
            resident = int(status.partition("VmRSS:")[2].split()[0])
            seen.append((resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        return taken

    Trainer.train_step = watched
    train(parse_config(job.config, job.name))
    return seen


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


def process_rank() -> int:
    """Of this process, before it has joined its job."""
    return int(os.environ.get("RANK", 0))


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
