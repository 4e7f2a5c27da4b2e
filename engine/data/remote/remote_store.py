"""Remote store: the files of a data set behind a URL, read by ranges, ahead of need, through a cache on disk.

read ahead ──▶ cached and sound? ──▶ kept in memory until it is read
                  no ──▶ requests, neighbours in one ──▶ sound? ──▶ the same, and into the cache
                                                          no ──▶ once more; then it is the sample's fault

Where the cache can hold the data sets of a run, requests are for whole blocks: what lies around a sample will
be wanted too, and is then on disk. A picture of 256 pixels takes a few hundredths of a request.
"""

import asyncio
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from millrace.engine.config.data import Remote
from millrace.engine.data.formats.byte_store import Span
from millrace.engine.data.remote.range_cache import RangeCache
from millrace.engine.data.remote.remote_files import RemoteFiles
from millrace.engine.util import node_cache
from millrace.engine.util.errors import UserError

log = logging.getLogger(__name__)

GAP = 2**15
"""Bytes between two spans that are read along rather than asked for in two requests."""
LONGEST = 2**22
"""Bytes of a request for several spans."""
AHEAD = 4
"""Samples that are asked for ahead, for each request that may be under way, so that one that fails twice is
there in time."""
BLOCK = 2**20
"""Bytes of a request for a data set that the cache can hold."""
HELD = 0.8
"""Share of the cache's bound that the data sets may have for that, so that nothing is emptied."""
_WRITTEN_AFTER = 0.1
"""Seconds."""
_DISK_THREADS = 2

_Key = tuple[str, int, int]
_expected: dict[Path, dict[str, int]] = {}
"""By folder of a cache, the bytes of the data sets that are read through it."""


class _Wanted:
    """Bytes that are on their way, and how often they will be asked for."""

    def __init__(self) -> None:
        self.data: Future[bytes] = Future()
        self.times = 0


