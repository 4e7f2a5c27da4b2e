"""Loaders of pictures, ours and other people's, each in a process of its own that can be halted.

All of them give batches (B, 3, h, w) uint8 of one size, from the same JPEG files: a random crop of the
bucket's shape, 0.8 to 1 of the largest in each edge, resized. Ours are `SampleStream` as training uses it.
The others are put together as their documentation does, in as many worker processes as there are cores, with
the operations of torchvision's RandomResizedCrop on Pillow pictures (torchvision itself has no build for a
torch without CUDA). Filters are Lanczos as ours, but for one loader that has torchvision's default.
"""

import io
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from millrace.engine.config import Data
from millrace.engine.data import SampleStream, open_source
from millrace.engine.data.formats.mds_shards import load_library
from millrace.engine.util.errors import UserError

Size = tuple[int, int]
"""(h, w) in pixels."""
AREA = (0.8**2, 1.0)
"""Of a crop, as a share of the picture: RandomResizedCrop's `scale`. Ours is 0.8 to 1 of each edge."""
AHEAD = 2
"""Batches that each worker prepares ahead."""
SHUFFLED = 200
"""Samples among which webdataset shuffles."""
PATIENCE = 1800.0
"""Seconds after which a loader that says nothing has failed."""


class Case(NamedTuple):
    """What is loaded."""

    name: str
    shards: Path
    mds: Path
    files: Path
    resolution: int
    """Of the output."""
    square: bool
    """Whether the output is square, instead of the size of its bucket."""
    batch: int

    def size(self, bucket: Size) -> Size:
        """The output's size for a picture of a bucket."""
        return (self.resolution, self.resolution) if self.square else bucket


class Loader(Protocol):
    """Batches of a case."""

    def epoch(self) -> Iterator[Tensor]:
        """Every picture once, or as nearly as the loader does that."""

    def endless(self) -> Iterator[Tensor]:
        """Batches without end."""

    def close(self) -> None:
        """Release everything that outlives the process."""


class RandomResizedCrop:
    """torchvision's transform for crops of the output's aspect ratio, on a Pillow picture or on its pixels.

    The steps on a picture are those of torchvision's `resized_crop` and `pil_to_tensor`; on pixels those of
    `transforms.v2` for uint8 tensors.
    """

    def __init__(self, lanczos: bool = True) -> None:
        self.lanczos = lanczos

    def __call__(self, image: Image.Image, size: Size) -> Tensor:
        top, left, height, width = self.box(image, size)
        if self.lanczos:
            part = image.crop((left, top, left + width, top + height))
            return _pixels(part.resize(size[::-1], Image.Resampling.LANCZOS))
        part = _pixels(image)[:, top : top + height, left : left + width]
        return F.interpolate(part[None], size=size, mode="bilinear", antialias=True)[0]

    @staticmethod
    def box(image: Image.Image, size: Size) -> tuple[int, int, int, int]:
        """top, left, height, width."""
        aspect = size[1] / size[0]
        for _ in range(10):
            area = image.width * image.height * torch.empty(1).uniform_(*AREA).item()
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width <= image.width and height <= image.height:
                top = int(torch.randint(image.height - height + 1, (1,)))
                return top, int(torch.randint(image.width - width + 1, (1,))), height, width
        width = min(image.width, round(image.height * aspect))
        height = min(image.height, round(image.width / aspect))
        return (image.height - height) // 2, (image.width - width) // 2, height, width


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Ours:
    """The stream of samples that training reads."""

    def __init__(self, case: Case, workers: int, loader: str) -> None:
        config = Data(
            source="shards",
            path=str(case.shards),
            resolution=case.resolution,
            aspect="square" if case.square else "bucket",
            bucket_run=case.batch,
            global_batch=case.batch,
            micro_batch=case.batch,
            loader=loader,
            workers=workers,
            prefetch=AHEAD * workers,
        )
        source = open_source(config)
        self.batches = len(source) // case.batch
        self.stream = SampleStream(source, config, seed=0, patch=1, caption_drop=0.0, rank=0, world_size=1)

    def epoch(self) -> Iterator[Tensor]:
        return islice(self.endless(), self.batches)

    def endless(self) -> Iterator[Tensor]:
        while True:
            yield torch.stack(next(self.stream).images)

    def close(self) -> None:
        self.stream.close()


