"""docs/performance.md: of every benchmark the newest result of each device."""

from millrace.benchmarks.report import (
    dataloader_report,
    kernels_report,
    profile_report,
    routing_report,
    scaling_report,
    suite_report,
    throughput_report,
    traffic_report,
)
from millrace.benchmarks.report.recording import Result, of
from millrace.benchmarks.report.tables import Table

INTRODUCTION = """\
# Performance

Written by `python -m benchmarks pages` from the files in `benchmarks/results/`: change those, not this
page. Every file there was written by a program of `benchmarks/`, with its machine, versions, commit and
command."""


def page(results: list[Result]) -> str:
    """The page as Markdown."""
    sections = (
        kernels_report.section,
        suite_report.section,
        throughput_report.section,
        profile_report.section,
        scaling_report.section,
        routing_report.section,
        traffic_report.section,
        resources_section,
        dataloader_report.section,
    )
    return "\n\n".join([INTRODUCTION, *(section(results) for section in sections)]) + "\n"


def resources_section(results: list[Result]) -> str:
    """What the compiled Triton kernels take, over all launches of each."""
    text = ["## Compiled kernels"]
    results = of(results, "resources")
    if not results:
        return "\n\n".join([*text, "Not compiled: no result of `python -m benchmarks resources`."])
    result = results[-1]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text.append(
        f"Triton kernels compiled for sm_80 and sm_90a without a GPU ({versions}; `{result['file']}`): the "
        "most that any launch of a kernel takes. Compiling shows that a kernel fits the chip, not that it is "
        "fast."
    )
    head = ["file", "kernel", "sm", "launches", "registers", "spilled bytes", "shared KiB", "instructions"]
    lines = [
        [
            f"`{row['file']}`",
            f"`{row['kernel']}`",
            *(str(row[name]) for name in ("architecture", "launches", "registers", "spill_bytes")),
            f"{row['shared_bytes'] / 1024:.1f}",
            " ".join(row["instructions"]) or "-",
        ]
        for row in result["kernels"]
    ]
    return "\n\n".join([*text, Table(head, lines).markdown()])
