"""Where the micro-batches of a training step come from."""

from collections.abc import Iterator
from typing import Any

from millrace.engine.data import Batch
from millrace.engine.preparation import Preparation, Prepared
from millrace.engine.runtime.checkpoint import Piece


class Feed:
    """The micro-batches of a step as an autoencoder makes them that is not trained.

    `EndToEnd` is the other kind: its autoencoder learns with the denoiser, and has state.
    """

    def __init__(self, prepare: Preparation) -> None:
        self.prepare = prepare

    def next_batch(self, stream: Iterator[Batch], step: int) -> Prepared:
        """The next micro-batch for the denoiser."""
        return self.prepare(next(stream))

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
