"""How costs of data, checkpoints and logs grow: the table and the section of the performance page."""

from typing import Any

from millrace.benchmarks.report.recording import Result, of, origin
from millrace.benchmarks.report.tables import Table

WORDS = """\
Synthetic data sets, checkpoints and logs; each row is a process of its own. *MB*: memory beyond that of the
imports: of the process's own, of files that it has mapped (which the processes of a machine share), and the
most of both together. *Opened*: files, each time counted; *read*: MB by calls. Sizes are samples, processes,
lines or pictures."""


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each cost at each size."""
    lines = [
        [
            row["what"],
            f"{row['size']:,}",
            f"{row['seconds']:.4f}",
            *(f"{row[kind]:.0f}" for kind in ("held", "mapped", "peak")),
            f"{row['opened']:,}",
            f"{row['read']:.1f}",
            row["note"],
        ]
        for row in sorted(rows, key=lambda row: (row["what"], row["size"]))
    ]
    head = ["cost", "size", "seconds", "MB own", "MB mapped", "MB at most", "opened", "MB read", ""]
    return Table(head, lines)


def section(results: list[Result]) -> str:
    """Of the performance page."""
    text = ["## Growth"]
    if found := of(results, "scale"):
        text += [origin(found[-1]), WORDS, table(found[-1]["rows"]).markdown()]
    else:
        text.append("Not measured: no result of `python -m benchmarks scale`.")
    return "\n\n".join(text)
