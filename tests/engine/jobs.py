"""Training runs with instruments attached: imported by tests, or run as a script, several in a process.

python jobs.py JOBS RESULTS                    one process, each job in a fork of it that may be killed
deepspeed --num_gpus 2 jobs.py JOBS RESULTS    two, all jobs in both

Rank r writes RESULTS/<name>-<r>.pt.
"""

import contextlib
import hashlib
import importlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine import train as train_command
from millrace.engine.checkpoint.train_state import state_pieces
from millrace.engine.cli import run_command
from millrace.engine.config import Config
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed import process_group
from millrace.engine.distributed.zero_shards import masters
from millrace.engine.trainer import Trainer, train
from millrace.engine.util.errors import UserError


@dataclass
class Job:
    name: str
    config: dict[str, Any]
    resume: str | None = None
    spoiled_losses: tuple[int, ...] = ()
    """Steps (0-based) in which the last rank's first sample holds a NaN."""
    spoiled_gradients: tuple[int, ...] = ()
    """Steps in which the loss is finite and its gradient is not."""
    killed: tuple[str, float] | None = None
    """(name of an earlier job, share): kill -9 after this share of that job's events."""
    imports: tuple[str, ...] = ()
    """Modules that the process imports once, before it forks for its first job."""


@dataclass
class Command:
    """train.py with these arguments, in place of a job."""

    name: str
    arguments: list[str]
    imports: tuple[str, ...] = ()
    killed = None


@dataclass
class Result:
    """What one rank saw."""

    error: str | None = None
    """The UserError's message; of a command everything that it wrote to stderr."""
    code: int = 0
    """Exit code of a command."""
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
    """Of matrix products inside the optimizer's steps, counted where they run."""

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
        self.optimizer.step = self.counted_step
        super().train_step()
        self.result.unchanged[step] = self.fingerprint() == before

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


def _count_changes(result: Result, output: str) -> None:
    """Count changes to files below `output` as events too, just before they happen."""
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def audit(event: str, arguments: tuple) -> None:
        changing = event in changes or (event == "open" and arguments[1] not in ("r", "rb", None))
        if changing and str(arguments[0]).startswith(output):
            result.count_event()

    def fsync(descriptor: int, sync: Callable = os.fsync) -> None:
        result.count_event()
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)


def run_forked(job: Job, path: Path, last_event: float) -> None:
    """Run a job in a fork; only a job that should be killed may be."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(KeyboardInterrupt):
            result = Result(last_event=last_event)
            _count_changes(result, job.config["run"]["output_dir"])
            torch.save(vars(run(job, result)), path)
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != (0 if job.killed is None else -signal.SIGKILL):
        sys.exit(f"{job.name} ended with {os.waitstatus_to_exitcode(status)}")


def run_command_forked(command: Command, path: Path) -> None:
    """Run train.py in a fork, as the shell would."""
    log = path.with_suffix(".log")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = ["train.py", *command.arguments]
        try:
            run_command(train_command.main)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    _, status = os.waitpid(child, 0)
    result = Result(error=log.read_text(), code=os.waitstatus_to_exitcode(status))
    torch.save(vars(result), path)


def main() -> None:
    """Run the jobs of a file; the last argument but one names it, the last the folder for results."""
    file, folder = Path(sys.argv[-2]), Path(sys.argv[-1])
    jobs = torch.load(file, weights_only=False)
    if "RANK" in os.environ:
        for job in jobs:
            result = run(job)
            torch.save(vars(result), folder / f"{job.name}-{process_group.rank()}.pt")
            process_group.wait_for_all()
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 - once here and not in every fork

    for module in {module for job in jobs for module in job.imports}:
        importlib.import_module(module)
    for job in jobs:
        if isinstance(job, Command):
            run_command_forked(job, folder / f"{job.name}-0.pt")
            continue
        last_event = math.inf
        if job.killed is not None:
            whole, share = job.killed
            last_event = share * torch.load(folder / f"{whole}-0.pt", weights_only=False)["events"]
        run_forked(job, folder / f"{job.name}-0.pt", last_event)


if __name__ == "__main__":
    sys.modules["jobs"] = sys.modules["__main__"]
    run_command(main)
