"""NVIDIA DALI decoder of JPEG files: on the CPU, or on the GPU where there is one.

    reading threads   file, header ──▶ is it for DALI? ──▶ box, size, flip (`Choices`)
    DALI              decodes the files of a micro-batch
    resizing          of the boxes: on the CPU by `crop.resize` in threads, as with Pillow, so that pixels are
                      those of the Python loader bit for bit; on the GPU by DALI, so that they stay there

DALI fills what is missing of a truncated file with grey and says nothing, and a pipeline that meets a file it
cannot decode is dead. So only whole JPEG files of upright sRGB are given to it, Pillow takes all others, and
a micro-batch that fails is decoded again by Pillow, which then says what is wrong with which picture.
Decoding the boxes alone would save nothing that can be measured (crops are 0.8 of the edge or more), and
would not see errors below them.

On a GPU, DALI decodes on streams of its own, and what leaves it is copied on a stream of the decoder's.
Neither waits for what training has queued. The thread that copies waits for its copies: DALI then uses its
memory again, and whoever takes the pictures need not wait. Their memory belongs to the decoder's stream, so
the allocator must be told of the stream that reads them (`record_stream` in `encoders/batch_encoder.py`).
"""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from PIL import Image
from torch import Tensor

from millrace.engine.config import Data
from millrace.engine.data.crop import resize
from millrace.engine.data.decoding import Encoded, PythonDecoder, parts
from millrace.engine.data.sample_choices import View, Viewer
from millrace.engine.data.sources.pictures import (
    MAX_SCANS,
    Source,
    UnreadablePicture,
    encoded,
    orientation,
    stored_size,
)
from millrace.engine.data.srgb import transform_of

log = logging.getLogger(__name__)

_END_OF_IMAGE = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""In the data of a scan: not a byte 0xff of it, and not a restart."""
_VIEW = ("start", "shape", "size", "flip")


class DaliDecoder:
    """`python` takes the pictures that are not for DALI; `device` is where pixels are wanted."""

    def __init__(self, source: Source, python: PythonDecoder, config: Data, device: torch.device) -> None:
        self._source, self._python = source, python
        self._workers = self._threads = max(config.workers, 1)
        self._batch = config.micro_batch
        self._resizers = ThreadPoolExecutor(self._workers, "resizing")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device if device.type == "cuda" and self._works_on(device) else None
        # On the CPU one micro-batch is decoded while the pictures of another are resized: each alone leaves
        # threads idle when its last pictures are done.
        self.lanes = 1 if self._device is not None else min(2, self._workers)
        self._threads = self._workers // self.lanes
        self._pipelines: SimpleQueue[dali.Pipeline] = SimpleQueue()
        for _ in range(self.lanes):
            self._pipelines.put(self._build())
        where = "on the CPU" if self._device is None else f"on {self._device}"
        self.description = f"NVIDIA DALI {dali.__version__} {where}, {self._workers} threads"

    def start(self, picture: int, viewer: Viewer) -> Tensor | Encoded:
        data = encoded(self._source, picture)
        size = None if data is None else size_if_simple(data)
        if data is None or size is None or stored_size(self._source, picture) not in (None, size):
            return self._in_python(picture, viewer)
        return Encoded(data, picture, viewer(*size), viewer)

    def finish(self, files: list[Encoded]) -> list[Tensor | UnreadablePicture]:
        pipeline = self._pipelines.get()
        try:
            try:
                pictures = feed(pipeline, files, finished=self._device is not None)
            except RuntimeError as error:
                log.info("DALI: %s; Pillow decodes this micro-batch", str(error).splitlines()[0])
                pipeline = self._build()
                return list(self._resizers.map(self._again, files))
            return self._finished(pictures, files)
        finally:
            self._pipelines.put(pipeline)

    def close(self) -> None:
        self._resizers.shutdown(wait=False, cancel_futures=True)

    def _finished(self, pictures: Any, files: list[Encoded]) -> list[Tensor]:
        """Pixels out of DALI's memory, as they are wanted."""
        if self._device is not None:
            return self._copies(pictures, self._device)

        def finished(part: Sequence[int]) -> list[Tensor]:
            found = []
            for k in part:
                view = files[k].view
                left, top, right, bottom = view.box
                whole = np.asarray(pictures[k])  # DALI's own memory
                pixels = resize(whole[top:bottom, left:right], view.size)
                found.append(pixels.flip(-1) if view.flip else pixels)
            return found

        done = self._resizers.map(finished, parts(range(len(files)), self._workers))
        return [pixels for part in done for pixels in part]

    def _in_python(self, picture: int, viewer: Viewer) -> Tensor:
        pixels = self._python.start(picture, viewer)
        if self._device is None:
            return pixels
        with self._copying():
            return pixels.to(self._device)

    def _again(self, file: Encoded) -> Tensor | UnreadablePicture:
        try:
            return self._in_python(file.picture, file.viewer)
        except UnreadablePicture as problem:
            return problem

    def _copies(self, pictures: Any, device: torch.device) -> list[Tensor]:
        """Pictures on the GPU out of DALI's memory, which the next micro-batch takes."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        found = []
        with self._copying():
            for k in range(len(pictures)):
                picture = pictures[k]
                found.append(torch.empty(picture.shape(), dtype=torch.uint8, device=device))
                feed_ndarray(picture, found[-1], cuda_stream=self._stream)
        return found

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Inside, copies go to the decoder's stream; at the end this thread waits for them alone."""
        with torch.cuda.stream(self._stream):
            yield
            done = torch.cuda.Event(blocking=True)  # sleeps; the cores are for decoding
            done.record(self._stream)
        done.synchronize()

    def _works_on(self, device: torch.device) -> bool:
        """Whether DALI decodes a picture on this GPU; drivers, toolkits and decoders have to fit for that."""
        file = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(file, "JPEG")
        self._device, view = device, View((16, 16), (0, 0, 32, 32), False)
        try:
            pipeline = self._build()
            red = Encoded(file.getvalue(), 0, view, lambda _w, _h: view)
            pictures = feed(pipeline, [red], finished=True)
            (pixels,) = self._copies(pictures, device)
            level = float(pixels[0].float().mean())
        except Exception as error:  # whatever is missing, the CPU can do it
            log.warning(
                "DALI cannot decode on %s: %s; it decodes on the CPU", device, str(error).splitlines()[0]
            )
            return False
        return level > 200

    def _build(self) -> dali.Pipeline:
        return build_pipeline(self._batch, self._threads, self._device, finished=self._device is not None)


