"""Pins: a checkpoint that a command reads is not pruned by the run that goes on beside it.

    checkpoints/.pin-step-00000100-5f2c...     host, process, since when; removed when the reader is done

A pin of a process that died on this host does not count, nor one from another host that is older than a day.
"""

import json
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from millrace.engine.distributed.run_lock import Owner

_PIN = ".pin-"
_DAY = 24 * 3600.0
_WRITTEN = 60.0
"""Seconds in which a pin is written."""


def pin(folder: Path) -> Path | None:
    """Pin a checkpoint; the file to remove afterwards. None where this user may not write."""
    file = folder.parent / f"{_PIN}{folder.name}-{secrets.token_hex(8)}"
    try:
        file.write_text(json.dumps(asdict(Owner.of_this_process())))
    except OSError:
        return None
    return file


def unpin(file: Path | None) -> None:
    """Remove a pin."""
    if file is not None:
        with suppress(OSError):
            file.unlink()


def pinned_folders(root: Path) -> set[str]:
    """Names of the checkpoints of `root` that a process reads now; pins of dead ones are removed."""
    names = set()
    for file in root.glob(f"{_PIN}*"):
        try:
            owner, age = Owner.read(file.read_text()), time.time() - file.stat().st_mtime
        except OSError:
            continue
        if _counts(owner, age):
            names.add(file.name.removeprefix(_PIN).rpartition("-")[0])
        else:
            unpin(file)
    return names


def _counts(owner: Owner | None, age: float) -> bool:
    if owner is None:
        return age < _WRITTEN
    return owner.is_alive(age) if owner.host == socket.gethostname() else age < _DAY
