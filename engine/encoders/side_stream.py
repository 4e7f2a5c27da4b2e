"""Work of a frozen network on a CUDA stream of its own, beside the training step; on a CPU in place.

    with side.after_current(inputs):    waits for what makes the inputs; keeps them until it has read them
        results = network(inputs)
        ready = side.event()
    ...
    use_after(ready, results)           makes the current stream wait, not the host

Memory belongs to the stream that allocated it: the allocator hands it out again as soon as that stream has
passed the place where it was freed, whoever still reads it. `record_stream` tells it about the other reader.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """A CUDA stream on `device`; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_current(self, inputs: Iterable[Tensor] = ()) -> AbstractContextManager[object]:
        """Work on the side stream, after all that the current stream has to do so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in inputs:
            tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    def at_once(self) -> AbstractContextManager[object]:
        """Work on the side stream that reads nothing of what the current stream still has to do."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def event(self) -> torch.cuda.Event | None:
        """Marks the end of the side stream's work so far."""
        return None if self._stream is None else self._stream.record_event()

    def join(self) -> None:
        """Make the current stream wait for all that the side stream has to do so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def use_after(ready: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
    """Make the current stream wait for `ready`, after which it may read tensors of a side stream."""
    if ready is None:
        return
    for i, tensor in enumerate(tensors):
        stream = torch.cuda.current_stream(tensor.device)
        if i == 0:
            stream.wait_event(ready)
        tensor.record_stream(stream)
