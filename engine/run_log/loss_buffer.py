"""Loss buffer on the device: losses of several steps, read by the host at once.

Losses stay on the device until a flush, so that logging does not make the host wait in every step.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from millrace.engine.distributed.process_group import world_size

TIME_BINS = 4
"""Loss is also logged by time, in this many equal intervals of t."""


@dataclass(frozen=True)
class StepLoss:
    """Losses of one step over the global batch."""

    loss: float
    """Mean over the samples of the sum of all terms."""
    by_time: list[float | None]
    """Mean flow loss of the samples whose t fell in each interval; None where there were none."""
    terms: dict[str, float]
    """Mean of each term."""
    captions_cut: int
    """Captions of the global batch that were longer than the text encoder takes."""


class LossBuffer:
    """Sums of sample losses for up to `capacity` steps, on the device. `terms` names what the loss adds up,
    the first of them also by time."""

    def __init__(self, capacity: int, device: torch.device, terms: tuple[str, ...] = ("flow",)) -> None:
        self._terms = terms
        columns = len(terms) + 2 * TIME_BINS + 1
        self._rows = torch.zeros(capacity, columns, dtype=torch.float64, device=device)
        self.filled = 0

    def add(self, losses: dict[str, Tensor], t: Tensor, captions_cut: int = 0) -> None:
        """Add a micro-batch's terms (B,) each, at times (B,), to the current step."""
        row, cut = self._rows[self.filled].tensor_split([-1])
        cut += captions_cut
        parts = torch.stack([losses[term].detach() for term in self._terms]).double()
        row[: len(parts)] += parts.sum(1)
        interval = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        by_time, counts = row[len(parts) :].chunk(2)
        by_time.index_add_(0, interval, parts[0])
        counts.index_add_(0, interval, torch.ones_like(parts[0]))

    def end_step(self) -> bool:
        """Move to the next step; True when the buffer is full and must be flushed."""
        self.filled += 1
        return self.filled == len(self._rows)

    def flush(self) -> list[StepLoss]:
        """Losses of the buffered steps over all ranks, oldest first. Collective; waits for the device."""
        rows = self._rows[: self.filled].clone()
        if world_size() > 1:
            dist.all_reduce(rows)
        self._rows.zero_()
        self.filled = 0
        return [self._step_loss(row) for row in rows.tolist()]

    def _step_loss(self, row: list[float]) -> StepLoss:
        *row, cut = row
        sums, counts = row[len(self._terms) : -TIME_BINS], row[-TIME_BINS:]
        by_time = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        terms = {term: total / sum(counts) for term, total in zip(self._terms, row, strict=False)}
        return StepLoss(sum(terms.values()), by_time, terms, round(cut))
