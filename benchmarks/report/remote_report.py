"""Shards from a server beside the same on a disk: the table and the section of the performance page."""

from typing import Any

from millrace.benchmarks.report.recording import Result, of, origin
from millrace.benchmarks.report.tables import Table


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each loader with each number of threads."""
    lines = [
        [
            str(row["workers"]),
            row["loader"],
            f"{row['images_per_second_median']:.0f}",
            f"{row['images_per_second_p20']:.0f}-{row['images_per_second_p80']:.0f}",
            f"{row['of_disk']:.2f}",
            f"{1e3 * row['cpu_seconds_per_image']:.2f}",
            f"{1e3 * row['server_cpu_seconds_per_image']:.2f}",
        ]
        for row in rows
    ]
    head = ["threads", "loader", "images/s", "p20-p80", "of disk", "CPU ms", "server's CPU ms"]
    return Table(head, lines, left=2)


def notes(result: Result) -> str:
    """What was measured and how, in words."""
    settings, compared, bound = result["settings"], result["same_bits"]["server"], result["bound"]
    faults = f"fails {settings['failures']:.0%} of its requests, cuts {settings['cuts']:.0%} of its answers"
    seen = [compared.get(fault, 0) for fault in ("failed", "cut", "flipped")]
    return (
        f"{settings['pictures']} pictures for buckets of 256 pixels, on a disk and behind an HTTP server of "
        f"this machine that waits {1e3 * settings['latency']:g} ms, {faults}; {settings['requests']} are "
        f"under way. Median of {settings['rounds']} epochs; *of disk*: median of the ratios to the disk's "
        "epoch beside it. *No cache* asks for each picture, *first epoch* for blocks, *second epoch* reads "
        "what those left on disk. The server takes its time from the same cores.\n\n"
        f"Every one of {result['same_bits']['samples']} samples was that of the disk, bit for bit, after "
        f"{seen[0]} failures, {seen[1]} cuts and {seen[2]} changed byte in {compared['requests']} requests. "
        f"Two processes with one cache of {bound['limit']:,} bytes took {bound['most']:,} at most."
    )


def section(results: list[Result]) -> str:
    """Of the performance page."""
    text = ["## Reading from a server"]
    if found := of(results, "remote"):
        text += [origin(found[-1]), notes(found[-1]), table(found[-1]["rows"]).markdown()]
    else:
        text.append("Not measured: no result of `python -m benchmarks remote`.")
    return "\n\n".join(text)
