"""Where the micro-batches of a training step come from."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from millrace.engine.checkpoint.checkpoints import Piece
from millrace.engine.data import Batch
from millrace.engine.encoders.batch_encoder import (
    Preparation,
    Prepared,
)
from millrace.engine.encoders.side_stream import (
    SideStream,
    use_after,
)


class _Next(NamedTuple):
    """A micro-batch that was prepared, or why it could not be."""

    batch: Prepared | None
    ready: torch.cuda.Event | None
    error: Exception | None


class Feed:
    """The micro-batches of a step as an autoencoder makes them that is not trained.

    On CUDA the frozen networks work on a stream of their own. While the device is busy with a micro-batch,
    `look_ahead` gives it the preparation of the next one, which then overlaps with the rest of the step. What
    is prepared does not depend on when: nothing of it reads what training changes. A micro-batch counts as
    consumed when `next_batch` hands it out; so a checkpoint knows nothing of one that lies ahead, and an
    error in one is raised when its turn comes.

    `EndToEnd` is the other kind: its autoencoder learns with the denoiser, and has state.

    Args:
        prepare: runs the frozen networks.
        ahead: whether `look_ahead` does anything; None: on CUDA.
    """

    def __init__(self, prepare: Preparation, ahead: bool | None = None) -> None:
        self.prepare = prepare
        self.captions_cut = 0
        """Captions of the micro-batches so far that were longer than the text tower's limit."""
        self._ahead = prepare.device.type == "cuda" if ahead is None else ahead
        self._side = SideStream(prepare.device)
        self._next: _Next | None = None

    def next_batch(self, stream: Iterator[Batch], step: int) -> Prepared:
        """The next micro-batch for the denoiser."""
        if self._next is None:
            with self._side.after_current():
                self._next = self._prepared(stream)
        (batch, ready, error), self._next = self._next, None
        if error is not None:
            raise error
        use_after(ready, batch.tensors())
        return self.hand_out(batch)

    def look_ahead(self, stream: Iterator[Batch]) -> None:
        """Prepare the next micro-batch beside what the device is doing, if it has a stream for that."""
        if self._ahead and self._next is None:
            with self._side.at_once():
                self._next = self._prepared(stream)

    def settle(self) -> None:
        """Make the current stream wait for the frozen networks, before it uses them itself."""
        self._side.join()

    def hand_out(self, batch: Prepared) -> Prepared:
        """Count a micro-batch as consumed."""
        self.captions_cut += batch.captions_cut
        return batch

    def _prepared(self, stream: Iterator[Batch]) -> _Next:
        try:
            batch = self.prepare(next(stream))
        except Exception as error:  # raised when the micro-batch is wanted
            return _Next(None, None, error)
        return _Next(batch, self._side.event(), None)

    def finish(self, applied: bool, step: int, steps: int) -> None:
        """Nothing is trained here."""

    def flush(self, records: list[dict[str, Any]]) -> None:
        """There are no losses."""

    def describe(self) -> list[str]:
        """There is nothing to say."""
        return []

    def state_pieces(self) -> Iterator[Piece]:
        """There is no state."""
        return iter(())
