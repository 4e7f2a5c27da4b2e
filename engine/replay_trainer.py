"""Replay of a logged step: the Trainer, from a checkpoint before the step, in a folder of its own.

Every draw of a step is a function of (seed, step, sample), so the step follows from the weights before it.
The Trainer runs up to the step, then makes it without its update. Afterwards each sample goes through the
same weights alone, for the norm of its own gradient.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import pinned_checkpoint
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config, read_json
from millrace.engine.distributed import process_group
from millrace.engine.distributed.signals import StopRequests
from millrace.engine.distributed.watchdog import Watchdog
from millrace.engine.encoders.batch_encoder import EncodedBatch
from millrace.engine.encoders.teacher import TeacherFeatures
from millrace.engine.model.layout import LayoutCache
from millrace.engine.run_log.sample_log import keys_of_steps
from millrace.engine.run_log.side_channels import steps_of
from millrace.engine.trainer import Seen, Trainer, train
from millrace.engine.util.errors import UserError

_QUIET = {
    "logging": {"tensorboard": False, "wandb": False, "mlflow": None, "sample_keys": False},
    "sampling": {"every_steps": 0},
    "evaluation": {"every_steps": 0},
    "validation": {"every_steps": 0},
}
"""What a replay leaves out of a run; none of it is part of a step."""


class Start(NamedTuple):
    """Where a replay begins."""

    config: Config
    """With which the step was trained."""
    folder: Path | None
    """The checkpoint, or None for the weights that the run began with."""
    step: int
    """Steps done there."""


class Replayed(NamedTuple):
    """A step made again."""

    run: str
    step: int
    began: str
    """For people: the checkpoint, and the steps made in between."""
    record: dict[str, Any]
    """As log.jsonl has it."""
    logged: dict[str, Any]
    """What log.jsonl has."""
    same_keys: bool | None
    """Whether the samples are those of the run's sample log; None without one."""
    samples: list[dict[str, Any]]
    """By index: index, key, which (caption), t, loss and losses; loss_alone, norm_alone of it by itself."""
    remarks: list[str]


def replay(run: Path, step: int, most: int) -> Replayed:
    """Make a step of a run again; nothing of the run's folder changes, but for a pin. Collective.

    Args:
        most: steps that may be made in between.

    Raises UserError where no checkpoint is near enough, and for another number of processes than the run's.
    """
    with ExitStack() as stack:

        def begin() -> tuple[Start, dict[str, Any], str]:
            logged = _logged(run, step)
            start = _find_start(run, step, most, min(logged), max(logged))
            if start.folder is not None:
                stack.enter_context(pinned_checkpoint(start.folder))
            return (
                start,
                logged[step],
                stack.enter_context(tempfile.TemporaryDirectory(prefix="millrace-replay-")),
            )

        start, logged, scratch = process_group.lead(begin)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)  # on every machine
        stack.callback(process_group.wait_for_all)
        latest: list[ReplayTrainer] = []

        def make(config: Config, resume: str | None) -> ReplayTrainer:
            latest[:] = [ReplayTrainer(config, resume, step)]
            return latest[0]

        folder = None if start.folder is None else str(start.folder)
        train(_in_folder(start.config, scratch), folder, make)
        (trainer,) = latest
        keys = keys_of_steps(run).get(step) if process_group.rank() == 0 else None
        between = step - 1 - start.step
        where = start.folder.name if start.folder is not None else "the weights that the run began with"
        return Replayed(
            run=str(run),
            step=step,
            began=f"from {where}, {between or 'no'} steps between",
            record=trainer.record,
            logged=logged,
            same_keys=None if keys is None else keys == [sample["key"] for sample in trainer.samples],
            samples=trainer.samples,
            remarks=trainer.remarks,
        )


def _logged(run: Path, step: int) -> dict[int, dict[str, Any]]:
    """The records of log.jsonl by step. Raises UserError if the step has none."""
    try:
        records = {record["step"]: record for record in steps_of(run / "log.jsonl")}
    except OSError as error:
        raise UserError(f"{run}: log.jsonl cannot be read: {error.strerror}") from None
    if step not in records:
        known = f"steps {min(records)} to {max(records)}" if records else "no steps"
        raise UserError(f"{run}: step {step} is not in log.jsonl, which has {known}")
    return records


