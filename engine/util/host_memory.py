"""Host memory that a process can still have: what the machine has free, and what its control group allows."""

from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes, on Linux. A container's limit is that of its control group (version 2) or of one above it."""
    found = [_available_on_machine()]
    inside = _GROUPS / _own_group()
    for folder in (inside, *inside.parents):
        if folder.is_relative_to(_GROUPS):
            found += _left(folder)
    return min(found)


def _own_group() -> str:
    """Path of this process's control group below their root; the root where it cannot be known."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return next(line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::"))
    return ""


def _available_on_machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _left(group: Path) -> list[int]:
    """Bytes until the limit of a control group, not counting pages of files, which it would give up."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    reclaimable = int(pages.get("inactive_file", 0)) + int(pages.get("active_file", 0))
    return [] if limit == "max" else [max(int(limit) - used + reclaimable, 0)]