class RemoteStore:
    """The files of a data set below `url`. Raises UserError where no installed package knows its scheme, and
    where the cache's folder that `settings` names cannot be written."""

    is_remote = True

    def __init__(self, url: str, settings: Remote | None = None) -> None:
        settings = settings or Remote()
        self.files = RemoteFiles(url, settings.requests)
        self.root = self.files.url
        self.ahead = AHEAD * settings.requests
        self.cache = _open_cache(settings)
        self.unsound = 0
        """Ranges that came with other bytes than were written."""
        self._wanted: dict[_Key, _Wanted] = {}
        self._lock = threading.Lock()
        # Of the loop alone: what goes to the cache next, and the blocks that are not there yet.
        self._kept: list[tuple[str, int, bytes]] = []
        self._blocks: dict[tuple[str, int], asyncio.Task[bytes]] = {}
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "sample cache")
        kept = "nothing is kept on disk"
        if self.cache is not None:
            kept = (
                f"samples are kept in {self.cache.folder}, which holds {self.cache.used / 1e9:.1f} of "
                f"{self.cache.limit / 1e9:g} GB"
            )
        log.info("%s: %d requests in flight; %s", self.root, settings.requests, kept)

    def where(self, file: str) -> str:
        return self.files.address(file)

    def size(self, file: str) -> int | None:
        return self.files.info(file).get("size")

    def whole(self, file: str) -> bytes:
        return self.files.whole(file)

    def expect(self, size: int) -> None:
        if self.cache is not None:
            _expected.setdefault(self.cache.folder, {})[self.root] = size

    def read(self, span: Span) -> bytes:
        key = span[:3]
        with self._lock:
            wanted = self._wanted.get(key)
            if wanted is not None:
                wanted.times -= 1
                if wanted.times <= 0:
                    del self._wanted[key]
        if wanted is None:
            wanted = _Wanted()
            self._begin([(span, wanted)])
        try:
            return wanted.data.result()
        except OSError as error:
            raise UserError(f"{self.where(span.file)}: cannot be read: {error.strerror}") from None

    def read_ahead(self, spans: Iterable[Span]) -> None:
        new = []
        with self._lock:
            for span in spans:
                wanted = self._wanted.get(span[:3])
                if wanted is None:
                    wanted = self._wanted[span[:3]] = _Wanted()
                    new.append((span, wanted))
                wanted.times += 1
        if new:
            self._disk.submit(self._begin, new)

    def forget(self) -> None:
        with self._lock:
            self._wanted.clear()

    def _begin(self, some: list[tuple[Span, _Wanted]]) -> None:
        """Take what the cache has, and ask for the rest."""
        try:
            missing = []
            for span, wanted in some:
                cached = None
                if self.cache is not None:
                    cached = self.cache.get(span.digest, span.offset, span.size, span.sound)
                if cached is None:
                    missing.append((span, wanted))
                else:
                    wanted.data.set_result(cached)
            if missing:
                self.files.run(self._fetch_all(merged(missing)))
        except BaseException as error:  # whoever waits must hear of it
            for _, wanted in some:
                if not wanted.data.done():
                    wanted.data.set_exception(error)
            raise

    async def _fetch_all(self, groups: list[list[tuple[Span, _Wanted]]]) -> None:
        await asyncio.gather(*map(self._fetch, groups))

    async def _fetch(self, group: list[tuple[Span, _Wanted]]) -> None:
        """One request for spans of one file that lie close to each other."""
        first = group[0][0]
        try:
            start, end = first.offset, max(span.offset + span.size for span, _ in group)
            by_blocks = self._reads_blocks()
            data = await (self._blocks_of if by_blocks else self._range_of)(first, start, end)
            for span, wanted in group:
                piece = data if len(group) == 1 else data[span.offset - start :][: span.size]
                sound, again = span.sound(piece), False
                if not sound:
                    self.unsound += 1
                    piece, again = await self._range_of(span, span.offset, span.offset + span.size), True
                    sound = span.sound(piece)
                wanted.data.set_result(piece)
                if sound and (again or not by_blocks):
                    self._keep(span, span.offset, piece)
        except (Exception, asyncio.CancelledError) as error:
            for _, wanted in group:
                if not wanted.data.done():
                    wanted.data.set_exception(error)

    def _reads_blocks(self) -> bool:
        """Whether what is read besides the samples that are wanted stays on disk until it is."""
        if self.cache is None or self.cache.closed:
            return False
        return sum(_expected.get(self.cache.folder, {}).values()) <= self.cache.limit * HELD

    async def _range_of(self, span: Span, start: int, end: int) -> bytes:
        """Bytes of the file of a span."""
        return await self.files.get(span.file, start, end - start)

    async def _blocks_of(self, span: Span, start: int, end: int) -> bytes:
        """The same, in whole blocks; one that is under way, or not on disk yet, is not asked for again."""
        numbers = range(start // BLOCK, -(-end // BLOCK))
        for number in numbers:
            if (span.file, number) not in self._blocks:
                self._blocks[span.file, number] = asyncio.ensure_future(self._block(span, number))
        whole = await asyncio.gather(*(self._blocks[span.file, number] for number in numbers))
        first = numbers.start * BLOCK
        return b"".join(whole)[start - first : end - first]

    async def _block(self, span: Span, number: int) -> bytes:
        start = number * BLOCK
        try:
            data = await self._range_of(span, start, min(start + BLOCK, span.file_size))
        except BaseException:
            del self._blocks[span.file, number]  # the next who wants it asks again
            raise
        self._keep(span, start, data)
        return data

    def _keep(self, span: Span, offset: int, data: bytes) -> None:
        """Write to the cache soon, with what else comes until then."""
        if self.cache is None:
            return
        if not self._kept:
            asyncio.get_running_loop().call_later(_WRITTEN_AFTER, self._write)
        self._kept.append((span.digest, offset, data))

    def _write(self) -> None:
        kept, self._kept = self._kept, []
        came = [key for key, block in self._blocks.items() if block.done()]
        with suppress(RuntimeError):  # the process ends
            written = asyncio.wrap_future(self._disk.submit(self.cache.put, kept))
            written.add_done_callback(lambda _: [self._blocks.pop(key, None) for key in came])


def merged(spans: list[tuple[Span, _Wanted]]) -> list[list[tuple[Span, _Wanted]]]:
    """Spans in groups that one request serves: of one file, at most GAP apart, together at most LONGEST."""
    groups: list[list[tuple[Span, _Wanted]]] = []
    for item in sorted(spans, key=lambda item: item[0][:3]):
        span = item[0]
        if groups:
            first, before = groups[-1][0][0], groups[-1][-1][0]
            near = span.file == before.file and span.offset - (before.offset + before.size) <= GAP
            if near and span.offset + span.size - first.offset <= LONGEST:
                groups[-1].append(item)
                continue
        groups.append([item])
    return groups


def _open_cache(settings: Remote) -> RangeCache | None:
    """The cache that settings ask for. One in the usual place that cannot be had is done without."""
    if settings.cache_gb == 0:
        return None
    folder = Path(settings.cache_dir) if settings.cache_dir else node_cache.folder() / "samples"
    try:
        return RangeCache(folder, int(settings.cache_gb * 1e9))
    except OSError as error:
        reason = f"{folder}: samples cannot be kept there: {error.strerror or error}"
        if settings.cache_dir:
            raise UserError(
                f"{reason}; set data.remote.cache_dir to a folder on a local disk, or data.remote.cache_gb "
                "to 0"
            ) from None
        log.warning("%s; they are asked for again in every epoch", reason)
        return None
