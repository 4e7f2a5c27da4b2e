"""What the compiled kernels take of each chip: table, and section of the performance page."""

from typing import Any

from millrace.benchmarks.report.recording import Result, of
from millrace.benchmarks.report.tables import Table


def line(row: dict[str, Any]) -> str:
    """One kernel of one launch."""
    return (
        f"sm_{row['chip']} {row['kernel']}: {row['registers']} registers, {row['occupancy']} blocks, "
        f"{row['spill_bytes']} spilled bytes, {row['loop_local']} local accesses in loops, "
        f"{row['shared_bytes']} shared bytes, {' '.join(row['instructions'])} "
        f"({row['file']}: {row['launch']})"
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each kernel on each chip."""
    head = ["file", "kernel", "sm", "launches", "registers", "blocks", "spilled bytes", "in loops"]
    lines = [
        [
            row["file"],
            row["kernel"],
            *(str(row[name]) for name in ("chip", "launches", "registers", "occupancy", "spill_bytes")),
            str(row["loop_local"]),
            f"{row['shared_bytes'] / 1024:.1f}",
            row["instructions"] or "-",
            str(row["problems"] or ""),
        ]
        for row in rows
    ]
    return Table([*head, "shared KiB", "instructions", "wrong"], lines, left=2)


def section(results: list[Result]) -> str:
    """Of the performance page: the most that any launch of a kernel takes."""
    text = ["## Compiled kernels"]
    results = of(results, "resources")
    if not results:
        return "\n\n".join([*text, "Not compiled: no result of `python -m benchmarks resources`."])
    result = results[-1]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text.append(
        f"Every launch that training makes, compiled without a GPU for each chip ({versions}; "
        f"`{result['file']}`, {result['minutes']} minutes in {result['processes']} processes). Registers, "
        "spills and shared memory are the most of any launch; blocks: the fewest that run on a "
        "multiprocessor at the same time; in loops: accesses to local memory inside loops, which is what a "
        "spill costs; wrong: launches that `kernels/support/compilation.py` would not ship. A kernel that "
        "compiles fits the chip; it need not be fast."
    )
    return "\n\n".join([*text, table(result["kernels"]).markdown()])
