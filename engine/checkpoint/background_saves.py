"""Background saves: training waits for a copy of its state in host memory, not for the disk.

    training   ── copy ─▶ step ─▶ step ─▶ ... ─▶ step ──── finish ──▶
    a thread        └──▶ digest, write, agree, publish ──▶┘

The thread runs the protocol of `checkpoints.py` as it stands, so a run that is killed at any moment leaves
what a save that training waits for leaves. Ranks agree in a process group of the threads' own. One save is on
its way at a time, and there is one copy: a save that comes before the last one is published waits for it.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.engine.checkpoint.checkpoints import Gather, Piece, save_checkpoint
from millrace.engine.checkpoint.damage import BadElements
from millrace.engine.distributed import process_group
from millrace.engine.util.host_memory import available_memory

log = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Of each tensor in the copy, in bytes."""
_SHARE = 0.7
"""Of the free host memory that the copies may take: loaders and the page cache want the rest."""


class BackgroundSaves:
    """The saves of a run, one after the other.

    Args:
        folder: of the checkpoints.
        keep: as `save_checkpoint` takes it.
        blocking: write while training waits, without a copy.
    """

    def __init__(self, folder: Path, keep: int, blocking: bool) -> None:
        self._folder, self._keep, self.blocking = folder, keep, blocking
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcome: Path | BaseException | None = None
        self.step: int | None = None
        """Step of the save that was begun and is not finished; None if there is none."""

    def begin(
        self, step: int, pieces: Iterable[Piece], meta: dict[str, Any], bad: Mapping[str, BadElements]
    ) -> None:
        """Take the state as it is now; arguments as of `save_checkpoint`. Collective, after `finish`."""
        if self.step is not None:
            raise RuntimeError(f"the save of step {self.step} is not finished")
        self.step, self._outcome = step, None
        if self.blocking:
            self._save(process_group.gather_objects, step, pieces, meta, bad)
            return
        held = self._copy.take(pieces)
        # A daemon: who interrupts the run does not wait for its disk.
        self._thread = threading.Thread(
            target=self._save,
            args=(process_group.gather_apart, step, held, meta, bad),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def _save(
        self,
        gather: Gather,
        step: int,
        pieces: Iterable[Piece],
        meta: dict[str, Any],
        bad: Mapping[str, BadElements],
    ) -> None:
        try:
            self._copy.wait()
            self._outcome = save_checkpoint(
                self._folder,
                step,
                pieces,
                meta,
                keep=self._keep,
                bad=bad,
                rank=process_group.rank(),
                world_size=process_group.world_size(),
                gather=gather,
            )
        except BaseException as error:
            self._outcome = error

    @property
    def ended(self) -> bool:
        """Whether the save that was begun has ended on this rank; the others end at about the same time."""
        return self.step is not None and self._outcome is not None

    def finish(self) -> Path:
        """Wait for the save that was begun: its folder, or what `save_checkpoint` raised, on every rank."""
        if self._thread is not None:
            self._thread.join()
        self._thread, self.step, outcome = None, None, self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self, say: Callable[[str], None]) -> None:
        """Wait for what was begun, and let go of the memory; `say` shows a line. What goes wrong is a
        warning, since the run ends for another reason."""
        if self.step is not None:
            step = self.step
            try:
                say(f"saved {self.finish()}")
            except Exception as error:
                say(f"warning: the checkpoint of step {step} was not written: {error}")
        self._copy.free()


class HostCopy:
    """Pieces in one buffer of host memory, kept from save to save; page-locked where they come from a GPU."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._locked = False
        self._copied: torch.cuda.Event | None = None

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The same pieces in the buffer, in place of those before. From a GPU the copies are queued on the
        current stream, in order with the steps before and after; read them after `wait`."""
        pieces = list(pieces)
        places, size = [], 0
        for piece in pieces:
            places.append(size)
            size += -(-piece.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(piece.data.is_cuda for piece in pieces)
        if self._buffer is None or self._buffer.numel() < size:
            self.free()
            self._buffer = torch.empty(size, dtype=torch.uint8)
            self._locked = on_gpu and _lock(self._buffer)
        held = []
        for piece, place in zip(pieces, places, strict=True):
            data = self._buffer[place : place + piece.data.nbytes].view(piece.data.dtype)
            data.copy_(piece.data, non_blocking=True)
            held.append(Piece(piece.name, piece.shape, piece.start, data))
        self._copied = torch.cuda.current_stream().record_event() if on_gpu else None
        return held

    def wait(self) -> None:
        """Until the pieces taken last are in the buffer."""
        if self._copied is not None:
            self._copied.synchronize()

    def free(self) -> None:
        """Give the memory back."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._locked = None, False


def _lock(buffer: Tensor) -> bool:
    """Page-lock memory, at its exact size: torch's own allocator takes the next power of two."""
    failed = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if failed:
        log.warning(
            "warning: %.1f GB of host memory for checkpoints cannot be page-locked (CUDA error %d): copies "
            "to it are slow; look at the memory limit of the job",
            buffer.numel() / 1e9,
            failed,
        )
    return not failed


def room_for_copies(need: int) -> list[str]:
    """A line where this machine, or another of the job, has no room for copies of `need` bytes from each of
    its processes. Collective."""
    here = process_group.ranks_here()
    free = available_memory()
    answers = process_group.gather_objects((need * here, free, socket.gethostname()))
    for needed, found, host in answers:
        if needed > _SHARE * found:
            return [
                f"warning: training waits while a checkpoint is written: the copies of the state would take "
                f"{needed / 1e9:.1f} GB of host memory on {host}, {found / 1e9:.1f} GB are free"
            ]
    return []
