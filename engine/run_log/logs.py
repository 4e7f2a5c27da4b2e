"""Run log: the progress line, log.jsonl, validation.jsonl, and the sinks that people look at."""

import errno
import logging
import math
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from millrace.engine.config import Config
from millrace.engine.distributed.process_group import rank
from millrace.engine.run_log.scalars import (
    evaluation_scalars,
    memory_scalars,
    step_scalars,
    validation_scalars,
)
from millrace.engine.run_log.side_channels import RecordFile, SideChannels
from millrace.engine.run_log.sinks import Opening, Sinks
from millrace.engine.util.errors import UserError
from millrace.engine.util.progress_bar import bar_size

log = logging.getLogger(__name__)

VALIDATION = "validation.jsonl"
"""File in the run's folder: a record for each measurement of the held-out loss and each kind of weights."""


class RunLog:
    """Writes a run's records; does nothing on ranks other than 0.

    What cannot be written is a warning (`side_channels.py`): a log never ends the run that it is of.

    Args:
        output_dir: receives log.jsonl, validation.jsonl and `tensorboard/`.
        step: steps done before; later lines of existing records are dropped, they will be made again.
        shows_steps: whether people see the steps, as a progress bar or as lines.

    Raises UserError for a sink (`sinks.py`) whose package is not installed.
    """

    def __init__(self, config: Config, output_dir: Path, step: int, shows_steps: bool = True) -> None:
        self._leads, self._shows_steps = rank() == 0, shows_steps
        self.channels = SideChannels(self.say if self._leads else log.warning)
        self._bar, self._loss = None, ""
        if not self._leads:
            return
        self._started, self._first, self._steps = time.monotonic(), step, config.run.steps
        self._file = RecordFile(output_dir / "log.jsonl", step)
        with self.channels.tolerate("log.jsonl"):
            self._file.write()
        self._held_out = RecordFile(output_dir / VALIDATION, step)
        if config.validation.every_steps or (output_dir / VALIDATION).exists():
            with self.channels.tolerate(VALIDATION):
                self._held_out.write()
        self._sinks = Sinks(Opening(config, output_dir, step), self.channels)
        if shows_steps and sys.stderr.isatty():
            self._bar = tqdm(total=config.run.steps, initial=step, unit="step", smoothing=0.1, **bar_size())

    def records(self, records: list[dict[str, Any]]) -> None:
        """Write one record a step to the files and show the last one."""
        if not self._leads or not records:
            return
        with self.channels.tolerate("log.jsonl"):
            self._file.write(*(_plain(record) for record in records), sync=True)
        rows = [(record["step"], step_scalars(record)) for record in records]
        rows[-1][1].update(memory_scalars())
        self._sinks.scalars(rows)
        self._loss = f"loss {records[-1]['loss']:.4f}"
        if self._bar is not None:
            self.advance(records[-1])
            with suppress(OSError):
                self._bar.refresh()  # with the new loss, also where the step is shown already
        elif self._shows_steps:
            self._print_step(records[-1])

    def advance(self, record: dict[str, Any]) -> None:
        """Move the progress bar to a step, of which the host need not know the loss: the last known one
        stands there. Elsewhere than on a terminal `records` writes lines."""
        if self._bar is not None:
            with suppress(OSError):  # a terminal that has gone away
                self._bar.set_postfix_str(f"{self._loss}  {_headline(record)}".strip(), refresh=False)
                self._bar.update(record["step"] - self._bar.n)

    def _print_step(self, record: dict[str, Any]) -> None:
        step = record["step"]
        rate = (step - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self._steps - step) / rate if rate else math.inf
        _print(f"step {step}/{self._steps}  {self._loss}  {_headline(record)}  {_clock(left)} left")

    def grid(self, path: Path, step: int) -> None:
        """Show a sample grid in all sinks."""
        if self._leads:
            self._sinks.picture("samples", path, step)

    def has_evaluation(self, step: int) -> bool:
        """Whether log.jsonl has the evaluation of a step; False on ranks other than 0."""
        return self._leads and any("evaluation" in record for record in self._file.of_step(step))

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Write what an evaluation found: a line {"step", "evaluation": values} of log.jsonl, and scalars."""
        if not self._leads:
            return
        with self.channels.tolerate("log.jsonl"):
            self._file.write({"step": step, "evaluation": _plain(values)}, sync=True)
        self._sinks.scalars([(step, evaluation_scalars(values))])

    def has_validation(self, step: int, weights: list[str]) -> bool:
        """Whether validation.jsonl has the losses of these weights after a step; False on ranks other than
        0."""
        return self._leads and {x.get("weights") for x in self._held_out.of_step(step)} >= set(weights)

    def validation(self, record: dict[str, Any], times: tuple[float, ...]) -> None:
        """Write the held-out loss of some weights: a line of validation.jsonl, and scalars."""
        if not self._leads:
            return
        with self.channels.tolerate(VALIDATION):
            self._held_out.write(_plain(record), sync=True)
        self._sinks.scalars([(record["step"], validation_scalars(record, times))])

    def say(self, message: str) -> None:
        """Show a line to the user, above the progress bar if there is one."""
        if self._leads:
            _print(message)

    def close(self) -> None:
        """Flush and close everything, and say what has failed."""
        if self._bar is not None:
            with self.channels.tolerate("progress bar"):
                self._bar.close()
        if self._leads:
            self._sinks.close()
            with self.channels.tolerate("log.jsonl"):
                self._file.write(sync=True)
            self._file.close()
            self._held_out.close()
        for line in self.channels.summary():
            self.say(line)


def _print(line: str) -> None:
    """Above a progress bar if there is one; not on a terminal that has gone away."""
    with suppress(OSError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def make_output(path: Path) -> None:
    """Make a run's folder. Raises UserError where nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; choose another run.output_dir"
        ) from None


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _headline(record: dict[str, Any]) -> str:
    parts = [f"norm {record['grad_norm']:.3f}"]
    parts += [f"{record['step_seconds'] * 1e3:.0f} ms", f"{record['images_per_second']:.1f} img/s"]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def set_up_logging() -> None:
    """Warnings of our modules to stderr, one line each; on rank 0 also information."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("millrace").setLevel(level)
    # DeepSpeed 0.19 calls a collective under its old name, once a step on every rank.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
