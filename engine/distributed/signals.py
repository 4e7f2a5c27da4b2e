"""Stop requests from outside: signals, a lost launcher, and the files `save` and `stop` in the run's folder.

A signal handler must not save by itself: it would interrupt a collective in one rank and not in others. It
sets a flag; the trainer asks every step, and what one rank was told all ranks obey at the same step boundary.

    step k   │ ... norm read by the host │ poll k: MAX of one integer, begun ─┐
    step k+1 │ ... norm read by the host │ poll k + 1: begun; poll k is read ◀┘ ─▶ not 0: reasons are gathered

The integer (1 if there is something to say) is reduced on the training group, so on the device that trains,
in the order of its other collectives. A poll is read one step after it began, on all ranks alike: by then the
device has passed it, since the host has waited for the norm of the step after, and reading costs no wait of
its own. Words travel only when the integer is not 0.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from millrace.engine.distributed.process_group import gather_objects, rank, training_group, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Save and exit: schedulers, Ctrl-C, a lost terminal, and Slurm's `--signal=USR1@seconds`."""
INSISTING = (signal.SIGTERM, signal.SIGINT)
"""The second of these interrupts at once, and saves nothing."""
REPEAT_SECONDS = 2.0
"""A signal that comes again so soon is the same one: a launcher passes on what its group received too. Ctrl-C
without a launcher comes from a person, who means each."""
DATA_SECONDS = 10.0
"""How long a loader may wait for data after a stop request before the step is given up."""
LOOK_SECONDS = 1.0
"""Between two looks at the files and at the launcher: the folder may lie on a busy file system."""

_STOP_KEY = "stop"


class DataNeverCame(BaseException):
    """A stop was requested, and the loader still waits for data. Raised in the main thread's wait."""


@dataclass(frozen=True)
class Request:
    """What the ranks agreed to do at this step boundary."""

    save: bool
    stop: str | None
    """Why to stop, in words; None to go on."""
    saved: bool = False
    """A save that was begun has ended."""


