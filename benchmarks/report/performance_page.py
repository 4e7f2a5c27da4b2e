"""docs/performance.md: of every benchmark the newest result of each device."""

from millrace.benchmarks.report import (
    dataloader_report,
    kernels_report,
    profile_report,
    remote_report,
    resources_report,
    routing_report,
    scale_report,
    scaling_report,
    suite_report,
    throughput_report,
    traffic_report,
    weight_traffic_report,
)
from millrace.benchmarks.report.recording import Result

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
        weight_traffic_report.section,
        resources_report.section,
        dataloader_report.section,
        remote_report.section,
        scale_report.section,
    )
    return "\n\n".join([INTRODUCTION, *(section(results) for section in sections)]) + "\n"
