"""Loaders of pictures side by side: tables and the section of the performance page."""

from pathlib import Path
from typing import Any

from millrace.benchmarks.report.charts import Bar, draw_bars
from millrace.benchmarks.report.recording import CHARTS, Result, of, origin, source
from millrace.benchmarks.report.tables import Table

Row = dict[str, Any]

PACKAGES = ("pillow", "nvidia-dali-cuda130", "webdataset", "mosaicml-streaming")

TARGETS = (
    ("dense, 256 px latents", "256", 300),
    ("dense, 1024 px pixels", "1024", 85),
    ("TREAD, 1024 px pixels", "1024", 125),
    ("SPRINT, 1024 px pixels", "1024", 165),
)
"""Training, the case that feeds it, and the images/s that one H200 is to reach."""


def table(rows: list[Row]) -> Table:
    """A line for each loader in each case, the fastest first."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        for row in ranked(rows, case):
            ratio = against_best_peer(rows, row)
            lines.append(
                [
                    case,
                    row["loader"],
                    row["filter"],
                    f"{row['images_per_second_median']:.1f}",
                    f"{row['images_per_second_p20']:.1f}-{row['images_per_second_p80']:.1f}",
                    f"{row['images_per_second_per_core']:.1f}",
                    f"{row['cpu_seconds_per_image'] * 1e3:.1f}",
                    f"{ratio:.2f}" if ratio and row["ours"] else "",
                ]
            )
    head = ["case", "loader", "filter", "images/s", "p20-p80", "per core", "CPU ms", "to best peer"]
    return Table(head, lines, left=3)


def notes(result: dict[str, Any]) -> str:
    """What was measured and how, in words."""
    cases = "; ".join(
        f"*{case['name']}*: {case['pictures']} JPEG files of {case['mean_megapixels']:.2f} megapixels and "
        f"{case['mean_bytes'] / 2**10:.0f} KiB on average, to {_output(case)}"
        for case in result["cases"]
    )
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in PACKAGES if result["versions"].get(name)
    )
    return (
        f"Batches (B, 3, h, w) uint8 of random crops from the same files in the page cache. {cases}. "
        f"{result['rounds']} turns of {result['seconds']:g} s for each loader, interleaved, with as many "
        f"threads or worker processes as cores; {versions}. CPU ms: processor time of a loader and its "
        "workers per image. To best peer: images/s over those of the fastest loader that is not ours. The "
        "peers resize with Pillow as torchvision does, or, where the filter is bilinear, with torch's kernel "
        "as torchvision's v2 does with bytes."
    )


def _output(case: dict[str, Any]) -> str:
    edge = case["resolution"]
    return f"{edge} x {edge}" if case["square"] else f"{case['buckets']} buckets of about {edge} x {edge}"


def ranked(rows: list[Row], case: str) -> list[Row]:
    """Rows of one case, the fastest first."""
    return sorted(
        (row for row in rows if row["case"] == case), key=lambda row: -row["images_per_second_median"]
    )


def against_best_peer(rows: list[Row], row: Row) -> float | None:
    """images/s of a row over those of the fastest peer in its case; None without a peer."""
    peers = [peer["images_per_second_median"] for peer in ranked(rows, row["case"]) if not peer["ours"]]
    return row["images_per_second_median"] / max(peers) if peers else None


def needs(rows: list[Row]) -> Table:
    """The cores with which our fastest loader feeds one H200 at each throughput that the engine aims at."""
    lines = []
    for training, case, target in TARGETS:
        ours = [row for row in ranked(rows, case) if row["ours"]]
        if ours:
            cores = target / ours[0]["images_per_second_per_core"]
            lines.append([training, str(target), ours[0]["loader"], f"{cores:.1f}"])
    return Table(["training", "images/s", "loader", "cores"], lines)


def draw(content: Result, path: Path) -> None:
    """Images/s of each loader as a chart; each case to its own fastest."""
    rows = content["rows"]
    groups = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        speeds = [(row, row["images_per_second_median"]) for row in ranked(rows, case)]
        groups[f"to {case} px"] = [
            Bar(row["loader"], speed / speeds[0][1], f"{speed:.0f}", row["ours"]) for row, speed in speeds
        ]
    note = f"Images/s on {content['cores']} cores; each group to its own scale.\n{source(content)}"
    draw_bars(path, "Loading pictures, images/s", groups, note)


def section(results: list[Result]) -> str:
    """Of the performance page: loaders side by side on each CPU, and the cores that a GPU needs of ours."""
    text = ["## Loading pictures"]
    newest = {result["cpu"]: result for result in of(results, "dataloader")}
    if not newest:
        text.append("Not measured: no result of `python -m benchmarks dataloader`.")
    for cpu, result in newest.items():
        text += [f"### {cpu}, {result['cores']} cores", origin(result), notes(result)]
        text.append(table(result["rows"]).markdown())
        if result["chart"]:
            text.append(f"![Images/s of each loader]({CHARTS}/{result['chart']})")
        if (cores := needs(result["rows"])).rows:
            text.append("Cores of this kind that feed one H200 at the throughputs the engine aims at:")
            text.append(cores.markdown())
    return "\n\n".join(text)
