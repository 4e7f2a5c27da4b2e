"""Remote files: ranges of what lies behind a URL, asked of fsspec, and asked again when a request fails.

    s3:// s3fs    gs:// gcsfs    hf:// huggingface_hub    https:// http:// aiohttp    memory:// file:// fsspec

Credentials, proxies and endpoints are the affair of those packages and of their environment variables.
Requests run in fsspec's event loop, or in threads for packages that know none; any thread may wait for them.
"""

import asyncio
import errno
import random
import time
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

from millrace.engine.util.errors import UserError

DELAYS = (0.05, 0.1, 0.3, 1.0, 4.0, 15.0)
"""Seconds before the second and later attempts, each times a random number from 0.5 to 1.5, so that processes
that failed together do not come back together."""
ATTEMPTS = len(DELAYS) + 1
TIMEOUT = 30.0
"""Seconds of one attempt, besides those that its bytes take at SLOWEST."""
SLOWEST = 2**18
"""Bytes a second of a connection that is waited for."""
_WHOLE = 2**24
"""Bytes of a file that is read as a whole, by which its time is reckoned."""
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
_MAY_PASS = {408, 425, 429}
"""Of the HTTP statuses that blame the request, those that ask for another attempt."""
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
)


class RemoteFiles:
    """Files below a URL, or the one that it names. Any thread may ask.

    Args:
        url: with a scheme; a slash at its end is dropped.
        requests: that are under way at a time.

    Raises UserError for a scheme that no installed package knows. A request that fails for good raises
    OSError where the store says that there is no such file or that it may not be read, and UserError after
    ATTEMPTS attempts, which names URL and reason.
    """

    def __init__(self, url: str, requests: int) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = _open(self.url)
        self._root = self._root.rstrip("/")
        self._slots = asyncio.Semaphore(requests)
        self._random = random.Random()  # not Python's own, whose state belongs to the run
        self.again = 0
        """Requests that were repeated."""
        if self._files.async_impl:
            self._loop, self._threads = self._files.loop, None
        else:
            from fsspec.asyn import get_loop

            self._loop, self._threads = get_loop(), ThreadPoolExecutor(requests, "requests")

    def address(self, file: str) -> str:
        """URL of a file; of the URL itself for "". For messages too."""
        return f"{self.url}/{file}" if file else self.url

    def run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Begin `work` in the loop that `get` runs in."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def read(self, file: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`."""
        return self.run(self.get(file, offset, size)).result()

    def whole(self, file: str) -> bytes:
        """All bytes of a file."""
        return self.run(self._retried(file, _WHOLE, lambda: self._ask("cat_file", self._path(file)))).result()

    def info(self, file: str) -> dict[str, Any]:
        """What the store says of a file: `size`, which may be None, and whatever else it keeps."""
        return self.run(self._retried(file, 0, lambda: self._ask("info", self._path(file)))).result()

    def listing(self) -> list[str]:
        """Paths below the URL of all files there, sorted."""
        return self.run(self._walk()).result()

    async def _walk(self) -> list[str]:
        # Folder by folder: fsspec's `find` would begin anew whenever one request of thousands fails.
        root = self._files._strip_protocol(self._root).rstrip("/")
        found, seen, level = set(), {""}, [""]
        while level:
            pages = await asyncio.gather(*map(self._entries, level))
            level = []
            for entry in chain(*pages):
                path = self._files._strip_protocol(entry["name"]).rstrip("/")
                name = path.removeprefix(f"{root}/")
                if name == path or name in seen:  # elsewhere, or the folder itself
                    continue
                seen.add(name)
                if entry["type"] == "directory":
                    level.append(name)
                else:
                    found.add(name)
        return sorted(found)

    async def _entries(self, folder: str) -> list[dict[str, Any]]:
        return await self._retried(folder, _WHOLE, lambda: self._ask("ls", self._path(folder), detail=True))

    async def get(self, file: str, offset: int, size: int) -> bytes:
        """As `read`, in the loop."""

        async def attempt() -> bytes:
            data = await self._ask("cat_file", self._path(file), start=offset, end=offset + size)
            if len(data) > size:
                raise ValueError(
                    f"asked for {size} bytes it gives {len(data)}: the server does not know ranges"
                )
            if len(data) < size:
                raise EOFError(f"gives {len(data)} of {size} bytes from {offset}")
            return data

        return await self._retried(file, size, attempt)

    async def _retried(self, file: str, size: int, attempt: Any) -> Any:
        start = time.monotonic()
        for number, delay in enumerate((*DELAYS, None), 1):
            try:
                async with self._slots:
                    return await asyncio.wait_for(attempt(), TIMEOUT + size / SLOWEST)
            except Exception as caught:
                error = _unwrapped(caught)
                lasting = _as_error(error, self.address(file))
                if lasting is not None:
                    raise lasting from None
                if delay is None:
                    raise UserError(
                        f"{self.address(file)}: cannot be read: {_reason(error)} ({number} attempts in "
                        f"{time.monotonic() - start:.0f} s); see that the store can be reached, then go on"
                    ) from None
                self.again += 1
                await asyncio.sleep(delay * self._random.uniform(0.5, 1.5))

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        if self._threads is None:
            return await getattr(self._files, f"_{method}")(*args, **options)
        call = partial(getattr(self._files, method), *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}" if file else self._root


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and its path there. Raises UserError."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme, scheme)
        raise UserError(
            f"{url}: {scheme}:// needs a package that is not installed ({_reason(error)}): pip install "
            f"fsspec {package} (the extra `remote` has the usual ones)"
        ) from None
    except Exception as error:
        raise UserError(f"{url}: {_reason(error)}; correct the URL") from None


def _unwrapped(error: Exception) -> Exception:
    """What became of a request to a web server: fsspec calls the file missing whatever that was."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if hidden and isinstance(cause, Exception) else error


def _as_error(error: Exception, address: str) -> Exception | None:
    """What to raise for an error that will not pass; None for one that may."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "the store has no such file", address)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"the store refuses it ({_reason(error)})", address)
    if "Credential" in type(error).__name__:
        return PermissionError(errno.EACCES, _reason(error), address)
    lasting = isinstance(error, _PERMANENT) or (400 <= status < 500 and status not in _MAY_PASS)
    return UserError(f"{address}: cannot be read: {_reason(error)}") if lasting else None


def _status(error: Exception) -> int:
    """HTTP status of an error of any of the packages; 0 where it has none."""
    response = getattr(error, "response", None)
    for value in (
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
    ):
        if isinstance(value, int):
            return value
    return 0


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError) and not str(error):
        return "no answer in time"
    status, message = _status(error), getattr(error, "message", None)
    if status and isinstance(message, str):  # aiohttp's text has the URL once more
        return f"HTTP {status} {message}".strip()
    return " ".join(str(error).split())[:200] or type(error).__name__
