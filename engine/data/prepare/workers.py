"""Worker processes for independent tasks, which never outlive the one that started them."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from millrace.engine.util.errors import UserError

Report = Callable[[int, int], None]
"""report(samples, rejects): what was done since the last call."""
_PAUSE = 0.5
"""Seconds between two messages of a worker."""


class Workers:
    """`count` processes; 0 does everything in this one. Use as a context: leaving it ends them soon.

    `report` receives what the tasks report, in this process, while `run` is iterated.
    """

    def __init__(self, count: int, report: Report) -> None:
        self._count, self._report = count, report
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._count:
            # Processes are forked from one that has imported everything and has no threads.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "millrace.engine.data.prepare.shard_packing"])
            self._messages, self._stop = context.Queue(), context.Event()
            self._pool = ProcessPoolExecutor(
                self._count, context, initializer=_begin, initargs=(self._messages, self._stop)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._messages.close()

    def run(self, task: Callable[..., Any], arguments: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
        """(place in `arguments`, result) of `task(*arguments, report)`, in the order of completion.

        An error of a task is raised here. Raises UserError where a process dies.
        """
        if self._pool is None:
            for place, some in enumerate(arguments):
                yield place, task(*some, self._report)
            return
        running: dict[Future, int] = {}
        waiting = enumerate(arguments)
        try:
            while True:
                while len(running) < 2 * self._count and (following := next(waiting, None)):
                    place, some = following
                    running[self._pool.submit(_do, task, some)] = place
                if not running:
                    self._pass_on()
                    return
                done, _ = wait(running, timeout=_PAUSE, return_when=FIRST_COMPLETED)
                self._pass_on()
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for want of memory; run the same command again to go on, "
                "with fewer --workers if it happens again"
            ) from None

    def _pass_on(self) -> None:
        while True:
            try:
                self._report(*self._messages.get_nowait())
            except queue.Empty:
                return


class Stopped(Exception):
    """The main process has left the pool; nobody waits for the result."""


_messages: Any = None
_stop: Any = None


def _begin(messages: Any, stop: Any) -> None:
    """Set up a worker."""
    global _messages, _stop
    _messages, _stop = messages, stop
    messages.cancel_join_thread()  # a last message that nobody reads must not keep a worker alive
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells when to stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed main process cannot tell its workers; they would wait for it forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(task: Callable[..., Any], arguments: tuple) -> Any:
    counts, last = [0, 0], time.monotonic()

    def report(samples: int, rejects: int) -> None:
        nonlocal last
        counts[0] += samples
        counts[1] += rejects
        if time.monotonic() - last >= _PAUSE:
            if _stop.is_set():
                raise Stopped
            send()

    def send() -> None:
        nonlocal last
        _messages.put(tuple(counts))
        counts[:] = 0, 0
        last = time.monotonic()

    result = task(*arguments, report)
    send()
    return result
