"""Scalars: the names under which a run's numbers are charted, in groups that TensorBoard folds."""

from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch

SPEED = ("step_seconds", "images_per_second", "mfu")
"""Keys of a step's record that belong to the group `speed`; all other numbers belong to `train`."""


def step_scalars(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a step: its groups are train, loss (the terms), loss_by_time (flow loss by the middle of the
    interval of t) and speed."""
    return dict(_of_step(record))


def _of_step(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        match key:
            case "step":
                pass
            case "losses":
                yield from ((f"loss/{term}", loss) for term, loss in value.items())
            case "autoencoder":
                yield from ((f"loss/autoencoder/{term}", loss) for term, loss in value.items())
            case "loss_by_time":
                middles = [(i + 0.5) / len(value) for i in range(len(value))]
                yield from by_time("loss_by_time", middles, value)
            case "parts":
                yield from ((f"train/parts/{part}", given) for part, given in value.items())
            case _ if isinstance(value, int | float):
                yield f"{'speed' if key in SPEED else 'train'}/{key}", float(value)


def by_time(name: str, times: Sequence[float], values: Sequence[float | None]) -> Iterator[tuple[str, float]]:
    """One name for each time t; those without a value are left out."""
    for t, value in zip(times, values, strict=True):
        if value is not None:
            yield f"{name}/{t:.3f}", value


def evaluation_scalars(values: dict[str, Any]) -> dict[str, float]:
    """Numbers of an evaluation, in the group metrics."""
    return {f"metrics/{key}": float(value) for key, value in values.items() if isinstance(value, int | float)}


def validation_scalars(record: dict[str, Any], times: Sequence[float]) -> dict[str, float]:
    """Held-out loss of some weights, whole and by time, in the group validation."""
    name = "validation/loss" if record["weights"] == "model" else f"validation/{record['weights']}_loss"
    return {name: record["loss"], **dict(by_time(f"{name}_by_time", times, record["by_time"]))}


def memory_scalars() -> dict[str, float]:
    """Memory of this process in GB (1e9 bytes), in the group memory. Nothing waits for the device."""
    found = {"memory/host_gb": psutil.Process().memory_info().rss / 1e9}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["memory/device_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["memory/device_reserved_gb"] = torch.cuda.memory_reserved() / 1e9
    return found
