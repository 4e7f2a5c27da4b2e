"""Write the pages of docs/ that come from benchmarks/results/, and the planner's table of settings.

python -m benchmarks pages            # write them
python -m benchmarks pages --check    # exit code 1 if a page is not what the results say
"""

import sys
from collections.abc import Callable
from pathlib import Path

from millrace.benchmarks.report import (
    fine_tuning_section,
    fp8_section,
    logbook_page,
    performance_page,
    seed_pairs_section,
    settings_section,
)
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
    """Write the pages, or compare them."""
    parser = command_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the pages")
    check = parser.parse_args().check
    wrong = stale()
    for path, text in wrong.items():
        if check:
            print(f"error: {path} is out of date: run python -m benchmarks pages", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"written to {path}")
    return int(check and bool(wrong))


if __name__ == "__main__":
    run_command(main)
