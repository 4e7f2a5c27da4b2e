"""Figures on hand-written pages: each comes from a results file, or stands in figures.json with its source.

A figure is a number with a unit of speed, a share in percent, or so-and-so many times faster. Pages that are
made from results are not looked at, nor are code, addresses, and sections that a program writes, between
`<!-- written by PROGRAM -->` and `<!-- end -->`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).with_name("figures.json")
FROM_RESULTS = {"docs/performance.md", "docs/logbook.md"}
"""Pages that programs write; their own tests compare them with the results."""

_UNITS = r"images/s|pictures/s|batches/s|samples/s|tokens/s|[KMGT]i?B/s|[GTP]FLOP/s|ms|us|µs|ns|%"
FIGURE = re.compile(
    rf"(?<![\w.])~?\d[\d.,]*(?:\s?(?:to|-)\s?\d[\d.,]*)?\s?(?:{_UNITS})(?![\w/])"
    r"|(?<![\w.])\d[\d.,]*\s?(?:x|times)\s(?:faster|slower|as fast|the speed|the throughput)"
    r"|(?:[Tt]wice|[Hh]alf|[Ss]everal times|[Mm]any times|two times|three times)\s(?:as fast|faster|slower)"
    r"|\d+(?:\.\d+)? of the (?:throughput|speed)"
    r"|(?:FID|CMMD|DINO-MMD|MFU) (?:of )?\d+(?:\.\d+)?"
)
_SKIPPED = re.compile(
    r"^(`{3,}|~{3,}).*?^\1\s*$|`[^`\n]+`|\]\([^)]*\)|<!-- written by .*?<!-- end -->|<!--.*?-->",
    re.MULTILINE | re.DOTALL,
)


def pages() -> list[Path]:
    """Hand-written pages."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.relative_to(ROOT).as_posix() not in FROM_RESULTS]


def figures(markdown: str) -> list[str]:
    """Figures of a page, in order, with single spaces."""
    text = _SKIPPED.sub(" ", markdown)
    return [" ".join(found.group().split()) for found in FIGURE.finditer(text)]


def problems(name: str, markdown: str, sources: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with the figures of a page: unexplained ones, and sources of what is not there."""
    found, known = figures(markdown), sources.get(name, {})
    unexplained = [f"{name}: {figure!r} has no source" for figure in found if figure not in known]
    unused = [
        f"{name}: {figure!r} is in {SOURCES.name} but not on the page"
        for figure in known
        if figure not in found
    ]
    return list(dict.fromkeys(unexplained + unused))


def load() -> dict[str, dict[str, str]]:
    """Sources by page and figure."""
    return json.loads(SOURCES.read_text())