class StopRequests:
    """Collects the reasons to save or stop, over all stages of a run; hears signals once it is entered.

    - SIGTERM, SIGINT, SIGHUP and SIGUSR1 to this process. A second SIGTERM or SIGINT raises
      KeyboardInterrupt; one after SIGHUP or SIGUSR1 is the first.
    - The death of any process between this one and the launcher's starter: `deepspeed` does not pass SIGTERM
      on, so its ranks would run on as orphans.
    - A file `save` (checkpoint now) or `stop` (checkpoint and exit) in the run's folder; removed when seen.
    """

    def __init__(self, output_dir: Path) -> None:
        self._reason: str | None = None
        self._insisted: float | None = None
        self._asked_at = 0.0
        self._save = self._told = False
        self._waiting: float | None = None
        self._looked = -LOOK_SECONDS
        self._ancestors = _launchers()
        self._files = {name: output_dir / name for name in ("save", "stop")}
        self._pending: _Poll | None = None

    def __enter__(self) -> Self:
        """Listen to signals; they are held back from here on, also after the block: the last save is due."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, self._handle)
        signal.signal(signal.SIGALRM, self._alarm)
        return self

    def __exit__(self, *_error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def reason(self) -> str | None:
        """Why this rank was asked to stop; None if it was not."""
        return self._reason

    def tell(self, reason: str) -> None:
        """Ask for a stop from any thread of this process."""
        if self._reason is None:
            self._reason, self._asked_at = reason, time.monotonic()
            os.kill(os.getpid(), signal.SIGALRM)  # wakes the main thread, whatever it waits for

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in INSISTING:
            typed = number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", "1")) == 1
            if self._insisted is not None and (typed or now - self._insisted >= REPEAT_SECONDS):
                signal.signal(number, signal.SIG_DFL)
                raise KeyboardInterrupt
            self._insisted = now if self._insisted is None else self._insisted
        if self._reason is None:
            self._reason, self._asked_at = signal.Signals(number).name, now
            signal.setitimer(signal.ITIMER_REAL, DATA_SECONDS)

    def _alarm(self, _number: int, _frame: FrameType | None) -> None:
        """While a stop is due: raise if the loader has waited too long since, else look again later."""
        since = None if self._waiting is None else time.monotonic() - max(self._waiting, self._asked_at)
        if since is not None and since >= DATA_SECONDS:
            self._waiting = None
            raise DataNeverCame
        signal.setitimer(signal.ITIMER_REAL, max(DATA_SECONDS - (since or 0.0), 0.01))

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """In this block DataNeverCame may be raised, DATA_SECONDS after its begin and a request to stop."""
        self._waiting = time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def while_stalled(self, store: dist.Store | None) -> None:
        """Tell and learn of a stop where no step ends, from another thread: the launcher is gone, or another
        rank was asked. Through the job's `store`, since collectives stand still."""
        if self._reason is None and self._launcher_is_gone():
            self.tell("the launcher is gone")
        if store is None:
            return
        if self._reason is not None and not self._told:
            self._told = True
            store.set(_STOP_KEY, self._reason)
        elif self._reason is None and store.check([_STOP_KEY]):
            self._told = True
            self.tell(store.get(_STOP_KEY).decode())

    def _launcher_is_gone(self) -> bool:
        return bool(self._ancestors) and _launchers()[: len(self._ancestors)] != self._ancestors

    def poll(self, now: bool = False, saved: bool = False) -> Request:
        """What to do at this step boundary, the same on every rank. Collective when there are several.

        Args:
            now: read this poll instead of the one before, which waits for the other ranks and the device: for
                boundaries that have no step after them.
            saved: whether a save that was begun has ended here.
        """
        self._look()
        code = int(bool(self._reason) or self._save or saved)
        if world_size() > 1:
            before, self._pending = self._pending, _Poll(code)
            if now:
                before, self._pending = self._pending, None
            code = 0 if before is None else before.result()
        if code == 0:
            return Request(False, None)
        answers = gather_objects((self._save, self._reason, saved))
        self._save, self._pending = False, None
        saves, reasons, ended = zip(*answers, strict=True)
        return Request(any(saves), next((reason for reason in reasons if reason), None), any(ended))

    def _look(self) -> None:
        """Note the files, and a launcher that is gone."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        if self._reason is None and self._launcher_is_gone():
            self._reason = "the launcher is gone"
        if rank() == 0:
            self._save |= self._take("save")
            if self._take("stop") and self._reason is None:
                self._reason = "the file 'stop'"
        self._looked = time.monotonic()

    def _take(self, name: str) -> bool:
        try:
            self._files[name].unlink()
        except FileNotFoundError:
            return False
        return True


class _Poll:
    """The maximum over ranks of one integer, on its way."""

    def __init__(self, code: int) -> None:
        group = training_group()
        on_gpu = dist.get_backend(group) == dist.Backend.NCCL
        if not on_gpu:
            self._code = torch.tensor([code], dtype=torch.int32)
            self._work = dist.all_reduce(self._code, dist.ReduceOp.MAX, group=group, async_op=True)
            return
        # On a stream of its own: the step's stream waits for neither the reduction nor the copy.
        stream = _side_stream()
        with torch.cuda.stream(stream):
            shared = torch.full((1,), code, dtype=torch.int32, device=stream.device)
            self._work = None
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=group, async_op=True).wait()
            self._code = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self._code.copy_(shared, non_blocking=True)
            self._copied = stream.record_event()

    def result(self) -> int:
        """The maximum; waits until it is on the host."""
        if self._work is not None:
            self._work.wait()
        else:
            self._copied.synchronize()
        return int(self._code[0])


_side: list[torch.cuda.Stream] = []


def _side_stream() -> torch.cuda.Stream:
    if not _side:
        _side.append(torch.cuda.Stream())
    return _side[0]


def _launchers() -> list[int]:
    """Process ids of the DeepSpeed launcher and runner above this process, nearest first."""
    found, process = [], os.getppid()
    while process > 1:
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            break
        names = {os.path.basename(part) for part in command.split(b"\0")[:5]}
        if not names & {b"deepspeed", b"deepspeed.launcher.launch", b"deepspeed.launcher.runner"}:
            break
        found.append(process)
        process = int(status.rpartition(")")[2].split()[1])
    return found
