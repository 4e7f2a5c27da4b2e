"""Stop requests from outside: signals, a lost launcher, and the files `save` and `stop` in the run's folder.

A signal handler must not save by itself: it would interrupt a collective in one rank and not in others. It
sets a flag; the trainer asks every step, and what one rank was told all ranks obey at the same step boundary.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from millrace.engine.distributed.process_group import gather_objects, rank, world_size


@dataclass(frozen=True)
class Request:
    """What the ranks agreed to do at this step boundary."""

    save: bool
    stop: str | None
    """Why to stop, in words; None to go on."""


class StopRequests:
    """Collects the reasons to save or stop.

    - SIGTERM and SIGINT to this process (schedulers, Ctrl-C). A second SIGINT interrupts at once.
    - The death of any process between this one and the launcher's starter: `deepspeed` does not pass SIGTERM
      on, so its ranks would run on as orphans.
    - A file `save` (checkpoint now) or `stop` (checkpoint and exit) in the run's folder; removed when seen.
    """

    def __init__(self, output_dir: Path) -> None:
        self._reason: str | None = None
        self._ancestors = _launchers()
        self._files = {name: output_dir / name for name in ("save", "stop")}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name

    def poll(self) -> Request:
        """What to do now, the same on every rank. Collective when there are several."""
        reason, save = self._reason, False
        if reason is None and self._ancestors and _launchers()[: len(self._ancestors)] != self._ancestors:
            reason = self._reason = "the launcher is gone"
        if rank() == 0:
            save, stop = (self._take(name) for name in ("save", "stop"))
            if stop and reason is None:
                reason = self._reason = "the file 'stop'"
        if world_size() > 1:
            answers = gather_objects((save, reason))
            save = any(answer[0] for answer in answers)
            reason = next((answer[1] for answer in answers if answer[1]), None)
        return Request(save, reason)

    def _take(self, name: str) -> bool:
        try:
            self._files[name].unlink()
        except FileNotFoundError:
            return False
        return True


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
