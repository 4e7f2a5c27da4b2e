"""Prefetch: the next micro-batch is encoded beside the training step that uses this one."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from millrace.engine.data import Batch
from millrace.engine.encoders.batch_encoder import BatchEncoder, EncodedBatch
from millrace.engine.encoders.side_stream import SideStream, use_after


class _Next(NamedTuple):
    """A micro-batch that was encoded, or why it could not be."""

    batch: EncodedBatch | None
    ready: torch.cuda.Event | None
    error: Exception | None


class BatchPrefetcher:
    """Encodes micro-batches by frozen networks, ahead of the step where the device allows it.

    On CUDA the frozen networks work on a stream of their own. While the device is busy with a micro-batch,
    `look_ahead` gives it the encoding of the next one, which then overlaps with the rest of the step. What
    is encoded does not depend on when: nothing of it reads what training changes. A micro-batch counts as
    consumed when `next_batch` hands it out; so a checkpoint knows nothing of one that lies ahead, and an
    error in one is raised when its turn comes.

    Args:
        prepare: runs the frozen networks.
        ahead: whether `look_ahead` does anything; None: on CUDA.
    """

    def __init__(self, prepare: BatchEncoder, ahead: bool | None = None) -> None:
        self.prepare = prepare
        self._ahead = prepare.device.type == "cuda" if ahead is None else ahead
        self._side = SideStream(prepare.device)
        self._next: _Next | None = None

    def next_batch(self, stream: Iterator[Batch]) -> EncodedBatch:
        """The next micro-batch for the denoiser."""
        if self._next is None:
            with self._side.after_current():
                self._next = self._encode(stream)
        (batch, ready, error), self._next = self._next, None
        if error is not None:
            raise error
        use_after(ready, batch.tensors())
        return batch

    def look_ahead(self, stream: Iterator[Batch]) -> None:
        """Encode the next micro-batch beside what the device is doing, if it has a stream for that."""
        if self._ahead and self._next is None:
            with self._side.at_once():
                self._next = self._encode(stream)

    def settle(self) -> None:
        """Make the current stream wait for the frozen networks, before it uses them itself."""
        self._side.join()

    def _encode(self, stream: Iterator[Batch]) -> _Next:
        try:
            batch = self.prepare(next(stream))
        except Exception as error:  # raised when the micro-batch is wanted
            return _Next(None, None, error)
        return _Next(batch, self._side.event(), None)
