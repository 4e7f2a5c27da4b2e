"""Remote store: the files of a data set behind a URL, read by ranges, ahead of need, through a cache on disk.

read ahead ──▶ cached and sound? ──▶ kept in memory until it is read
                  no ──▶ requests, neighbours in one ──▶ sound? ──▶ the same, and into the cache
                                                          no ──▶ once more; then it is the sample's fault
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
_WRITTEN_AFTER = 0.1
"""Seconds."""
_DISK_THREADS = 2

_Key = tuple[str, int, int]


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
        self._kept: list[tuple[str, int, bytes]] = []  # of the loop alone: what goes to the cache next
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
            data = await self.files.get(first.file, start, end - start)
            for span, wanted in group:
                piece = data if len(group) == 1 else data[span.offset - start :][: span.size]
                sound = span.sound(piece)
                if not sound:
                    self.unsound += 1
                    piece = await self.files.get(span.file, span.offset, span.size)
                    sound = span.sound(piece)
                wanted.data.set_result(piece)
                if sound and self.cache is not None:
                    self._keep(span, piece)
        except (Exception, asyncio.CancelledError) as error:
            for _, wanted in group:
                if not wanted.data.done():
                    wanted.data.set_exception(error)

    def _keep(self, span: Span, data: bytes) -> None:
        """Write to the cache soon, with what else comes until then."""
        if not self._kept:
            asyncio.get_running_loop().call_later(_WRITTEN_AFTER, self._write)
        self._kept.append((span.digest, span.offset, data))

    def _write(self) -> None:
        kept, self._kept = self._kept, []
        with suppress(RuntimeError):  # the process ends
            self._disk.submit(self.cache.put, kept)


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
