"""Damaged training state: elements that no sound state has, counted, named, and remembered over restarts.

A NaN, an infinity, or a second moment below zero. One such element reaches all weights within two updates,
so a state that has one is not published, and a checkpoint that has one is not loaded. `damage.jsonl` in the
run's folder has a line {"good", "step", "problem"} for each time that training found its state damaged at
`step` though it had been sound at `good`; by it `--resume auto` knows that going back did not help.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from millrace.engine.optim.adamw import ADAM_STATE
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

RECORD = "damage.jsonl"
_SECOND_MOMENT = ADAM_STATE[1]
_SHOWN = 3


class BadElements(NamedTuple):
    """Elements of one tensor that no sound state has."""

    not_finite: int
    negative: int
    """Of a second moment."""

    def __str__(self) -> str:
        counts = ((self.not_finite, "not finite"), (self.negative, "negative"))
        return ", ".join(f"{n} element{'s'[: n > 1]} {what}" for n, what in counts if n)


class DamagedState(UserError):
    """The training state has elements that no sound state has: by tensor, of all ranks."""

    def __init__(self, bad: Mapping[str, BadElements]) -> None:
        super().__init__(f"the training state is damaged: {describe(bad)}")
        self.bad = dict(bad)


def bad_elements(name: str, values: Tensor) -> BadElements | None:
    """The bad elements of (a part of) the tensor that a checkpoint calls `name`; None where all are good."""
    if not values.is_floating_point() or not values.numel():
        return None
    moment = _SECOND_MOMENT in name.split("/")
    # One pass without a temporary, 14 times as fast as sha256; NaN comes through.
    low, high = (float(bound) for bound in values.aminmax())
    if low - low == 0 == high - high and not (moment and low < 0):
        return None
    finite = values.isfinite()
    negative = int((finite & (values < 0)).sum()) if moment else 0
    return BadElements(int((~finite).sum()), negative)


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if weights have elements that are not finite; `what` they are begins the message."""
    found = {name: bad for name, tensor in tensors.items() if (bad := bad_elements(name, tensor))}
    if found:
        raise UserError(f"{what} are damaged: {describe(found)}; take an earlier checkpoint or other weights")


def total(parts: Iterable[Mapping[str, BadElements]]) -> dict[str, BadElements]:
    """Counts by tensor over several parts of a state."""
    found: dict[str, BadElements] = {}
    for part in parts:
        for name, bad in part.items():
            before = found.get(name, BadElements(0, 0))
            found[name] = BadElements(before.not_finite + bad.not_finite, before.negative + bad.negative)
    return dict(sorted(found.items()))


def describe(bad: Mapping[str, BadElements]) -> str:
    """In one line for people: the first few tensors and how many more there are."""
    shown = [f"{name} ({counts})" for name, counts in list(bad.items())[:_SHOWN]]
    more = f" and {len(bad) - _SHOWN} more tensors" if len(bad) > _SHOWN else ""
    return f"{', '.join(shown)}{more}"


def record_damage(output: Path, good: int, step: int, damage: DamagedState) -> None:
    """Add a line to the record. Raises OSError."""
    with (output / RECORD).open("a") as file:
        file.write(json.dumps({"good": good, "step": step, "problem": describe(damage.bad)}) + "\n")


def require_progress(output: Path, step: int) -> list[str]:
    """A line for the user if training from the checkpoint of `step` has ended in a damaged state; UserError
    if it has twice."""
    found = [entry for entry in _entries(output) if entry["good"] == step]
    if len(found) < 2:
        return [
            f"going back to step {step}: at step {entry['step']} the training state was damaged: "
            f"{entry['problem']}; if it happens again, --resume auto gives up"
            for entry in found
        ]
    times = ", ".join(f"at step {entry['step']}: {entry['problem']}" for entry in found[-2:])
    raise UserError(
        f"{output}: going back to step {step} did not help, the training state was damaged again ({times}); "
        f"look for the cause (the device, a kernel, precision), then delete {output / RECORD} and resume, or "
        "give --resume a step"
    )


def forget_damage(output: Path, step: int) -> list[str]:
    """Strike what the record says of training from `step`: someone decided to go on there."""
    entries = _entries(output)
    kept = [entry for entry in entries if entry["good"] != step]
    if len(kept) < len(entries):
        with suppress(OSError):  # then `auto` asks once more
            write_atomically(output / RECORD, "".join(json.dumps(entry) + "\n" for entry in kept))
    return []


def _entries(output: Path) -> list[dict]:
    """Lines of the record that can be read."""
    try:
        lines = (output / RECORD).read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # a line that a full disk cut off
            continue
        if isinstance(entry, dict) and entry.keys() >= {"good", "step", "problem"}:
            found.append(entry)
    return found
