"""HTTP server of a folder, as far away and as unreliable as asked, for tests and benchmarks.

It answers HEAD and GET, ranges, and listings of folders. Each request waits `latency`; a share of them gets a
status 503, another share a connection that is cut in the middle of the body; chosen bytes are flipped.
"""

import argparse
import asyncio
import json
import random
import threading
import time
import urllib.parse
from collections import Counter
from html import escape
from pathlib import Path
from typing import Self

STATISTICS = "/.statistics"
"""Answered at once, with the counts as JSON, and `cpu_seconds` of the process."""


class FaultyServer:
    """Serves `root` at `url` on this machine while its block runs, in a thread of its own.

    Args:
        latency: seconds before every answer.
        failures: share of requests that get a status 503.
        cuts: share of requests whose connection ends in the middle of the body.
        flips: {(path below root, offset): times}: the byte at `offset` is another in the first answers that
            hold it, as many as `times` says.
        seed: of what is drawn.

    Attributes:
        counts: requests, failed, cut, flipped, bytes, and "busiest": most requests at a time.
    """

    def __init__(
        self,
        root: Path,
        latency: float = 0.0,
        failures: float = 0.0,
        cuts: float = 0.0,
        flips: dict[tuple[str, int], int] | None = None,
        seed: int = 0,
    ) -> None:
        self.root, self.latency, self.failures, self.cuts = root, latency, failures, cuts
        self.flips = dict(flips or {})
        self.counts: Counter[str] = Counter()
        self.down = False
        """Whether every request fails."""
        self.url = ""
        self._random = random.Random(seed)
        self._busy = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def wait(self) -> None:
        """Serve until the process is killed."""
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._talk, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split()
                fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                if not await self._answer(writer, method, urllib.parse.unquote(target), fields.get("range")):
                    return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, wanted: str | None) -> bool:
        """Whether the connection goes on."""
        if path == STATISTICS:
            said = self.counts | {"cpu_seconds": time.process_time()}
            _send(writer, method, 200, json.dumps(said).encode())
            return True
        self.counts["requests"] += 1
        self._busy += 1
        self.counts["busiest"] = max(self.counts["busiest"], self._busy)
        await asyncio.sleep(self.latency)
        self._busy -= 1
        if self.down or self._random.random() < self.failures:
            self.counts["failed"] += 1
            _send(writer, method, 503, b"try again")
            return True
        file = self.root / path.strip("/")
        if file.is_dir():
            names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in file.iterdir())
            links = "".join(f'<a href="{urllib.parse.quote(name)}">{escape(name)}</a>\n' for name in names)
            _send(writer, method, 200, links.encode(), "Content-Type: text/html")
            return True
        if not file.is_file():
            _send(writer, method, 404, b"not here")
            return True
        size, status = file.stat().st_size, 200
        start, end = 0, size
        extra = f'ETag: "{file.stat().st_mtime_ns}-{size}"\r\nAccept-Ranges: bytes'
        if wanted is not None and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else size, size)
            status = 206
            extra += f"\r\nContent-Range: bytes {start}-{end - 1}/{size}"
            if start >= size:
                _send(writer, method, 416, b"")
                return True
        if method == "HEAD":
            _send(writer, method, status, b"", extra, end - start)
            return True
        with file.open("rb") as opened:
            opened.seek(start)
            data = self._flipped(path.strip("/"), start, opened.read(end - start))
        self.counts["bytes"] += len(data)
        if self._random.random() < self.cuts:
            self.counts["cut"] += 1
            _send(writer, method, status, data[: len(data) // 2], extra, len(data))
            return False
        _send(writer, method, status, data, extra)
        return True

    def _flipped(self, path: str, start: int, data: bytes) -> bytes:
        for (file, offset), times in self.flips.items():
            if file == path and start <= offset < start + len(data) and times > 0:
                self.flips[file, offset] -= 1
                self.counts["flipped"] += 1
                changed = bytearray(data)
                changed[offset - start] ^= 0xFF
                data = bytes(changed)
        return data


def _send(
    writer: asyncio.StreamWriter,
    method: str,
    status: int,
    body: bytes,
    extra: str = "X: x",
    length: int | None = None,
) -> None:
    head = f"HTTP/1.1 {status} status\r\nContent-Length: {len(body) if length is None else length}\r\n{extra}"
    writer.write(f"{head}\r\n\r\n".encode() + (b"" if method == "HEAD" else body))


def main() -> None:
    """Serve a folder until killed, in a process of its own; its first line is the URL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--failures", type=float, default=0.0)
    parser.add_argument("--cuts", type=float, default=0.0)
    parser.add_argument("--flip", action="append", default=[], metavar="PATH:OFFSET")
    arguments = parser.parse_args()
    flips = {(path, int(offset)): 1 for path, _, offset in (flip.rpartition(":") for flip in arguments.flip)}
    with FaultyServer(arguments.root, arguments.latency, arguments.failures, arguments.cuts, flips) as server:
        print(server.url, flush=True)
        server.wait()


if __name__ == "__main__":
    main()
