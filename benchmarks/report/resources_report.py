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
    """A line for each kernel: the worst of all chips."""
    head = ["file", "kernel", "chips", "launches", "registers", "blocks", "spilled bytes", "in loops"]
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kernels.setdefault((row["file"], row["kernel"]), []).append(row)
    lines = []
    for (file, kernel), found in kernels.items():
        most = {name: max(row[name] for row in found) for name in ("registers", "spill_bytes", "loop_local")}
        instructions = dict.fromkeys(name for row in found for name in row["instructions"].split())
        lines.append(
            [
                file,
                kernel,
                str(len(found)),
                str(sum(row["launches"] for row in found)),
                str(most["registers"]),
                str(min(row["occupancy"] for row in found)),
                str(most["spill_bytes"]),
                str(most["loop_local"]),
                f"{max(row['shared_bytes'] for row in found) / 1024:.1f}",
                " ".join(instructions) or "-",
                str(sum(row["problems"] for row in found) or ""),
            ]
        )
    return Table([*head, "shared KiB", "instructions", "wrong"], lines, left=2)


def section(results: list[Result]) -> str:
    """Of the performance page: the most that any launch of a kernel takes."""
    text = ["## Compiled kernels"]
    results = of(results, "resources")
    if not results:
        return "\n\n".join([*text, "Not compiled: no result of `python -m benchmarks resources`."])
    result = results[-1]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    chips = ", ".join(dict.fromkeys(str(row["chip"]) for row in result["kernels"]))
    text.append(
        f"Every launch that training makes, compiled without a GPU for sm {chips} ({versions}; "
        f"`{result['file']}`, which has a row for each chip, {result['minutes']} minutes in "
        f"{result['processes']} processes). Registers, spills and shared memory are the most of any launch "
        "on any chip; blocks: the fewest that run on a multiprocessor at the same time; in loops: accesses "
        "to local memory inside loops, which is what a spill costs; wrong: launches that "
        "`kernels/support/compilation.py` would not ship. A kernel that compiles fits the chip; it need not "
        "be fast."
    )
    return "\n\n".join([*text, table(result["kernels"]).markdown()])
