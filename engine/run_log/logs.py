"""Run log: the progress line, log.jsonl, TensorBoard, and Weights & Biases on request."""

import errno
import logging
import math
import os
import secrets
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from millrace.engine.config import Config
from millrace.engine.distributed.process_group import rank
from millrace.engine.run_log.side_channels import RecordFile, SideChannels
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id"
"""File in the run's folder."""
VALIDATION = "validation.jsonl"
"""File in the run's folder: a record for each measurement of the held-out loss and each kind of weights."""


class RunLog:
    """Writes a run's records; does nothing on ranks other than 0.

    What cannot be written is a warning (`side_channels.py`): a log never ends the run that it is of.

    Args:
        output_dir: receives log.jsonl, validation.jsonl and `tensorboard/`.
        step: steps done before; later lines of existing records are dropped, they will be made again.
        shows_steps: whether people see the steps, as a progress bar or as lines.
    """

    def __init__(self, config: Config, output_dir: Path, step: int, shows_steps: bool = True) -> None:
        self._leads, self._shows_steps = rank() == 0, shows_steps
        self.channels = SideChannels(self.say if self._leads else log.warning)
        self._bar = self._board = self._wandb = None
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
        if config.logging.tensorboard:
            with self.channels.tolerate("TensorBoard"):
                self._board = _open_board(output_dir, step)
        if config.logging.wandb:
            self._wandb = self._open_wandb(config, output_dir, step)
        if shows_steps and sys.stderr.isatty():
            self._bar = tqdm(
                total=config.run.steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1
            )

    def _open_wandb(self, config: Config, output_dir: Path, step: int) -> Any:
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb needs Weights & Biases: pip install wandb") from None
        with self.channels.tolerate("Weights & Biases"):
            return wandb.init(
                project=config.logging.project,
                dir=str(output_dir),
                name=output_dir.name,
                config=config.model_dump(),
                id=_wandb_id(output_dir, step),
                resume="allow",
            )
        return None

    def records(self, records: list[dict[str, Any]]) -> None:
        """Write one record a step to the files and show the last one."""
        if not self._leads or not records:
            return
        with self.channels.tolerate("log.jsonl"):
            self._file.write(*(_plain(record) for record in records), sync=True)
        for record in records:
            tuning = {f"autoencoder/{name}": loss for name, loss in record.get("autoencoder", {}).items()}
            values = record | record.get("losses", {}) | tuning
            scalars = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            self._scalars(record["step"], scalars, record)
        if self._shows_steps:
            with suppress(OSError):  # a terminal that has gone away
                self._show(records[-1])

    def _scalars(self, step: int, scalars: dict[str, Any], whole: dict[str, Any]) -> None:
        """Values of a step for TensorBoard, and for Weights & Biases, which takes nested ones too."""
        if self._board is not None:
            with self.channels.tolerate("TensorBoard"):
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            with self.channels.tolerate("Weights & Biases"):
                self._wandb.log(whole, step=step)

    def _show(self, record: dict[str, Any]) -> None:
        step, shown = record["step"], _headline(record)
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        rate = (step - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self._steps - step) / rate if rate else math.inf
        _print(f"step {step}/{self._steps}  {shown}  {_clock(left)} left")

    def grid(self, path: Path, step: int) -> None:
        """Show a sample grid in TensorBoard and Weights & Biases."""
        if self._board is not None:
            import numpy as np
            from PIL import Image

            with self.channels.tolerate("TensorBoard"):
                picture = np.asarray(Image.open(path))
                self._board.add_image("samples", picture, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            with self.channels.tolerate("Weights & Biases"):
                self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether log.jsonl has the evaluation of a step; False on ranks other than 0."""
        return self._leads and any("evaluation" in record for record in self._file.of_step(step))

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Write what an evaluation found: a line {"step", "evaluation": values} of log.jsonl, and scalars."""
        if not self._leads:
            return
        with self.channels.tolerate("log.jsonl"):
            self._file.write({"step": step, "evaluation": _plain(values)}, sync=True)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        scalars = {f"evaluation/{name}": value for name, value in numbers.items()}
        self._scalars(step, scalars, scalars)

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
        name = "validation/loss" if record["weights"] == "model" else f"validation/{record['weights']}_loss"
        scalars = {name: record["loss"]}
        scalars |= {f"{name}_by_time/{t:.3f}": x for t, x in zip(times, record["by_time"], strict=True)}
        self._scalars(record["step"], scalars, scalars)

    def say(self, message: str) -> None:
        """Show a line to the user, above the progress bar if there is one."""
        if self._leads:
            _print(message)

    def close(self) -> None:
        """Flush and close everything, and say what has failed."""
        for channel, sink in (("TensorBoard", self._board), ("progress bar", self._bar)):
            if sink is not None:
                with self.channels.tolerate(channel):
                    sink.close()
        if self._wandb is not None:
            with self.channels.tolerate("Weights & Biases"):
                self._wandb.finish()
        if self._leads:
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


def _open_board(output_dir: Path, step: int) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1)


def _wandb_id(output_dir: Path, step: int) -> str:
    """The id under which Weights & Biases knows the run.

    It is kept in the run's folder: resuming and later stages go on with the same one, a run that begins gets
    another.
    """
    path = output_dir / WANDB_ID
    with suppress(OSError):
        if step and (found := path.read_text().strip()):
            return found
    new = secrets.token_hex(8)
    with suppress(OSError):  # the next start will be a run of its own
        write_atomically(path, new + "\n")
    return new


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
    parts = [f"loss {record['loss']:.4f}", f"norm {record['grad_norm']:.3f}"]
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
