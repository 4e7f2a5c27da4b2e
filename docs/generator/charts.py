"""Charts from the files in benchmarks/results/, drawn when the site is built; the one of README is committed.

Every number comes from a file, whose name stands under the chart. What has no file says so.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import svg

from millrace.benchmarks.report.recording import Result, read_results

LEFT, RIGHT, BAR, GAP, INSIDE = 236, 50, 18, 8, 70
"""Pixels: names, figures, a bar, between two of one group, and how long a bar is to hold its figure."""
OURS, THEIRS = "green", "grey"


class Bar(NamedTuple):
    name: str
    value: float
    shown: str
    colour: str
    mark: float | None = None
    """Where a tick stands, in the bars' unit."""


class Group(NamedTuple):
    title: str
    bars: list[Bar]


def load() -> list[Result]:
    """Results that are no trials; oldest first."""
    return [result for result in read_results() if not result.get("smoke")]


def newest(results: Iterable[Result], benchmark: str) -> Result | None:
    """The newest result of a benchmark; None if there is none."""
    return next((r for r in reversed(list(results)) if r["benchmark"] == benchmark), None)


def bars(title: str, groups: list[Group], notes: list[str], width: int = 760) -> str:
    """Horizontal bars in groups, all to one scale that begins at zero."""
    heights = [26 + len(group.bars) * (BAR + GAP) for group in groups]
    height = 40 + sum(heights) + 17 * len(notes) + 14
    canvas = svg.Canvas(width, height, title)
    canvas.text(0, 20, title, size=15, bold=True)
    values = [max(bar.value, bar.mark or 0) for group in groups for bar in group.bars]
    scale = (width - LEFT - RIGHT) / max(values)
    y = 40
    for group in groups:
        canvas.text(0, y + 14, group.title, bold=True, size=12.5)
        y += 24
        for bar in group.bars:
            canvas.text(LEFT - 10, y + 13.5, bar.name, size=12, anchor="end")
            canvas.box(LEFT, y, max(bar.value * scale, 1), BAR, bar.colour, solid=True, round=2)
            if bar.value * scale > INSIDE:
                # At the bar's beginning: on a narrow screen its end may have to be scrolled to.
                canvas.text(LEFT + 8, y + 13.5, bar.shown, size=12, colour="paper", bold=True)
            else:
                canvas.text(LEFT + bar.value * scale + 8, y + 13.5, bar.shown, size=12)
            if bar.mark is not None:
                x = LEFT + bar.mark * scale
                canvas.line((x, y - 3), (x, y + BAR + 3), colour="ink", width=2)
            y += BAR + GAP
        canvas.line((LEFT, y - 24 - len(group.bars) * (BAR + GAP) + 22), (LEFT, y - GAP + 3))
        y += 2
    for i, note in enumerate(notes):
        canvas.text(0, y + 16 + 17 * i, note, size=11.5, colour="soft")
    return canvas.svg()


def origin(result: Result) -> str:
    """Where a result comes from, in a line."""
    where = result["gpus"][0]["name"] if result.get("gpus") else f"{result['cpu']}, CPU"
    return f"benchmarks/results/{result['file']}: {result['time'][:10]}, {where}"


def routing(results: list[Result]) -> str:
    """Share of the saved FLOPs that became saved time, ours beside the peer's."""
    result = newest(results, "routing")
    if result is None:
        return "Not measured: no result of python -m benchmarks routing."
    names = {"ours": ("Millrace", OURS), "peer": ("diffusers, routed as PRX does", THEIRS)}
    groups = [
        Group(
            variant.upper(),
            [
                Bar(names[row["side"]][0], share, f"{share:.2f}", names[row["side"]][1], 1.0)
                for row in result["rows"]
                if row["variant"] == variant and (share := row["saved_time_per_saved_flops"]) is not None
            ],
        )
        for variant in ("tread", "sprint")
    ]
    notes = [
        "Share of the dense time saved over share of its FLOPs saved; the tick is 1: all of it.",
        origin(result),
    ]
    return bars("What routing saves of what it could", [g for g in groups if g.bars], notes)


def dataloader(results: list[Result]) -> str:
    """Pictures per second of each loader, one chart for all cases: each case to its own fastest."""
    result = newest(results, "dataloader")
    if result is None:
        return "Not measured: no result of python -m benchmarks dataloader."
    groups = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        rows = sorted(
            (row for row in result["rows"] if row["case"] == case),
            key=lambda row: -row["images_per_second_median"],
        )
        best = rows[0]["images_per_second_median"]
        groups.append(
            Group(
                f"to {case} px",
                [
                    Bar(
                        row["loader"],
                        row["images_per_second_median"] / best,
                        f"{row['images_per_second_median']:.0f}",
                        OURS if row["ours"] else THEIRS,
                    )
                    for row in rows
                ],
            )
        )
    notes = [f"Images/s on {result['cores']} cores; bars of a group relative to its fastest.", origin(result)]
    return bars("Loading pictures, images/s", groups, notes)


def traffic(results: list[Result]) -> str:
    """Bytes that a step moves, counted operator by operator."""
    result = newest(results, "traffic")
    if result is None:
        return "Not counted: no result of python -m benchmarks traffic."
    names = {"ours": ("Millrace", OURS), "peer": ("diffusers' PRX, eager", THEIRS)}
    groups = []
    for config in dict.fromkeys(row["config"] for row in result["rows"]):
        cases = [row for row in result["rows"] if row["config"] == config and not row["overrides"]]
        top = max(_total(row) for row in cases)
        groups += [
            Group(
                f"{config}, {variant}",
                [
                    Bar(
                        names[row["side"]][0],
                        _total(row) / top,
                        f"{_total(row) / 1e9:.0f} GB",
                        names[row["side"]][1],
                    )
                    for row in cases
                    if row["variant"] == variant
                ],
            )
            for variant in dict.fromkeys(row["variant"] for row in cases)
        ]
    micro = ", ".join(dict.fromkeys(str(row["micro_batch"]) for row in result["rows"]))
    notes = [
        f"Read and written by forward and backward of a micro-batch of {micro}; counted, not timed.",
        "Bars of a configuration relative to its largest.",
        f"benchmarks/results/{result['file']}: {result['time'][:10]}",
    ]
    return bars("Memory traffic of one micro-batch", groups, notes)


def _total(row: Result) -> float:
    return sum(part["bytes"] for part in row["totals"].values())


CHARTS: dict[str, Callable[[list[Result]], str]] = {
    "routing": routing,
    "dataloader": dataloader,
    "traffic": traffic,
}

PLACES = {
    "## Routing": "routing",
    "## Memory traffic, counted": "traffic",
    "## Loading pictures": "dataloader",
}
"""Under which headings of docs/performance.md a chart stands."""


def with_places(markdown: str) -> str:
    """The performance page with a comment where each chart belongs; ValueError where a heading is gone."""
    for heading, name in PLACES.items():
        if markdown.count(f"\n{heading}\n") != 1:
            raise ValueError(f"docs/performance.md has no heading {heading!r} for the chart {name}")
        markdown = markdown.replace(f"\n{heading}\n", f"\n{heading}\n\n<!-- chart: {name} -->\n")
    return markdown
