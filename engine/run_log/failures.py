"""Crash loops: a run that fails again and again at one step in one way is not started once more.

`failure.json` in the run's folder has how it failed last: where, error, with which configuration, and how
often in a row. A run that ends well removes it; another place, error or configuration counts anew. A process
that was killed could not say anything: the next one finds its lock, and counts that it died behind the newest
checkpoint. A new checkpoint counts anew, so a run that is pre-empted without warning goes on.
"""

import json
import re
from contextlib import suppress
from pathlib import Path

from millrace.engine.util.errors import FailedElsewhere, UserError
from millrace.engine.util.files import write_atomically

NAME = "failure.json"
START = "while it started"
TIMES = 3
"""Equal failures in a row, after which the run is not tried again."""
DIED = "it died without a word: killed, or out of host memory"
DEATHS = 5
"""The same for deaths, which may have causes of their own each time."""


class Failures:
    """The record in one run's folder, as it was when this attempt began.

    Args:
        config: digest of the configuration.
    """

    def __init__(self, output_dir: Path, config: str) -> None:
        self.path, self.config = output_dir / NAME, config
        self.last: dict = {}
        with suppress(OSError, ValueError):
            self.last = dict(json.loads(self.path.read_text()))

    def refuse_loop(self) -> None:
        """Raise UserError if the last TIMES attempts failed at one step in one way, or DEATHS died."""
        most = DEATHS if self.last.get("error") == DIED else TIMES
        if self.last.get("times", 0) >= most and self.last.get("config") == self.config:
            raise UserError(
                f"{self.path.parent}: {self.last['times']} starts in a row failed {self.last['where']} in "
                f"the same way ({self.last['error']}); mend that, then delete {self.path}"
            )

    def note(self, where: str, error: Exception) -> None:
        """The run failed `where`. The first rank to say so counts: the others fail by it."""
        if where == START and isinstance(error, UserError):
            return  # somebody looks at that
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if isinstance(error, FailedElsewhere) or self._noted():
            return
        self._count(where, text)

    def note_death(self, saved: int) -> None:
        """The attempt before this one died, and step `saved` is still the newest checkpoint."""
        self._count(f"behind the checkpoint of step {saved}", DIED)

    def _count(self, where: str, text: str) -> None:
        again = (where, self.config) == (self.last.get("where"), self.last.get("config"))
        again = again and _kind(text) == _kind(str(self.last.get("error")))
        times = self.last.get("times", 0) + 1 if again else 1
        self.last = {"where": where, "error": text, "config": self.config, "times": times}
        with suppress(OSError):  # a full disk, say, which the error already is about
            write_atomically(self.path, json.dumps(self.last) + "\n")

    def forget(self) -> None:
        """Training came to an end that was wanted."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _noted(self) -> bool:
        """Whether another rank has noted a failure since this attempt began."""
        try:
            now = dict(json.loads(self.path.read_text()))
        except (OSError, ValueError):
            return False
        return now != self.last


def _kind(text: str) -> str:
    """An error's text without numbers: addresses, sizes and process ids differ from start to start."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)
