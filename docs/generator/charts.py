"""Charts from the files in benchmarks/results/, drawn when the site is built; the one of README is committed.

Every number comes from a file, whose name stands under the chart. What has no file says so.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import svg

from millrace.benchmarks.report import suite_report
from millrace.benchmarks.report.recording import Result, read_results

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "published.json"

LEFT, RIGHT, BAR, GAP, INSIDE = 236, 50, 18, 8, 70
"""Pixels: names, figures, a bar, between two of one group, and how long a bar is to hold its figure."""
OURS, THEIRS, POST = "green", "grey", "blue"


class Bar(NamedTuple):
    name: str
    value: float
    shown: str
    colour: str
    mark: float | None = None
    """Where a tick stands, in the bars' unit."""
    mark_shown: str = ""


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
                canvas.text(x + 7, y + 13.5, bar.mark_shown, size=12, colour="soft")
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


def speed(results: list[Result]) -> str:
    """README's picture: images/s beside the post's where a GPU was measured, else relative speed."""
    gpu = [
        row | {"file": result["file"], "gpu": result["gpus"][0]["name"], "time": result["time"]}
        for result in results
        if result["benchmark"] in ("throughput", "suite") and result.get("gpus")
        for row in result.get("rows") or result.get("cases") or []
        if row.get("status", "measured") == "measured"
        and row.get("device", "cuda") == "cuda"
        and not row.get("peer")
    ]
    return _images_per_second(gpu) if gpu else _relative_speed(results)


def _post_speeds() -> dict[str, float]:
    """Images/s of the post's whole job, by configuration."""
    post = json.loads(PUBLISHED.read_text())
    return {
        row["config"]: row["batches_per_second"] * post["global_batch"]
        for table in post["tables"]
        for row in table["rows"]
        if row["config"] and row["batches_per_second"]
    }


def _images_per_second(rows: list[Result]) -> str:
    """The newest measured row of each configuration of the post, cached inputs first."""
    post = _post_speeds()
    chosen: dict[str, Result] = {}
    for row in rows:
        if row["config"] in post and not row.get("overrides"):
            known = chosen.get(row["config"])
            if known is None or row["conditioning"] == "cached" or known["conditioning"] != "cached":
                chosen[row["config"]] = row
    groups = [
        Group(
            config,
            [
                Bar("the post, its whole job", post[config], f"{post[config]:.0f}", POST),
                Bar(
                    f"Millrace, {row['devices']} x {row['gpu'].removeprefix('NVIDIA ')}",
                    row["images_per_second"],
                    f"{row['images_per_second']:.0f}",
                    OURS,
                ),
            ],
        )
        for config, row in chosen.items()
    ]
    files = ", ".join(sorted({row["file"] for row in chosen.values()}))
    inputs = ", ".join(sorted({row["conditioning"] for row in chosen.values()}))
    notes = [
        "The post does not say on what GPUs, or on how many, its figures were taken.",
        f"Inputs: {inputs}. benchmarks/results/: {files}; the post: benchmarks/published.json",
    ]
    return bars("Images per second of training", groups, notes)


def _relative_speed(results: list[Result]) -> str:
    """Speed of TREAD and SPRINT relative to the dense step of the same side, and where the FLOPs put it."""
    result = newest(results, "routing")
    if result is None:
        return "Not measured: no result of python -m benchmarks routing."
    cpu = result["options"]["device"] == "cpu"
    sides = (
        {"ours": "Millrace, small model on a CPU", "peer": "diffusers, the same model and CPU"}
        if cpu
        else {"ours": "Millrace, blocks on a GPU", "peer": "diffusers, the same on that GPU"}
    )
    dense = {row["side"]: row["seconds_median"] for row in result["rows"] if row["variant"] == "dense"}
    groups = []
    for method in ("TREAD", "SPRINT"):
        found = [
            Bar(
                f"the post, {row['resolution']} px",
                row["relative"],
                f"{row['relative']:.2f}",
                POST,
                row["ideal"],
                f"{row['ideal']:.2f}",
            )
            for row in _post_relative(method)
        ]
        found += [
            Bar(
                sides[row["side"]],
                dense[row["side"]] / row["seconds_median"],
                f"{dense[row['side']] / row['seconds_median']:.2f}",
                OURS if row["side"] == "ours" else THEIRS,
                1 / row["flop_ratio"],
                f"{1 / row['flop_ratio']:.2f}",
            )
            for row in result["rows"]
            if row["variant"] == method.lower()
        ]
        groups.append(Group(method, found))
    options = result["options"]
    where = f"No GPU measurement yet. CPU: {result['cpu']}, {result['threads']} threads"
    if not cpu:
        where = f"GPU: {result['gpus'][0]['name']}; forward and backward, no training step measured yet"
    notes = [
        "Each to the dense step of the same model; the tick is the speed it had if time followed the FLOPs.",
        f"{where}, width {options['width']}, {options['depth']} blocks, {options['image_tokens']} tokens.",
        f"benchmarks/results/{result['file']}, {result['time'][:10]}; the post: benchmarks/published.json",
    ]
    return bars("Training speed, routed to dense", groups, notes)


def _post_relative(method: str) -> list[Result]:
    """The post's rows of a routing method: speed relative to their baseline, and that by FLOPs."""
    speeds = {row["config"]: row["batches_per_second"] for row in suite_report.post_rows()}
    found = []
    for row in suite_report.post_rows():
        if row["method"] == method:
            flops, dense = suite_report.config_flops(row["config"])
            relative = row["batches_per_second"] / speeds[row["baseline"]]
            found.append({"resolution": row["resolution"], "relative": relative, "ideal": dense / flops})
    return found


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
