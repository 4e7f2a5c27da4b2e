"""What all commands share: one line per error, exit codes, and imports that work from any folder.

Exit codes: 0 done (also after SIGTERM or Ctrl-C with a checkpoint saved), 2 bad input, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable

from millrace.engine.util.errors import UserError


def command_parser(doc: str) -> argparse.ArgumentParser:
    """Parser of a command whose module docstring is a sentence and then its examples."""
    return argparse.ArgumentParser(
        description=doc.splitlines()[0],
        epilog="examples:\n" + doc.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and leave the process with its exit code."""
    try:
        code = main() or 0
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        # Everything is on disk. Tearing down gloo's threads now and then aborts a process that has nothing
        # left to do, and a process that failed must not wait for the others; leaving at once does neither.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