class Files(Dataset):
    """Pictures in folders, as torchvision's ImageFolder reads them."""

    def __init__(self, case: Case, transform: RandomResizedCrop) -> None:
        self.paths = sorted(case.files.glob("*/*.jpg"))
        if not self.paths:
            raise UserError(f"{case.files}: no pictures")
        self.sizes = [case.size(_size_in(path.parent.name)) for path in self.paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with self.paths[index].open("rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image, self.sizes[index])


class SizedBatches:
    """Places of a random batch of one size at a time; the last of a size in an epoch may be smaller."""

    def __init__(self, sizes: list[Size], batch: int, endless: bool) -> None:
        self.endless = endless
        self.members: dict[Size, list[int]] = {}
        for place, size in enumerate(sizes):
            self.members.setdefault(size, []).append(place)
        self.batch = batch

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.epoch()
        while self.endless:
            yield from self.epoch()

    def epoch(self) -> Iterator[list[int]]:
        """Every place once."""
        batches = []
        for members in self.members.values():
            shuffled = [members[i] for i in torch.randperm(len(members)).tolist()]
            batches += [shuffled[i : i + self.batch] for i in range(0, len(members), self.batch)]
        for i in torch.randperm(len(batches)).tolist():
            yield batches[i]


class Torch:
    """torch's DataLoader over plain files."""

    def __init__(self, case: Case, workers: int, lanczos: bool = True) -> None:
        self.files, self.batch, self.workers = Files(case, RandomResizedCrop(lanczos)), case.batch, workers

    def epoch(self, endless: bool = False) -> Iterator[Tensor]:
        batches = SizedBatches(self.files.sizes, self.batch, endless)
        return iter(DataLoader(self.files, batch_sampler=batches, **_processes(self.workers)))

    def endless(self) -> Iterator[Tensor]:
        return self.epoch(endless=True)

    def close(self) -> None:
        """Its processes end with this one."""


class WebDataset:
    """webdataset over the tars, one shard after another in each worker, shuffled in a buffer."""

    def __init__(self, case: Case, workers: int) -> None:
        import webdataset

        urls = sorted(map(str, case.shards.glob("*/*.tar")))
        transform = RandomResizedCrop()

        def by_size(samples: Iterator[dict[str, Any]]) -> Iterator[tuple[Size, list[bytes]]]:
            waiting: dict[Size, list[bytes]] = {}
            for sample in samples:
                size = case.size(_size_in(Path(sample["__url__"]).parent.name))
                group = waiting.setdefault(size, [])
                group.append(sample["jpg"])
                if len(group) == case.batch:
                    yield size, waiting.pop(size)
            yield from waiting.items()

        def decode(batch: tuple[Size, list[bytes]]) -> Tensor:
            size, files = batch
            images = (Image.open(io.BytesIO(file)).convert("RGB") for file in files)
            return torch.stack([transform(image, size) for image in images])

        def batches(endless: bool) -> Iterator[Tensor]:
            data = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
            data = (data.repeat() if endless else data).shuffle(SHUFFLED).compose(by_size).map(decode)
            return iter(webdataset.WebLoader(data, batch_size=None, **_processes(workers)))

        self.batches = batches

    def epoch(self) -> Iterator[Tensor]:
        return self.batches(False)

    def endless(self) -> Iterator[Tensor]:
        return self.batches(True)

    def close(self) -> None:
        """Its processes end with this one."""


class Streaming:
    """mosaicml-streaming over the MDS folders, one stream a bucket, batches of one stream: as PRX does it."""

    def __init__(self, case: Case, workers: int) -> None:
        load_library()
        from streaming import Stream, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        transform = RandomResizedCrop()

        class Pictures(StreamingDataset):
            def __getitem__(self, at: int) -> Tensor:
                sample = super().__getitem__(at)
                size = case.size((sample["height"], sample["width"]))
                return transform(sample["image"].convert("RGB"), size)

        logging.getLogger("streaming").setLevel(logging.ERROR)  # it warns of the small batches that it drops
        self.free_memory = clean_stale_shared_memory
        self.free_memory()
        # A stream with less than a batch is an error; PRX leaves such ones out.
        indexes = {path: json.loads(path.read_text()) for path in sorted(case.mds.glob("*/index.json"))}
        samples = {path: sum(one["samples"] for one in index["shards"]) for path, index in indexes.items()}
        folders = [path.parent for path in indexes if samples[path] >= case.batch]
        data = Pictures(
            streams=[Stream(local=str(folder)) for folder in folders],
            shuffle=True,
            batch_size=case.batch,
            batching_method="device_per_stream",
            num_canonical_nodes=1,
        )
        options = _processes(workers) | {"persistent_workers": True}
        self.loader = DataLoader(data, batch_size=case.batch, drop_last=True, **options)

    def epoch(self) -> Iterator[Tensor]:
        return iter(self.loader)

    def endless(self) -> Iterator[Tensor]:
        while True:
            yield from self.loader

    def close(self) -> None:
        """What it shares among processes stays after them otherwise."""
        del self.loader
        self.free_memory()


def _processes(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "prefetch_factor": AHEAD, "multiprocessing_context": "fork"}


def _size_in(folder: str) -> Size:
    high, _, wide = folder.partition("x")
    return int(high), int(wide)


class Contestant(NamedTuple):
    """A loader under its name."""

    open: Callable[[Case, int], Loader]
    filter: str
    ours: bool = False


CONTESTANTS = {
    "Millrace, DALI": Contestant(lambda case, n: Ours(case, n, "dali"), "Lanczos", ours=True),
    "Millrace, Pillow": Contestant(lambda case, n: Ours(case, n, "python"), "Lanczos", ours=True),
    "webdataset": Contestant(WebDataset, "Lanczos"),
    "mosaicml-streaming": Contestant(Streaming, "Lanczos"),
    "torch DataLoader": Contestant(Torch, "Lanczos"),
    "torch DataLoader, bilinear": Contestant(lambda case, n: Torch(case, n, lanczos=False), "bilinear"),
}


class Round(NamedTuple):
    """What one loader did in one turn."""

    images: int
    seconds: float
    cpu_seconds: float
    """Of its process and all that it started."""


class Runner:
    """A contestant in a process of its own, which runs only while it is asked for something."""

    def __init__(self, name: str, workers: int, cores: list[int]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, workers, cores))
        self.process.start()
        theirs.close()
        self.ask("ready")

    def open(self, case: Case) -> None:
        """Close the case before and begin this one."""
        self.ask("open", case)

    def epoch(self) -> Counter[tuple[int, ...]]:
        """How many pictures of each shape an epoch gives."""
        return self.ask("epoch")

    def measure(self, seconds: float) -> Round:
        """Load for about `seconds`, in the middle of an endless run."""
        return self.ask("measure", seconds)

    def close(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
        self.pipe.close()
        self.process.join(10)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def ask(self, what: str, *arguments: object) -> Any:
        """The server's answer; afterwards it is halted. Raises UserError where there is none."""
        if what != "ready":  # before its first answer it need not lead its group yet
            os.killpg(self.process.pid, signal.SIGCONT)
        self.pipe.send((what, arguments))
        try:
            if not self.pipe.poll(PATIENCE):
                raise UserError(f"{self.name}: no answer to {what} in {PATIENCE:.0f} s")
            answer, problem = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(f"{self.name}: its process ended") from None
        if problem is not None:
            raise UserError(f"{self.name}: {what}: {problem}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return answer


def _serve(pipe: Connection, name: str, workers: int, cores: list[int]) -> None:
    """Answer questions about one contestant until nobody asks any more."""
    os.setpgid(0, 0)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server = _Server(CONTESTANTS[name], workers)
    with suppress(EOFError):
        while True:
            what, arguments = pipe.recv()
            try:
                pipe.send((getattr(server, what)(*arguments), None))
            except Exception as error:
                traceback.print_exc()
                pipe.send((None, f"{type(error).__name__}: {error}"))
    server.close()


def _end_with_parent() -> None:
    """Kill this process and its workers when the benchmark is gone, whatever they are doing."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


class _Server:
    """Does what a Runner asks for."""

    def __init__(self, contestant: Contestant, workers: int) -> None:
        self.contestant, self.workers = contestant, workers
        self.loader: Loader | None = None
        self.batches: Iterator[Tensor] | None = None

    def ready(self) -> bool:
        return True

    def open(self, case: Case) -> bool:
        self.close()
        self.loader = self.contestant.open(case, self.workers)
        return True

    def epoch(self) -> Counter[tuple[int, ...]]:
        shapes: Counter[tuple[int, ...]] = Counter()
        for batch in self.loader.epoch():
            if batch.dtype != torch.uint8 or float(batch[:, :, ::8, ::8].float().std((1, 2, 3)).median()) < 1:
                raise ValueError(f"these are no pictures: {batch.dtype} {tuple(batch.shape)}")
            shapes[tuple(batch.shape[1:])] += len(batch)
        return shapes

    def measure(self, seconds: float) -> Round:
        if self.batches is None:
            self.batches = self.loader.endless()
        # What was ready when the turn began is not this turn's work.
        for _ in range(AHEAD * self.workers + 2):
            next(self.batches)
        images, before, started = 0, self._cpu_seconds(), time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            images += len(next(self.batches))
        return Round(images, passed, self._cpu_seconds() - before)

    def close(self) -> None:
        self.batches = None
        if self.loader is not None:
            self.loader.close()
        self.loader = None

    def _cpu_seconds(self) -> float:
        """Of this process and those that it has started, which stay."""
        here = psutil.Process()
        return sum(sum(one.cpu_times()[:2]) for one in (here, *here.children(recursive=True)))