def build_pipeline(batch: int, threads: int, device: torch.device | None, finished: bool) -> dali.Pipeline:
    """A pipeline that runs when it is asked to and keeps nothing, so that failing loses nothing else.

    From `file` it makes whole pictures (H, W, 3) uint8. If they are to be `finished`, it also takes `start`
    and `shape` of their boxes (y, x), `size` (h, w) and `flip`, and makes (3, h, w). None is the CPU.
    """
    pipeline = dali.Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=None if device is None else device.index or 0,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    with pipeline:
        pictures = fn.decoders.image(
            fn.external_source(name="file"),
            device="cpu" if device is None else "mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as Pillow does
            adjust_orientation=False,  # upright already
        )
        if finished:
            start, shape, size, flip = (fn.external_source(name=name) for name in _VIEW)
            pictures = fn.slice(pictures, start=start, shape=shape, axes=(0, 1))
            pictures = fn.resize(pictures, size=size, interp_type=types.INTERP_LANCZOS3, antialias=True)
            pictures = fn.crop_mirror_normalize(
                pictures, mirror=flip, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0]
            )
        pipeline.set_outputs(pictures)
    pipeline.build()
    return pipeline


def feed(pipeline: dali.Pipeline, files: list[Encoded], finished: bool) -> Any:
    """What a pipeline makes of the files: DALI's list of pictures. Raises RuntimeError."""
    views = [file.view for file in files]
    pipeline.feed_input("file", [np.frombuffer(file.data, np.uint8) for file in files])
    if finished:
        boxes = [view.box for view in views]
        pipeline.feed_input("start", [np.array([y, x], np.int32) for x, y, _, _ in boxes])
        pipeline.feed_input("shape", [np.array([y1 - y, x1 - x], np.int32) for x, y, x1, y1 in boxes])
        pipeline.feed_input("size", [np.array(view.size, np.float32) for view in views])
        pipeline.feed_input("flip", [np.array(view.flip, np.int32) for view in views])
    (pictures,) = pipeline.run()
    return pictures


def size_if_simple(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a whole JPEG file in upright 8-bit sRGB, from its header; None for all others."""
    # A file that ends where its picture does has all rows of it: nothing is left for DALI to fill in.
    if not data.endswith(_END_OF_IMAGE):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            simple = image.format == "JPEG" and image.mode == "RGB"
            marked = "exif" in image.info or "xmp" in image.info
            if (
                not simple
                or (marked and orientation(image) != 1)
                or transform_of(image.info, "RGB") is not None
            ):
                return None
            # Once it has all rows of a picture in one scan, DALI does not look at what follows; Pillow does.
            if "progressive" in image.info:
                if data.count(b"\xff\xda") > MAX_SCANS:
                    return None
            elif _MARKER.search(data, image.fp.tell(), len(data) - 2):
                return None
            limit = Image.MAX_IMAGE_PIXELS
            return None if limit and image.width * image.height > limit else image.size
    except Exception:  # Pillow raises nearly every built-in exception; decoding it whole says what is wrong
        return None
