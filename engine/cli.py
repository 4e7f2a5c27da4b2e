"""Command line: the console script `millrace`; parser, argument types and error style of all commands.

Every command parses first and imports after, so that help and wrong arguments cost no import of torch. An
error is one line on stderr. Exit codes: 0 done (also after SIGTERM or Ctrl-C with a checkpoint saved), 2 bad
input, 130 interrupted.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from millrace.engine.util.errors import FailedElsewhere, UserError, did_you_mean
from millrace.engine.util.files import is_url

COMMANDS = ("train", "sample", "evaluate", "export", "prepare", "cache", "plan", "compare", "replay")
"""`millrace NAME` is `main` of the module `millrace.engine.NAME`."""
VERSIONS_OF = ("millrace", "torch", "triton", "deepspeed")


class CommandParser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, with the nearest name for an unknown argument."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')} ({self.prog} --help)\n")

    def parse_args(self, args=None, namespace=None):  # noqa: ANN001, ANN201 - argparse's own signature
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            names = [flag for action in shown for flag in action.option_strings if flag.startswith("--")]
            hint = did_you_mean(unknown[0].partition("=")[0], names, "arguments")
            self.error(f"{unknown[0]}: no such argument; {hint}")
        return found


def command_parser(doc: str, prog: str | None = None, launched: bool = False) -> argparse.ArgumentParser:
    """Parser of a command.

    Args:
        doc: the docstring of its module: a sentence, and then its examples.
        prog: name in help and errors, such as `millrace train`; default the file's.
        launched: whether a launcher may start it, which passes `--local_rank`.
    """
    parser = CommandParser(
        prog=prog,
        description=doc.splitlines()[0],
        epilog="examples:\n" + doc.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if launched:
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--config` and `--set`."""
    parser.add_argument(
        "--config",
        metavar="FILE|NAME",
        required=required,
        help="JSON configuration file, or the name of one that comes with Millrace, such as jit_1024_tread",
    )
    add_override_argument(parser)


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    """`--set`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="override one value of the configuration; may be repeated",
    )


def number(
    kind: type[int] | type[float], low: float, high: float | None = None
) -> Callable[[str], int | float]:
    """Argument type: a number in [low, high]."""
    name = "a whole number" if kind is int else "a number"
    span = f"of {low:g} or more" if high is None else f"from {low:g} to {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (value >= low and (high is None or value <= high)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {span}")
        return value

    return parse


def one_of(names: Iterable[str], kind: str) -> Callable[[str], str]:
    """Argument type: one of `names`, in any case and with blanks anywhere; else the nearest is named."""
    valid = tuple(names)

    def parse(text: str) -> str:
        word = "".join(text.lower().split())
        if word not in valid:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; {did_you_mean(word, valid, kind)}")
        return word

    return parse


def byte_count(text: str) -> int:
    """Argument type: `256M` -> bytes; K, M and G are powers of 1024."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    try:
        size = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        size = 0.0
    if not 0 < size < 2**43:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 256M or 1G")
    return int(size)


def require_local(flag: str, path: str | Path) -> None:
    """Raise UserError for a URL where a file or folder on a disk is needed."""
    if is_url(path):
        raise UserError(f"{flag} {path}: is a URL; this must be on a disk: copy it, or name a folder")


def require_path(flag: str, path: str | Path) -> None:
    """Raise UserError, with the nearest name beside it, where there is neither file nor folder at `path`."""
    require_local(flag, path)
    path = Path(path)
    if path.exists():
        return
    beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), beside, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{flag} {path}: no such file or folder{hint}")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and leave the process with its exit code."""
    # Python searches a script's own folder first, and engine/ has names (data, config) that others use too.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    try:
        code = main() or 0
    except FailedElsewhere:
        code = 2
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


def main() -> None:
    """Entry point of the console script `millrace`."""
    run_command(lambda: dispatch(sys.argv[1:]))


def dispatch(words: Sequence[str]) -> int:
    """Run `millrace WORDS`; returns the exit code. Raises UserError."""
    if not words:
        raise UserError(f"which command? {', '.join(COMMANDS)} (millrace --help)")
    name, *rest = words
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(versions())
    elif name in COMMANDS:
        return import_module(f"millrace.engine.{name}").main(rest) or 0
    else:
        raise UserError(f"{name}: no such command; {did_you_mean(name, COMMANDS, 'commands')}")
    return 0


def overview() -> str:
    """Help of `millrace` itself."""
    first = {name: import_module(f"millrace.engine.{name}").__doc__.splitlines()[0] for name in COMMANDS}
    lines = ["usage: millrace COMMAND ...", "       millrace --version", ""]
    lines += [f"  {name:<10}{line}" for name, line in first.items()]
    return "\n".join([*lines, "", "millrace COMMAND --help has the arguments and examples of a command."])


def versions() -> str:
    """Versions of what a bug report needs, from the packages' metadata: nothing is imported."""

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return "\n".join(f"{package} {version_of(package)}" for package in VERSIONS_OF)
