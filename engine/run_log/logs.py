"""Run log: the progress line, log.jsonl, TensorBoard, and Weights & Biases on request."""

import errno
import json
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from millrace.engine.config import Config
from millrace.engine.distributed.process_group import rank
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically


class RunLog:
    """Writes a run's records; does nothing on ranks other than 0.

    Args:
        output_dir: receives log.jsonl and `tensorboard/`.
        step: steps done before; later lines of an existing log.jsonl are dropped, they will be made again.
    """

    def __init__(self, config: Config, output_dir: Path, step: int) -> None:
        self._leads = rank() == 0
        if not self._leads:
            return
        self._started, self._first, self._steps = time.monotonic(), step, config.run.steps
        self._file = open_until(output_dir / "log.jsonl", step)
        self._board = self._open_board(config, output_dir, step)
        self._wandb = self._open_wandb(config, output_dir)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=config.run.steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1
            )

    @staticmethod
    def _open_board(config: Config, output_dir: Path, step: int) -> Any:
        if not config.logging.tensorboard:
            return None
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1)

    @staticmethod
    def _open_wandb(config: Config, output_dir: Path) -> Any:
        if not config.logging.wandb:
            return None
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb needs Weights & Biases: pip install wandb") from None
        return wandb.init(
            project=config.logging.project,
            dir=str(output_dir),
            name=output_dir.name,
            config=config.model_dump(),
        )

    def records(self, records: list[dict[str, Any]]) -> None:
        """Write one record a step to the files and show the last one."""
        if not self._leads or not records:
            return
        for record in records:
            self._file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
            tuning = {f"autoencoder/{name}": loss for name, loss in record.get("autoencoder", {}).items()}
            for key, value in (record | record.get("losses", {}) | tuning).items():
                if self._board is not None and isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(key, value, record["step"])
            if self._wandb is not None:
                self._wandb.log(record, step=record["step"])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._show(records[-1])

    def _show(self, record: dict[str, Any]) -> None:
        step, shown = record["step"], _headline(record)
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        rate = (step - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self._steps - step) / rate if rate else math.inf
        print(f"step {step}/{self._steps}  {shown}  {_clock(left)} left", file=sys.stderr, flush=True)

    def grid(self, path: Path, step: int) -> None:
        """Show a sample grid in TensorBoard and Weights & Biases."""
        if not self._leads:
            return
        if self._board is not None:
            import numpy as np
            from PIL import Image

            self._board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Write what an evaluation found: a line {"step", "evaluation": values} of log.jsonl, and scalars."""
        if not self._leads:
            return
        self._file.write(json.dumps({"step": step, "evaluation": _plain(values)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        scalars = {f"evaluation/{name}": value for name, value in values.items()}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def say(self, message: str) -> None:
        """Show a line to the user, above the progress bar if there is one."""
        if self._leads:
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if not self._leads:
            return
        self._file.close()
        for sink in (self._board, self._bar):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


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


def open_until(path: Path, step: int) -> Any:
    """A file of records for appending, without those after `step` and a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))
    return path.open("a")


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
