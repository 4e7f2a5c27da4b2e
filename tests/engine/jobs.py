"""One instrumented training run: what may be done to it (`Job`), and what each rank saw (`Result`).

How a test starts one stands in conftest.py, at `Runs`.
"""

import hashlib
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine.checkpoint.train_state import state_pieces
from millrace.engine.config import Config
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed import process_group
from millrace.engine.distributed.zero_shards import masters
from millrace.engine.trainer import Trainer, train
from millrace.engine.util.errors import UserError


@dataclass
class Job:
    """One training run of a test."""

    name: str
    config: dict[str, Any]
    resume: str | None = None
    spoiled_losses: tuple[int, ...] = ()
    """Steps (0-based) in which the last rank's first sample holds a NaN."""
    spoiled_gradients: tuple[int, ...] = ()
    """Steps in which the loss is finite and its gradient is not."""
    poisoned: tuple[str, int, int] | None = None
    """(kind of state, steps done, rank): there one element becomes NaN, or negative in a second moment."""
    killed: tuple[str, float] | None = None
    """(name of an earlier job, share): kill -9 after this share of that job's events."""


@dataclass
class Result:
    """What one rank saw."""

    error: str | None = None
    """The UserError's message."""
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)
    """Of parameters, masters, moments and EMA after the run."""
    reduced: set[torch.dtype] = field(default_factory=set)
    """Element types that DeepSpeed summed over ranks."""
    unchanged: dict[int, bool] = field(default_factory=dict)
    """For each step (0-based): whether all weights, moments and averages kept every bit."""
    spoiled: list[str] = field(default_factory=list)
    """Keys of the samples that were spoiled."""
    skipped: int = 0
    events: int = 0
    """Micro-batches and changes to files below the run's folder."""
    last_event: float = math.inf
    """The process is killed at the event of this number."""
    largest_bucket: int = 0
    """Most elements of one reduction."""
    optimizer_flops: int = 0
    """Of matrix products inside the optimizer's first step, counted where they run."""

    def count_event(self) -> None:
        self.events += 1
        if self.events >= self.last_event:
            os.kill(os.getpid(), signal.SIGKILL)


class _InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient overflowed."""

    @staticmethod
    def forward(_context, losses):
        return losses.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient * float("inf")


class InstrumentedTrainer(Trainer):
    """A Trainer whose batches can be spoiled and whose state is hashed around each step."""

    def __init__(self, job: Job, result: Result, resume: str | None = None) -> None:
        self.job, self.result = job, result
        super().__init__(parse_config(job.config, job.name), resume)

    def _check_size(self, factor):
        """Without the traced memory, a third of the time of a tiny run; test_fit_check.py has it."""
        return []

    def next_batch(self):
        self.result.count_event()
        batch = super().next_batch()
        if self.step in self.job.spoiled_losses and process_group.rank() == process_group.world_size() - 1:
            batch.clean[0, 0] = float("nan")
            self.result.spoiled.append(batch.keys[0])
        return batch

    def sample_losses(self, batch):
        terms, t = super().sample_losses(batch)
        if self.step in self.job.spoiled_gradients:
            terms["flow"] = _InfiniteGradient.apply(terms["flow"])
        return terms, t

    def train_step(self):
        step, before = self.step, self.fingerprint()
        if step == 0:
            self.optimizer.step = self.counted_step
        taken = super().train_step()
        vars(self.optimizer).pop("step", None)  # the class's own from now on
        self.result.unchanged[step] = self.fingerprint() == before
        if self.job.poisoned:
            self.poison(*self.job.poisoned)
        return taken

    @torch.no_grad()
    def poison(self, kind: str, step: int, rank: int) -> None:
        if (step, rank) != (self.step, process_group.rank()):
            return
        shard = next(shard for shard in self.shards if shard.count and shard.name.endswith(".weight"))
        held = {"master": shard.master, "ema": self.ema.of(shard.master)}
        tensor = held[kind] if kind in held else self.optimizer.state[shard.master][kind]
        shard.of(tensor)[0] = -1.0 if kind == "exp_avg_sq" else math.nan

    def counted_step(self):
        with FlopCounterMode(display=False) as counter:
            type(self.optimizer).step(self.optimizer)
        self.result.optimizer_flops += counter.get_total_flops()

    def fingerprint(self) -> str:
        pieces = [piece.data for piece in state_pieces(self.shards, self.optimizer, self.ema)]
        parameters = [] if self.zero_stage == 3 else [p.detach() for p in self.denoiser.parameters()]
        digest = hashlib.sha256()
        for tensor in (*pieces, *parameters):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def dtypes(self) -> dict[str, set[torch.dtype]]:
        flats = masters(self.shards)
        moments = [
            value for flat in flats for value in self.optimizer.state[flat].values() if value.dim() > 0
        ]
        names = self.ema.names if self.ema is not None else ()
        averages = [self.ema.of(flat, name) for flat in flats for name in names]
        kinds = {
            "parameters": self.denoiser.parameters(),
            "masters": flats,
            "moments": moments,
            "ema": averages,
        }
        return {name: {tensor.dtype for tensor in tensors} for name, tensors in kinds.items()}


def run(job: Job, result: Result | None = None) -> Result:
    """Train one job to its end; a UserError is part of the result."""
    result = result or Result()
    with _watch_reductions(result):
        try:
            latest: list[InstrumentedTrainer] = []

            def make(_config: Config, resume: str | None) -> InstrumentedTrainer:
                latest[:] = [InstrumentedTrainer(job, result, resume)]
                return latest[0]

            try:
                train(parse_config(job.config, job.name), job.resume, make)
            finally:
                for trainer in latest:
                    result.dtypes, result.skipped = trainer.dtypes(), trainer.skipped
        except UserError as error:
            result.error = str(error)
    return result


class _watch_reductions:
    """Notes what goes through DeepSpeed's reductions while it is active."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")

    def __init__(self, result: Result) -> None:
        self.result = result

    def __enter__(self) -> None:
        from deepspeed.comm.torch import TorchBackend

        self.backend, self.original = TorchBackend, {name: getattr(TorchBackend, name) for name in self.NAMES}
        for name, method in self.original.items():
            setattr(TorchBackend, name, self._noting(method))

    def _noting(self, method):
        def noting(backend, *args, **kwargs):
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 1:
                    self.result.reduced.add(tensor.dtype)
                    self.result.largest_bucket = max(self.result.largest_bucket, tensor.numel())
            return method(backend, *args, **kwargs)

        return noting

    def __exit__(self, *_exception) -> None:
        for name, method in self.original.items():
            setattr(self.backend, name, method)


def run_all(jobs: list[Job]) -> list[Result]:
    """Train jobs one after the other, in a process that serves for nothing else."""
    return [run(job) for job in jobs]


def run_counted(jobs: list[Job], last_event: float = math.inf) -> list[Result]:
    """As `run_all`, with changes to files counted as events too; the process is killed at the last one."""
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    output, result = "", Result()

    def audit(event: str, arguments: tuple) -> None:
        changing = event in changes or (event == "open" and arguments[1] not in ("r", "rb", None))
        if changing and str(arguments[0]).startswith(output):
            result.count_event()

    def fsync(descriptor: int, sync: Callable = os.fsync) -> None:
        result.count_event()
        sync(descriptor)

    os.fsync = fsync
    results = []
    for job in jobs:
        output, result = job.config["run"]["output_dir"], Result(last_event=last_event)
        if not results:
            sys.addaudithook(audit)
        results.append(run(job, result))
    return results
