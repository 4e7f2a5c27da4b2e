"""Writing the latent cache and the text cache: the frozen encoders run once over the shards of a data set.

    captions ──clean, unique in the shard──▶ text encoder ──▶ valid rows, bf16 or int8 with a scale
    pictures ──evaluation view of the bucket──▶ autoencoder ──▶ mean and log-variance

    rank r makes those of shards r, r + world_size, ...: each appears whole or not at all, then
    DATASET/caches.partial/text/00000012.json says what it is
    all there ──▶ manifest, by whichever process finds the last one

Processes do not talk to each other, so none waits for another. A job that was interrupted goes on with the
shards that have no file yet, on any number of processes. The format is that of `engine/data/latent_cache.py`.
"""

import fcntl
import functools
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from millrace.engine.config import Config
from millrace.engine.data import UnreadablePicture, signed_unit
from millrace.engine.data.crop import crop_box, cut
from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.formats.shard_writer import write_manifest
from millrace.engine.data.latent_cache import CacheFile, CacheRecord, Kind, cache_path, common_path
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.distributed.process_group import choose_device
from millrace.engine.encoders.autoencoder import autoencoder_entry, open_autoencoder
from millrace.engine.encoders.frozen_networks import constants_tensors
from millrace.engine.encoders.identity import Identity, autoencoder_identity, differing, text_identity
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import atomic_file, sha256_file, write_atomically
from millrace.engine.util.progress_bar import bar_size
from millrace.engine.util.safetensors_file import GrowingTensorFile
from millrace.kernels.support.packed import to_device

TextDtype = Literal["bf16", "int8"]
_STORED = {"bf16": "bfloat16", "int8": "int8"}
_CAPTIONS = 64
"""Captions in one pass of the text encoder."""

COMMON = -1
"""In place of a shard's number: the file of what is stored once."""
PARTIAL = "caches.partial"
"""Folder in the data set of what is known of caches that are not complete."""


