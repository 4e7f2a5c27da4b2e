"""Lasting stream: when data run out on one process, all processes come to the end of the step together.

The others are in the middle of a step by then and would wait in a collective for the one that has stopped. So
it goes on with its last micro-batch, and `failure` says why; whoever trains spoils such a batch, so that the
step is skipped everywhere, and stops at its end.
"""

from collections.abc import Iterator

from millrace.engine.data.batch import Batch
from millrace.engine.util.errors import UserError


class LastingStream:
    """The micro-batches of `stream`; after its UserError the last one again and again.

    An error before the first micro-batch is raised: nothing has been trained that could be lost.
    """

    def __init__(self, stream: Iterator[Batch]) -> None:
        self._stream = stream
        self._latest: Batch | None = None
        self.failure: str | None = None
        """The error's message, once there is one."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.failure is None:
            try:
                self._latest = next(self._stream)
            except UserError as error:
                if self._latest is None:
                    raise
                self.failure = str(error)
        assert self._latest is not None
        return self._latest