def _find_start(run: Path, step: int, most: int, first: int, last: int) -> Start:
    """The nearest place before a step to begin at, of a run that has logged steps `first` to `last`. Raises
    UserError if there is none near enough."""
    saved = dict(list_checkpoints(run / "checkpoints"))
    # A run whose log begins at step 1 began with the weights of its seed, or of run.init_from.
    begins = sorted([*saved, *([0] if first == 1 and 0 not in saved else [])])
    start = max((begin for begin in begins if step - 1 - most <= begin < step), default=None)
    if start is None:
        spans = [(begin + 1, min(begin + 1 + most, last)) for begin in begins if begin < last]
        known = ", ".join(f"{low} to {high}" for low, high in spans) or "none"
        raise UserError(
            f"{run}: step {step} has no checkpoint at most {most} steps before it (--most); steps that can "
            f"be replayed: {known}"
        )
    # The step was trained by what wrote the next checkpoint; of a run that has none, by its last start.
    later = min((other for other in saved if other >= step), default=None)
    known = later if later is not None else start if start in saved else None
    reader = None if known is None else CheckpointReader(saved[known], verify=False)
    values = reader.meta["config"] if later is not None else read_json(run / "config.json")
    ranks = process_group.world_size()
    if reader is not None and reader.world_size != ranks:
        raise UserError(
            f"{run}: step {step} was trained by {reader.world_size} processes, this is {ranks}; start it as "
            f"torchrun --nproc-per-node {reader.world_size} -m millrace.engine.replay {run} --step {step}"
        )
    return Start(parse_config(values, str(run)), saved.get(start), start)


def _in_folder(config: Config, folder: str) -> Config:
    """The configuration for a replay in `folder`."""
    values = merge(config.model_dump(mode="json"), {"run": {"output_dir": folder}, **_QUIET})
    values["stages"] = [
        part | {name: merge(part[name], quiet) for name, quiet in _QUIET.items() if name in part}
        for part in values["stages"]
    ]
    return parse_config(values, "replay")