def write_caches(
    dataset: str | Path,
    config: Config,
    kinds: Sequence[Kind],
    rank: int = 0,
    world_size: int = 1,
    *,
    text_dtype: TextDtype = "bf16",
    replace: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the caches of a data set with the networks of `config.conditioning`, those that are not there.

    Args:
        dataset: folder of shards.
        config: gives the networks, `precision.compute` (of the text encoder), `run.device`,
            `data.micro_batch` (pictures in one pass of the autoencoder), `data.workers` and `data.upscale`.
        kinds: "text", "latents" or both.
        rank, world_size: this process takes the shards rank, rank + world_size, ...
        text_dtype: of the stored rows.
        replace: make those again that another network made; otherwise they are refused.
        say: prints a line.

    Raises UserError for data sets, networks or settings that cannot be used.
    """
    source = ShardsSource(dataset)
    device = choose_device(config.run.device)
    makers: dict[Kind, Callable[[], Maker]] = {
        "text": lambda: _TextMaker(source, config, device, text_dtype),
        "latents": lambda: _LatentMaker(source, config, device),
    }
    # All are made before the first runs: what a configuration cannot have is refused before hours of work.
    jobs = [CacheJob(source, makers[kind](), rank, world_size, replace, say) for kind in kinds]
    for job in jobs:
        job.run()


class Maker(ABC):
    """Makes the contents of one kind of cache. The network is loaded when the first file is made."""

    kind: Kind
    first: str
    """Name of the tensor that is written in parts."""
    dtype: str
    """Of the stored numbers."""

    def __init__(self, source: ShardsSource, network: Identity) -> None:
        self.source, self.network = source, network
        self.unreadable: list[str] = []
        """Samples that could not be read; training meets them as it would without a cache."""

    @abstractmethod
    def common(self) -> bytes:
        """The file of what is stored once."""

    @abstractmethod
    def shard(self, samples: range, bucket: tuple[int, int], file: GrowingTensorFile) -> None:
        """Write what the network makes of these samples, the whole of one shard."""


class _TextMaker(Maker):
    kind: Kind = "text"
    first = "rows"

    def __init__(self, source: ShardsSource, config: Config, device: torch.device, dtype: TextDtype) -> None:
        text, dim = config.conditioning.text, config.model.context_dim
        compute = getattr(torch, config.precision.compute)
        super().__init__(source, text_identity(text, dim, compute))
        self.dtype = _STORED[dtype]
        self._tower = functools.cache(lambda: open_text_encoder(text, dim, device, compute))

    def common(self) -> bytes:
        ((rows, was_cut),) = self._tower().rows([""])
        return save({"rows": rows.cpu().contiguous(), "cut": torch.tensor([was_cut], dtype=torch.uint8)})

    def shard(self, samples: range, bucket: tuple[int, int], file: GrowingTensorFile) -> None:
        tower = self._tower()
        places: dict[str, int] = {}
        which: dict[str, list[int]] = {"long": [], "short": []}
        for i in samples:
            try:
                captions = self.source.captions(i)
            except UnreadablePicture as problem:
                self.unreadable.append(str(problem))
                which["long"].append(-1)
                which["short"].append(-1)
                continue
            for name, indices in which.items():
                caption = tower.clean(getattr(captions, name))
                indices.append(places.setdefault(caption, len(places)))
        # Captions of about one length go through together, so that little is computed on padding.
        order = sorted(places, key=lambda caption: (len(caption), places[caption]))
        lengths, scales, cuts = [0], [], []
        for first in range(0, len(order), _CAPTIONS):
            found = tower.rows(order[first : first + _CAPTIONS])
            lengths += [len(rows) for rows, _ in found]
            cuts += [was_cut for _, was_cut in found]
            rows = torch.cat([rows for rows, _ in found])
            if self.dtype == "int8":
                rows, scale = quantise(rows)
                scales.append(scale.cpu())
                if not bool(scales[-1].isfinite().all()):
                    raise UserError(
                        f"shard of samples {samples[0]} to {samples[-1]}: the text encoder gives numbers "
                        "that are not finite; keep them as they are with --text-dtype bf16"
                    )
            else:
                rows = rows.bfloat16()
            file.append(rows)
        if not order:
            file.append(torch.empty(0, self.network["dim"], dtype=getattr(torch, self.dtype)))
        place = {places[caption]: i for i, caption in enumerate(order)} | {-1: -1}
        tensors = {name: torch.tensor([place[i] for i in indices]) for name, indices in which.items()}
        tensors["offsets"] = torch.tensor(lengths).cumsum(0)
        tensors["cut"] = torch.tensor(cuts, dtype=torch.uint8)
        if self.dtype == "int8":
            tensors["scale"] = torch.cat([torch.empty(0), *scales])
        file.finish(tensors)


class _LatentMaker(Maker):
    kind: Kind = "latents"
    first = "moments"

    def __init__(self, source: ShardsSource, config: Config, device: torch.device) -> None:
        section = config.conditioning.autoencoder
        without = autoencoder_entry(section.kind).network is None
        if without or section.tuning.enabled:
            reason = f"{section.kind} has no latents" if without else "it is tuned, so they would change"
            raise UserError(f"--cache latents: conditioning.autoencoder: {reason}; cache text alone")
        super().__init__(source, autoencoder_identity(section))
        self.dtype = self.network["dtype"]
        # What a cache of latents is read with (`data.cached`).
        self._config, self._device = config.data.model_copy(update={"crop": "center"}), device
        self._autoencoder = functools.cache(lambda: open_autoencoder(section, device))

    def common(self) -> bytes:
        tensors, numbers = constants_tensors(self._autoencoder().constants)
        return save({name: x.cpu().contiguous() for name, x in tensors.items()}, metadata=numbers)

    def shard(self, samples: range, bucket: tuple[int, int], file: GrowingTensorFile) -> None:
        autoencoder, batch = self._autoencoder(), self._config.micro_batch
        present: list[bool] = []
        with ThreadPoolExecutor(max(1, self._config.workers)) as threads:

            def views(first: int) -> list[Future[Tensor | None]]:
                part = samples[first : first + batch]
                return [threads.submit(self._view, i, bucket) for i in part]

            ahead = views(0)
            for first in range(0, len(samples), batch):
                pictures, ahead = [future.result() for future in ahead], views(first + batch)
                present += [picture is not None for picture in pictures]
                # Nobody reads what stands for a picture that could not be read.
                blank = torch.zeros(3, *bucket, dtype=torch.uint8)
                stack = torch.stack([blank if picture is None else picture for picture in pictures])
                found = autoencoder.posterior(signed_unit(to_device(stack, self._device)))
                file.append(torch.stack([x for x in found if x is not None], dim=1))
        file.finish({"present": torch.tensor(present, dtype=torch.uint8)})

    def _view(self, i: int, bucket: tuple[int, int]) -> Tensor | None:
        """The largest centred crop of a picture at the bucket's size, (3, h, w) uint8."""
        try:
            image, key = self.source.image(i), self.source.key(i)
        except UnreadablePicture as problem:
            self.unreadable.append(str(problem))
            return None
        return cut(image, crop_box(image.width, image.height, bucket, self._config, None, key), bucket)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, E) int8 and (n,) FP32 scale of floating rows (n, E): scale = absmax / 127 of the row.

    scale * int8 is within scale / 2 = absmax / 254 of the row.
    """
    rows = rows.float()
    scale = rows.abs().amax(1) / 127
    steps = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round_()
    return steps.clamp_(-127, 127).to(torch.int8), scale


class _Known(NamedTuple):
    """A file that was finished."""

    network: Identity
    dtype: str
    file: CacheFile


class CacheJob:
    """This process's part of one kind of cache.

    Args:
        source: the data set.
        maker: of the contents.
        rank, world_size: this process takes the shards rank, rank + world_size, ...
        replace: make those again that another network made, or that are stored in another dtype.
        say: prints a line.

    Raises UserError where there are such files and `replace` is off.
    """

    def __init__(
        self,
        source: ShardsSource,
        maker: Maker,
        rank: int,
        world_size: int,
        replace: bool,
        say: Callable[[str], None],
    ) -> None:
        self.root, self.shards, self.maker, self.say = source.root, source.manifest.shards, maker, say
        self.rank, self.mine = rank, list(range(rank, len(self.shards), world_size))
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + shard.samples)
        self.folder = self.root / PARTIAL / maker.kind
        known = self._known()
        if not replace:
            for one in known.values():
                self._require_same(one)
        wanted = ([COMMON] if rank == 0 else []) + self.mine
        self.todo = [number for number in wanted if not self._finished(number, known)]

    def run(self) -> None:
        """Make the files of this process that are not there, and the manifest if then none is missing."""
        kind, maker = self.maker.kind, self.maker
        for number in tqdm(self.todo, f"{kind} cache", unit="file", disable=self.rank != 0, **bar_size()):
            self._make(number)
        if maker.unreadable:
            names = ", ".join(maker.unreadable[:3])
            self.say(f"{kind}: {len(maker.unreadable)} samples could not be read and have none: {names}")
        missing = self._publish()
        made = sum(number != COMMON for number in self.todo)
        done = f"process {self.rank} made {made} of its {len(self.mine)} shards"
        state = f"{missing} files are missing until other processes are done" if missing else "complete"
        self.say(f"{kind} cache of {self.root}: {done}; {state}")

    def _make(self, number: int) -> None:
        path = self.root / self._file(number)
        try:
            with atomic_file(path) as file:
                if number == COMMON:
                    file.write(self.maker.common())
                else:
                    shard = self.shards[number]
                    metadata = {"network": json.dumps(self.maker.network), "of": shard.sha256}
                    samples = range(self.starts[number], self.starts[number + 1])
                    self.maker.shard(
                        samples, shard.bucket, GrowingTensorFile(file, self.maker.first, metadata)
                    )
            found = CacheFile(
                file=self._file(number),
                bytes=path.stat().st_size,
                sha256=sha256_file(path),
                of=self._origin(number),
            )
            values = {"network": self.maker.network, "dtype": self.maker.dtype, "file": found.model_dump()}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._record(number), json.dumps(values))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None

    def _publish(self) -> int:
        """Put the cache into the manifest once all its files are there; how many are missing."""
        with self._alone():
            known = self._known()
            wanted = range(COMMON, len(self.shards))
            missing = sum(not self._finished(number, known) for number in wanted)
            if not missing and self.folder.exists():
                record = CacheRecord(
                    network=self.maker.network,
                    dtype=self.maker.dtype,
                    common=known[COMMON].file,
                    files=tuple(known[number].file for number in range(len(self.shards))),
                )
                manifest = read_manifest(self.root)
                caches = manifest.caches | {self.maker.kind: record.model_dump(mode="json")}
                write_manifest(self.root, manifest.model_copy(update={"caches": caches}))
                shutil.rmtree(self.folder)
                with suppress(OSError):  # another kind is not complete
                    self.folder.parent.rmdir()
        return missing

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process changes the manifest meanwhile."""
        with (self.root / ".caches.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _known(self) -> dict[int, _Known]:
        """All files that were finished, by number: those of the manifest, and of jobs since."""
        found: dict[int, _Known] = {}
        values = read_manifest(self.root).caches.get(self.maker.kind)
        if values is not None:
            record = self._read(self.root / "manifest.json", CacheRecord, values)
            numbers = {self._file(number): number for number in range(COMMON, len(self.shards))}
            for file in (record.common, *record.files):
                if file.file in numbers:
                    found[numbers[file.file]] = _Known(record.network, record.dtype, file)
        for path in sorted(self.folder.glob("*.json")):
            try:
                values = json.loads(path.read_bytes())
                number, one = int(path.stem), _Known(values["network"], values["dtype"], values["file"])
            except FileNotFoundError:
                continue  # another process has just put it into the manifest
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(f"{path}: not what millrace cache writes; remove it") from None
            found[number] = one._replace(file=self._read(path, CacheFile, one.file))
        return found

    @staticmethod
    def _read(path: Path, model: type, values: object) -> object:
        try:
            return model.model_validate(values)
        except ValidationError:
            raise UserError(
                f"{path}: its caches are not what millrace cache writes; remove them there"
            ) from None

    def _finished(self, number: int, known: dict[int, _Known]) -> bool:
        """Whether the file is there, whole, of this network and this shard."""
        one = known.get(number)
        if one is None or self._differs(one) or one.file.of != self._origin(number):
            return False
        path = self.root / one.file.file
        return path.is_file() and path.stat().st_size == one.file.bytes

    def _differs(self, one: _Known) -> list[str]:
        words, dtype = differing(one.network, self.maker.network), self.maker.dtype
        return words + ([] if one.dtype == dtype else [f"stored as {one.dtype}, not {dtype}"])

    def _require_same(self, one: _Known) -> None:
        if words := self._differs(one):
            raise UserError(
                f"{self.root / one.file.file}: there is a {self.maker.kind} cache of another network: "
                f"{'; '.join(words)}; make it again with --replace, or copy the data set"
            )

    def _origin(self, number: int) -> str:
        return "" if number == COMMON else self.shards[number].sha256

    def _file(self, number: int) -> str:
        kind = self.maker.kind
        return common_path(kind) if number == COMMON else cache_path(self.shards[number], kind)

    def _record(self, number: int) -> Path:
        return self.folder / f"{number:08d}.json"
