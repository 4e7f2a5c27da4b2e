"""Write the charts of benchmarks/results/, the pages of docs/ that come from them, and the planner's table.

python -m benchmarks pages            # write them
python -m benchmarks pages --check    # exit code 1 if a page or chart is not what the results say
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from millrace.benchmarks.quality import ablations_table
from millrace.benchmarks.report import (
    dataloader_report,
    fine_tuning_section,
    fp8_section,
    kernels_report,
    logbook_page,
    performance_page,
    profile_report,
    routing_report,
    scaling_report,
    seed_pairs_section,
    settings_section,
    traffic_report,
)
from millrace.benchmarks.report.charts import words
from millrace.benchmarks.report.recording import RESULTS, ROOT, Result, read_results
from millrace.engine.cli import command_parser, run_command

DOCS = ROOT / "docs"
PAGES: dict[str, Callable[[list[Result], str], str]] = {
    "performance.md": lambda results, _: performance_page.page(results),
    "logbook.md": lambda results, _: logbook_page.page(results),
    "precision.md": fp8_section.page,
    "comparing.md": seed_pairs_section.page,
    "planning.md": settings_section.page,
    "fine_tuning.md": fine_tuning_section.page,
}
"""By name: the text of the page, from all results and the text that is there."""

CHARTS: dict[str, Callable[[Result, Path], None]] = {
    "ablations": ablations_table.draw,
    "dataloader": dataloader_report.draw,
    "fp8_parity": fp8_section.draw,
    "kernels": kernels_report.draw,
    "profile": profile_report.draw,
    "routing": routing_report.draw,
    "scaling": scaling_report.draw,
    "traffic": traffic_report.draw,
}
"""By benchmark: what draws a result."""


def stale_charts(folder: Path = RESULTS) -> dict[Path, str]:
    """The charts whose words are not what their results say, with what they should be.

    Words alone are compared: the lines of a drawing differ with the version of matplotlib.
    """
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for result in read_results(folder):
            path = (folder / result["file"]).with_suffix(".svg")
            drawn = Path(scratch) / path.name
            if draw := CHARTS.get(result["benchmark"]):
                draw(result, drawn)
            if drawn.exists() and not (path.exists() and words(path.read_text()) == words(drawn.read_text())):
                found[path] = drawn.read_text()
    return found


def stale(folder: Path = DOCS) -> dict[Path, str]:
    """The pages that are not what the results say, with what they should say."""
    results, found = read_results(RESULTS), {}
    for name, make in PAGES.items():
        path = folder / name
        before = path.read_text() if path.exists() else ""
        if (text := make(results, before)) != before:
            found[path] = text
    return found


def main() -> int:
    """Write the charts and pages, or compare them."""
    parser = command_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the files")
    check = parser.parse_args().check
    wrong = False
    for find in (stale_charts, stale):  # a page names the charts that are there
        for path, text in find().items():
            wrong = True
            if check:
                print(f"error: {path} is out of date: run python -m benchmarks pages", file=sys.stderr)
            else:
                path.write_text(text)
                print(f"written to {path}")
    return int(check and wrong)


if __name__ == "__main__":
    run_command(main)
