"""Width of progress bars on terminals, also on those that do not know theirs."""

import os
import sys
from typing import Any

UNKNOWN = os.terminal_size((80, 24))


def bar_size() -> dict[str, Any]:
    """Arguments of tqdm for a bar on stderr: it follows the size of the terminal.

    A terminal of a container, a serial line or a recorder may say 0 x 0, where tqdm would show nothing: it is
    taken for UNKNOWN.
    """
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal, and maybe no file
        return {"dynamic_ncols": True}
    if size.columns and size.lines:
        return {"dynamic_ncols": True}
    return {"ncols": size.columns or UNKNOWN.columns, "nrows": size.lines or UNKNOWN.lines}
