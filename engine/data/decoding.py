"""Picture decoding in the data loader: by Pillow in threads, or by NVIDIA DALI (`dali.py`).

    start   in a reading thread, one sample: its pixels, or its file and what is to be seen of it
    finish  a micro-batch of files at once: their pixels

Both give the same pixels of the same pictures, and call the same pictures unreadable.
"""

import importlib.util
import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from millrace.engine.config import Data
from millrace.engine.data.crop import cut
from millrace.engine.data.sample_choices import View, Viewer
from millrace.engine.data.sources.pictures import Source, UnreadablePicture, holds_files
from millrace.engine.util.errors import UserError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

DALI = "nvidia-dali-cuda130"
"""Its package; it runs without a GPU too."""


class Encoded(NamedTuple):
    """A JPEG file that waits for its micro-batch."""

    data: bytes
    picture: int
    """Its index in the source."""
    view: View
    viewer: Viewer


class Decoder(Protocol):
    """Makes pixels (3, h, w) uint8."""

    description: str
    """For the log: who decodes, where."""
    lanes: int
    """Threads that may `finish` a micro-batch at the same time; 0 where there is nothing to finish."""

    def start(self, picture: int, viewer: Viewer) -> Tensor | Encoded:
        """In any thread. Raises UnreadablePicture, and what `viewer` raises."""

    def finish(self, files: list[Encoded]) -> list[Tensor | UnreadablePicture]:
        """Pixels of each file, or why it has none. In as many threads at a time as there are lanes."""

    def close(self) -> None:
        """Release threads and memory; nothing is asked for afterwards."""


def parts(sequence: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """At most `count` parts of a sequence, in order, of nearly equal length; none is empty.

    A thread that takes a part wakes others once, not for every picture: where pictures are small, waking is a
    good part of the work.
    """
    count = min(count, len(sequence))
    ends = [len(sequence) * i // count for i in range(count + 1)] if count else [0]
    return [sequence[a:b] for a, b in pairwise(ends)]


class PythonDecoder:
    """Pillow decodes each picture in the thread that reads it."""

    lanes = 0

    def __init__(self, source: Source, workers: int) -> None:
        self._source = source
        self.description = f"Pillow, {workers} threads" if workers else "Pillow in the training thread"

    def start(self, picture: int, viewer: Viewer) -> Tensor:
        image = self._source.image(picture)
        size, box, flip = viewer(image.width, image.height)
        pixels = cut(image, box, size)
        return pixels.flip(-1) if flip else pixels

    def finish(self, files: list[Encoded]) -> list[Tensor | UnreadablePicture]:
        raise NotImplementedError("start leaves nothing to finish")

    def close(self) -> None:
        """There is nothing."""


def open_decoder(source: Source, config: Data, device: torch.device) -> Decoder:
    """The decoder that `data.loader` asks for. DALI decodes on `device` where that is CUDA and can do it.

    Raises UserError for DALI where it is not installed, or has no JPEG files to decode.
    """
    python = PythonDecoder(source, config.workers)
    if config.loader == "python":
        return python
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if config.loader == "auto" and not (installed and holds_files(source)):
        return python
    if not holds_files(source):
        raise UserError(
            f"data.loader dali decodes JPEG files, but data.source {config.source} has none; set it to auto"
        )
    if not installed:
        raise UserError(
            f"data.loader dali needs NVIDIA DALI: pip install '{DALI}>=2.4', or set data.loader to python"
        )
    try:
        from millrace.engine.data.dali import DaliDecoder
    except (ImportError, OSError) as error:  # a library of the driver or the toolkit that is not there
        if config.loader == "dali":
            raise UserError(
                f"data.loader dali: NVIDIA DALI is installed but does not load: {error}; set it to python"
            ) from None
        log.warning("NVIDIA DALI is installed but does not load: %s", error)
        return python
    return DaliDecoder(source, python, config, device)
