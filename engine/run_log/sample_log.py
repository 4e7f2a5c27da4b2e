"""Sample log: the unreadable pictures of a run, and on request the keys of all samples it consumed."""

import fcntl
import json
from pathlib import Path

from millrace.engine.distributed import process_group
from millrace.engine.run_log.side_channels import RecordFile, SideChannels, drop_after

REJECTS = "rejects.jsonl"
KEYS = "keys"


class SampleLog:
    """Files in the run's folder.

    `rejects.jsonl` has a line {"key", "reason"} for each unreadable picture that any process met, once.
    `keys/rank-00000.jsonl` and so on, with `keep_keys`, have a line {"step", "keys"} for each step: what that
    process consumed, in order. The lines of all processes for a step, by rank, are the step's samples.

    Collective to construct: lines after `step` are dropped, to be made again, maybe by fewer processes.
    `channels` takes what cannot be written.
    """

    def __init__(
        self, output: Path, step: int, keep_keys: bool, channels: SideChannels | None = None
    ) -> None:
        self._rejects, self._told = output / REJECTS, 0
        self._channels = channels or SideChannels()
        self._file: RecordFile | None = None
        if keep_keys:
            if process_group.rank() == 0:
                with self._channels.tolerate(KEYS):
                    for path in sorted((output / KEYS).glob("rank-*.jsonl")):
                        drop_after(path, step)
            process_group.wait_for_all()
            self._file = RecordFile(output / KEYS / f"rank-{process_group.rank():05d}.jsonl", step)

    def step(self, step: int, keys: list[str], bad: dict[str, str]) -> None:
        """Tell what this process consumed in a step, and the reasons of all bad pictures so far by key."""
        if self._file is not None:
            with self._channels.tolerate(KEYS):
                self._file.write({"step": step, "keys": keys})
        self.reject(bad)

    def reject(self, bad: dict[str, str]) -> None:
        """Write the bad pictures that are not in the file yet; other processes may do so at the same time."""
        if len(bad) == self._told:
            return
        with self._channels.tolerate(REJECTS):
            with self._rejects.open("a+", errors="replace") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                text = file.read()
                known = {_key_in(line) for line in text.splitlines()}
                new = [
                    {"key": key, "reason": reason} for key, reason in list(bad.items()) if key not in known
                ]
                torn = "\n" if text and not text.endswith("\n") else ""  # by a full disk or a power cut
                file.write(torn + "".join(json.dumps(reject) + "\n" for reject in new))
            self._told = len(bad)

    def close(self) -> None:
        """Nothing is told afterwards."""
        if self._file is not None:
            self._file.close()


def _key_in(line: str) -> str | None:
    """The key of a line of rejects; None of one that is damaged."""
    try:
        return json.loads(line)["key"]
    except (ValueError, TypeError, KeyError):
        return None


def keys_of_steps(output: Path) -> dict[int, list[str]]:
    """The keys of each step of a run, in the order of its samples."""
    found: dict[int, list[str]] = {}
    for path in sorted((output / KEYS).glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["keys"])
    return dict(sorted(found.items()))
