"""Sample log: the unreadable pictures of a run, and on request the keys of all samples it consumed."""

import fcntl
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import BinaryIO

from millrace.engine.distributed import process_group
from millrace.engine.run_log.side_channels import RecordFile, SideChannels, drop_after

REJECTS = "rejects.jsonl"
KEYS = "keys"


class SampleLog:
    """Files in the run's folder.

    `rejects.jsonl` has a line {"key", "reason"} for each unreadable picture that any process met, once.
    `keys/rank-00000.jsonl` and so on, with `keep_keys`, have a line {"step", "keys", "captions"} for each
    step: what that process consumed, in order, and with which caption (long, short or empty). The lines of
    all processes for a step are the step's samples, by rank in their order unless sizes are mixed.

    Lines after `step` are dropped, to be made again, maybe by fewer processes: rank r cuts the files of the
    ranks r, r + W, r + 2 W of the process before.
    `channels` takes what cannot be written.
    """

    def __init__(
        self, output: Path, step: int, keep_keys: bool, channels: SideChannels | None = None
    ) -> None:
        self._rejects, self._told = output / REJECTS, 0
        self._read, self._known = 0, set[int]()
        self._channels = channels or SideChannels()
        self._file: RecordFile | None = None
        if keep_keys:
            rank, world_size = process_group.rank(), process_group.world_size()
            with self._channels.tolerate(KEYS):
                for path in sorted((output / KEYS).glob("rank-*.jsonl")):
                    number = path.stem.removeprefix("rank-")
                    if number.isdecimal() and int(number) % world_size == rank:
                        drop_after(path, step)
            self._file = RecordFile(output / KEYS / f"rank-{rank:05d}.jsonl", step)

    def step(self, step: int, keys: list[str], captions: list[str], bad: dict[str, str]) -> None:
        """Tell what this process consumed in a step, with which captions, and the reasons of all bad pictures
        so far by key."""
        if self._file is not None:
            with self._channels.tolerate(KEYS):
                self._file.write({"step": step, "keys": keys, "captions": captions})
        self.reject(bad)

    def reject(self, bad: dict[str, str]) -> None:
        """Write the bad pictures that are not in the file yet; other processes may do so at the same time."""
        if len(bad) == self._told:
            return
        with self._channels.tolerate(REJECTS):
            latest = itertools.islice(reversed(bad.items()), len(bad) - self._told)
            with self._rejects.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                torn = self._read_more(file)
                new = [
                    (key, reason) for key, reason in reversed([*latest]) if _digest(key) not in self._known
                ]
                lines = "".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in new)
                file.write(torn + lines.encode())
            self._told = len(bad)

    def _read_more(self, file: BinaryIO) -> bytes:
        """Note the keys of the lines that were added since the last call; the end of line that is lacking."""
        if file.seek(0, os.SEEK_END) < self._read:  # somebody has begun the file anew
            self._read, self._known = 0, set()
        file.seek(self._read)
        for line in file:
            if not line.endswith(b"\n"):  # by a full disk or a power cut
                return b"\n"
            self._read += len(line)
            if (key := _key_in(line)) is not None:
                self._known.add(_digest(key))
        return b""

    def close(self) -> None:
        """Nothing is told afterwards."""
        if self._file is not None:
            self._file.close()


def _digest(key: str) -> int:
    """64 bits that stand for a key: a set of them is small, and two of a million keys are equal once in 30
    million sets."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest())


def _key_in(line: bytes) -> str | None:
    """The key of a line of rejects; None of one that is damaged."""
    try:
        key = json.loads(line)["key"]
        return key if isinstance(key, str) else None
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