class ReplayTrainer(Trainer):
    """A Trainer that runs up to a step, and makes it without its update.

    Args:
        config, resume: as of a Trainer.
        target: the step.
    """

    def __init__(self, config: Config, resume: str | None, target: int) -> None:
        self.target = target
        self.record: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        """Of the step, over all ranks, by index."""
        self.remarks: list[str] = []
        self._parts: list[tuple[EncodedBatch, dict[str, Tensor], Tensor]] = []
        super().__init__(config, resume)

    def _open_logs(self, messages: list[str]) -> None:
        """Without the line that the folder is another one."""
        super()._open_logs([line for line in messages if "changed since the checkpoint" not in line])

    def _describe(self, frozen_lines: list[str]) -> list[str]:
        """The run has said it."""
        return []

    def _report_bad(self, seen: list[Seen]) -> None:
        """A step that is skipped may be the one to look at."""

    def train(self, requests: StopRequests | None = None, watchdog: Watchdog | None = None) -> bool:
        """To the end of the stage, or through the step; returns whether it lies in a later stage."""
        self.stop_requests = requests = requests or self.stop_requests
        self.watchdog = watchdog or self.watchdog
        try:
            while self.step < min(self.stage.last, self.target):
                if self.step + 1 == self.target:
                    self.optimizer.step = _no_update
                if not self.train_step() or (stop := requests.poll().stop):
                    raise UserError(f"stopped at step {self.step} of {self.target} ({stop or 'no data'})")
            if self.step < self.target:
                self.save(final=True)  # what the next stage begins with
                return True
            self._flush()
            self._look_at_samples()
            return False
        finally:
            self.saves.close(self.run_log.say)
            self.sample_log.close()
            self.stream.close()
            self.run_log.close()

    def sample_losses(self, batch: EncodedBatch) -> tuple[dict[str, Tensor], Tensor]:
        """As of a Trainer; those of the step are kept."""
        terms, t = super().sample_losses(batch)
        if self.step + 1 == self.target:
            self._parts.append((batch, {name: term.detach() for name, term in terms.items()}, t))
        return terms, t

    def _flush(self) -> None:
        if self.records and self.records[-1]["step"] == self.target:
            self.record = self.records[-1]
        super()._flush()

    def _look_at_samples(self) -> None:
        """Losses of the step's samples in it, and alone. Collective."""
        found: list[dict[str, Any]] = []
        if self.zero_stage == 3:
            self.remarks.append("norms of single samples need whole weights: not at ZeRO stage 3")
        elif self.flow.config.contrastive_weight:
            self.remarks.append("alone a sample has nobody to be contrasted with: norms without that term")
            alone = self.flow.config.model_copy(update={"contrastive_weight": 0.0})
            self.flow.config = self.loss_fn.flow.config = alone
        for batch, terms, t in self._parts:
            columns = {name: term.tolist() for name, term in terms.items()}
            totals, times, indices = sum(terms.values()).tolist(), t.tolist(), batch.sample_index.tolist()
            for i, key in enumerate(batch.keys):
                loss, norm = (None, None) if self.zero_stage == 3 else self._alone(batch, i)
                found.append(
                    {
                        "index": indices[i],
                        "key": key,
                        "which": batch.which[i],
                        "t": times[i],
                        "loss": _finite(totals[i]),
                        "losses": {name: _finite(column[i]) for name, column in columns.items()},
                        "loss_alone": loss,
                        "norm_alone": norm,
                    }
                )
        self._parts = []
        whole = [sample for part in process_group.gather_objects(found) for sample in part]
        self.samples = sorted(whole, key=lambda sample: sample["index"])

    def _alone(self, batch: EncodedBatch, i: int) -> tuple[float | None, float | None]:
        """Loss and gradient norm of one sample of a micro-batch, as a micro-batch of its own."""
        with self._without_deepspeed():
            terms, _ = super().sample_losses(single(batch, i, self.denoiser.layouts))
        loss = sum(terms.values()).sum()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if self.working_weights is not None:  # by which linear layers multiply
            weights += self.working_weights.copies
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        norms = [g.float().norm() for g in gradients if g is not None]
        return _finite(loss.item()), _finite(torch.stack(norms).norm().item())

    @contextmanager
    def _without_deepspeed(self) -> Iterator[None]:
        """In this block the forward pass is the model's own: no reduction follows it."""
        engine, compute = self.engine, getattr(torch, self.config.precision.compute)
        self.engine = self.model
        try:
            with torch.autocast(self.device.type, compute, enabled=compute != torch.float32):
                yield
        finally:
            self.engine = engine


def _no_update(*_: object) -> None:
    """In place of an optimizer's `step`."""


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def single(batch: EncodedBatch, i: int, layouts: LayoutCache) -> EncodedBatch:
    """Sample `i` of a packed micro-batch as a micro-batch of its own."""
    layout = batch.layout
    start = sum(layout.lengths[:i])
    tokens = slice(start, start + layout.lengths[i])
    text_start, text_end = layout.cu_seqlens_text[i : i + 2].tolist()
    text = batch.text[text_start:text_end]
    starts = torch.tensor([0, len(text)], dtype=torch.int32, device=layout.cu_seqlens_text.device)
    teacher = None
    if batch.teacher is not None:
        attention = [(queries[tokens], keys[tokens]) for queries, keys in batch.teacher.attention]
        teacher = TeacherFeatures(batch.teacher.tokens[tokens], attention, None)
    return EncodedBatch(
        clean=batch.clean[tokens],
        text=text,
        layout=layouts.layout([layout.grids[i]], starts, len(text)),
        sample_index=batch.sample_index[i : i + 1],
        unconditional=batch.unconditional[i : i + 1],
        keys=batch.keys[i : i + 1],
        which=batch.which[i : i + 1],
        images=batch.images[i : i + 1],
        teacher=teacher,
    )
