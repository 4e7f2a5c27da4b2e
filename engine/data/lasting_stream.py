"""Lasting stream: when data end on one process, all processes come to the end of the step together.

The others are in the middle of a step by then and would wait in a collective for the one that has stopped. So
it goes on with its last micro-batch, and `ended` says so; whoever trains spoils such a batch, so that the
step is skipped everywhere, and stops at its end.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from millrace.engine.data.batch import Batch
from millrace.engine.distributed.signals import DataNeverCame
from millrace.engine.util.errors import UserError


class LastingStream:
    """The micro-batches of `stream`; after its UserError, or DataNeverCame, the last one again and again.

    Either is raised before the first micro-batch: there is none to go on with.
    """

    def __init__(self, stream: Iterator[Batch]) -> None:
        self._stream = stream
        self._latest: Batch | None = None
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        """Surrounds the wait for a micro-batch; in it DataNeverCame may be raised."""
        self.failure: str | None = None
        """The error's message, once there is one."""
        self.asked = False
        """Whether this process was asked to stop while it waited."""

    @property
    def ended(self) -> bool:
        """Whether no more data come."""
        return self.asked or self.failure is not None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self.ended:
            try:
                with self.waiting():
                    self._latest = next(self._stream)
            except (UserError, DataNeverCame) as error:
                if self._latest is None:
                    raise
                if isinstance(error, UserError):
                    self.failure = str(error)
                else:
                    self.asked = True
        assert self._latest is not None
        return self._latest
