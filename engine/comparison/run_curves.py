"""Curves of a run: held-out loss, metrics, training loss and speed by samples seen, read from its folder."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace.engine.config import Config
from millrace.engine.config.evaluation import TITLES
from millrace.engine.config.stages import resolve_stages
from millrace.engine.config.stored import stored_config
from millrace.engine.run_log.logs import VALIDATION
from millrace.engine.run_log.side_channels import steps_of
from millrace.engine.util.errors import UserError

HELD_OUT = {"ema": "held-out loss, EMA", "model": "held-out loss, model"}
"""Curves of validation.jsonl, the one that decides first."""
SPEED = "images/s"
TRAINING = "training loss"
_BLOCKS = 10
"""Parts of a run's steps, whose medians of the speed are compared."""
_FREE = {"run.seed", "run.output_dir", "run.device", "source", "evaluation.cache"}
_FREE_SECTIONS = ("logging.", "checkpoint.")
_EVERY = ".every_steps"
"""Settings that do not change what is trained end so, lie in these sections, or are these."""


@dataclass
class Curve:
    """One quantity of a run."""

    values: dict[int, float] = field(default_factory=dict)
    """By samples seen."""
    sets: dict[int, str] = field(default_factory=dict)
    """Digest of the held-out pictures, times and noise, by samples seen."""
    losses: dict[int, list[float]] = field(default_factory=dict)
    """Of each held-out picture, by samples seen."""


@dataclass
class RunCurves:
    """What compare knows of a run."""

    name: str
    seed: int
    settings: dict[str, Any]
    """All that changes what is trained, but the seed, by `section.key`."""
    global_batch: int
    curves: dict[str, Curve] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    """Images/s, medians of equal parts of the run."""

    @property
    def speed(self) -> float | None:
        """Images/s over the run."""
        return statistics.median(self.speeds) if self.speeds else None


def read_run(folder: Path) -> RunCurves:
    """The curves of a run's folder. Raises UserError for one that holds no run, or no steps."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"RUN {folder}: no run: config.json: {getattr(error, 'strerror', error)}") from None
    config = stored_config(values, str(folder))
    run = RunCurves(str(folder), config.run.seed, settings_of(config), config.data.global_batch)
    samples = samples_after(config)
    try:
        records = list(steps_of(folder / "log.jsonl"))
        evaluations = [r for r in _lines(folder / "log.jsonl") if isinstance(r.get("evaluation"), dict)]
    except OSError as error:
        raise UserError(f"RUN {folder}: log.jsonl cannot be read: {error.strerror}") from None
    if not records:
        raise UserError(f"RUN {folder}: log.jsonl has no steps yet")
    for record in evaluations:
        for metric, title in TITLES.items():
            if (value := record["evaluation"].get(metric)) is not None:
                run.curves.setdefault(title, Curve()).values[samples(record["step"])] = value
    held_out = folder / VALIDATION
    for record in _lines(held_out) if held_out.is_file() else ():
        add_held_out(run, record)
    run.curves[TRAINING] = Curve(_averages(records, samples))
    run.speeds = _speeds(records)
    return run


def add_held_out(run: RunCurves, record: dict[str, Any]) -> None:
    """Take a record of validation.jsonl."""
    title = HELD_OUT.get(record.get("weights", ""))
    if title is None or record.get("loss") is None:
        return
    curve, seen = run.curves.setdefault(title, Curve()), record["samples_seen"]
    curve.values[seen] = record["loss"]
    curve.sets[seen] = record["set"]
    if record.get("losses"):
        curve.losses[seen] = record["losses"]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a line that was cut off is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def samples_after(config: Config) -> Callable[[int], int]:
    """Samples that a run has seen after a step."""
    stages = resolve_stages(config)

    def samples(step: int) -> int:
        return sum(
            max(0, min(step, stage.last) - stage.first) * stage.config.data.global_batch for stage in stages
        )

    return samples


def settings_of(config: Config) -> dict[str, Any]:
    """The resolved settings that change what is trained, by `section.key`, without the seed."""
    flat = dict(_flat(config.model_dump(mode="json"), ""))
    return {
        key: value
        for key, value in flat.items()
        if key not in _FREE and not key.startswith(_FREE_SECTIONS) and not key.endswith(_EVERY)
    }


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _averages(records: list[dict[str, Any]], samples: Callable[[int], int]) -> dict[int, float]:
    """Means of the logged loss over tenths of the run, at their ends."""
    found = {}
    for part in _parts(records):
        losses = [record["loss"] for record in part if record.get("loss") is not None]
        if losses:
            found[samples(part[-1]["step"])] = statistics.fmean(losses)
    return found


def _speeds(records: list[dict[str, Any]]) -> list[float]:
    """Medians of images/s over tenths of the run but the first, in which things warm up."""
    parts = ([r["images_per_second"] for r in part if r.get("images_per_second")] for part in _parts(records))
    return [statistics.median(part) for part in list(parts)[1:] if part]


def _parts(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    size = max(1, len(records) // _BLOCKS)
    return [records[start : start + size] for start in range(0, len(records) - size + 1, size)]
