"""Owner of a run's folder: one training at a time writes there.

`run.lock` holds the owner's host, process and job, and is locked with flock as long as the owner lives, so
the kernel frees it after kill -9. Some network file systems keep flock on one host; there the text decides:

    owner on this host          alive if the process is, with the same start time
    owner on another host       alive if it renewed the file within SILENCE; a Slurm job that was requeued
                                takes over from its own earlier start at once
"""

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from millrace.engine.util.errors import UserError

NAME = "run.lock"
RENEWAL = 30.0
"""Seconds between two signs of life."""
SILENCE = 600.0
"""Seconds without one after which an owner on another host is taken for dead."""


@dataclass(frozen=True)
class Owner:
    """A process that writes in a folder."""

    host: str
    pid: int
    started: str
    """Boot and clock tick at which it started: a process id alone is used again."""
    since: str
    """Local time, for people."""
    job: str | None = None
    """Slurm's job id."""
    restarts: int = 0
    """How often Slurm had started the job again."""

    @classmethod
    def of_this_process(cls) -> Self:
        pid, now = os.getpid(), datetime.now().astimezone()
        return cls(
            socket.gethostname(), pid, _started(pid) or "", now.isoformat(" ", "seconds"), *_slurm_job()
        )

    @classmethod
    def read(cls, text: str) -> Self | None:
        """None for a file that was cut off while it was written: nobody holds it."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def is_alive(self, silent: float) -> bool:
        """Whether the process still runs, `silent` seconds after its last sign of life."""
        if self.host == socket.gethostname():
            return _started(self.pid) == self.started
        job, restarts = _slurm_job()
        if job is not None and job == self.job and restarts > self.restarts:
            return False
        return silent < SILENCE

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _slurm_job() -> tuple[str | None, int]:
    """Slurm's job id, and how often it has started the job again."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _started(pid: int) -> str | None:
    """Boot id and start time in clock ticks of a process; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


class RunLock:
    """Owns the run in `folder` from construction to `release`, or in a `with` block.

    `taken_over` is a line about an owner that died without releasing the folder, or None.

    Raises UserError if another process owns it, or the lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / NAME
        self.taken_over: str | None = None
        self.owner = Owner.of_this_process()
        self._released = threading.Event()
        try:
            self._file = self._acquire()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be locked: {error.strerror}; grant access there, or choose another "
                "run.output_dir"
            ) from None
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back."""
        self._released.set()
        with suppress(OSError):
            if Owner.read(self.path.read_text()) == self.owner:  # and nobody took it for dead meanwhile
                self.path.unlink()
        os.close(self._file)

    def _acquire(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._claim(file)
                if _is_at(file, self.path):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its owner has just released it, and removed the name

    def _claim(self, file: int) -> None:
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without flock: the text decides
        owner = Owner.read(os.pread(file, 4096, 0).decode(errors="replace"))
        silent = _now_of(self.path) - os.fstat(file).st_mtime
        if not free or (owner is not None and owner.is_alive(silent)):
            raise UserError(_refusal(self.path, owner, silent))
        if owner is not None:
            self.taken_over = f"{self.path.parent}: taken over from {owner}, which ended without a word"
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(self.owner)).encode(), 0)
        os.fsync(file)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            try:
                os.utime(self._file)
            except OSError:
                return


def _is_at(file: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(file)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _now_of(path: Path) -> float:
    """Time by the clock of the file system: hosts' clocks differ."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _refusal(path: Path, owner: Owner | None, silent: float) -> str:
    folder, who = path.parent, owner or "another process"
    if owner is None or owner.host == socket.gethostname():
        return f"{folder}: a run writes here already: {who}; stop it, or choose another run.output_dir"
    return (
        f"{folder}: a run writes here already: {who}, whose last sign of life is {max(silent, 0):.0f} s old. "
        f"This machine cannot see whether it still runs: it counts as dead after {SILENCE:.0f} s, or now if "
        f"you are sure and delete {path}; else choose another run.output_dir"
    )
