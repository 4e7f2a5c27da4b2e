"""User error: the one exception that commands turn into a single line and exit code 2; hints for its text."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do about it."""


class FailedElsewhere(UserError):
    """Another process of the job failed, and says why; a command that ends by it says nothing."""


def did_you_mean(wrong: str, names: Iterable[str], kind: str) -> str:
    """`did you mean 'x'?`, x the nearest of `names`; if none is near `valid KIND: a, b`, all of them."""
    names = list(names)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid {kind}: {', '.join(names)}"
