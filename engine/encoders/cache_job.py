"""Which files of a cache there are, who makes the others, and when the manifest names them.

    rank r makes those of shards r, r + world_size, ...: each appears whole or not at all, then
    DATASET/caches.partial/text/00000012.json says what it is
    all there ──▶ manifest, by whichever process finds the last one

Processes do not talk to each other, so none waits for another. A job that was interrupted goes on with the
shards that have no file yet, on any number of processes.
"""

import fcntl
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from tqdm import tqdm

from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.formats.shard_writer import (
    replacing,
    write_manifest,
    write_whole,
)
from millrace.engine.data.latent_cache import (
    CacheFile,
    CacheRecord,
    Kind,
    TensorFile,
    cache_path,
    common_path,
)
from millrace.engine.data.sources.shards import (
    ShardsSource,
    sha256_of,
)
from millrace.engine.encoders.identity import (
    Identity,
    differing,
)
from millrace.engine.util.errors import UserError

COMMON = -1
"""In place of a shard's number: the file of what is stored once."""
PARTIAL = "caches.partial"
"""Folder in the data set of what is known of caches that are not complete."""


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
    def shard(self, samples: range, bucket: tuple[int, int], file: TensorFile) -> None:
        """Write what the network makes of these samples, the whole of one shard."""


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
        for number in tqdm(self.todo, f"{kind} cache", unit="file", disable=self.rank != 0):
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
            with replacing(path) as file:
                if number == COMMON:
                    file.write(self.maker.common())
                else:
                    shard = self.shards[number]
                    metadata = {"network": json.dumps(self.maker.network), "of": shard.sha256}
                    samples = range(self.starts[number], self.starts[number + 1])
                    self.maker.shard(samples, shard.bucket, TensorFile(file, self.maker.first, metadata))
            found = CacheFile(
                file=self._file(number),
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
                of=self._origin(number),
            )
            values = {"network": self.maker.network, "dtype": self.maker.dtype, "file": found.model_dump()}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._record(number), json.dumps(values).encode())
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
                raise UserError(f"{path}: not what prepare.py writes; remove it") from None
            found[number] = one._replace(file=self._read(path, CacheFile, one.file))
        return found

    @staticmethod
    def _read(path: Path, model: type, values: object) -> object:
        try:
            return model.model_validate(values)
        except ValidationError:
            raise UserError(f"{path}: its caches are not what prepare.py writes; remove them there") from None

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
