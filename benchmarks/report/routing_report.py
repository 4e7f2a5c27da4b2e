"""Routed steps beside dense ones and diffusers': table and section of the performance page."""

from pathlib import Path
from typing import Any

from millrace.benchmarks.report.charts import Bar, draw_bars
from millrace.benchmarks.report.recording import CHARTS, Result, gpu_of, of, origin, source
from millrace.benchmarks.report.tables import Table


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each step."""
    head = ["step", "side", "FLOPs to dense", "ms (p20-p80)", "to peer", "saved per saved FLOPs"]
    head += ["user ms", "to peer", "saved per saved FLOPs", "page faults", "peak MiB", "to peer"]
    lines = []
    for row in rows:
        times = [row[f"seconds_{which}"] * 1e3 for which in ("median", "p20", "p80")]
        ours = row["side"] == "ours"
        lines.append(
            [
                row["variant"],
                row["side"],
                f"{row['flop_ratio']:.3f}",
                f"{times[0]:.1f} ({times[1]:.1f}-{times[2]:.1f})",
                f"{row['time_ratio_to_peer']:.3f}" if ours else "",
                _saved(row["saved_time_per_saved_flops"]),
                f"{row['user_seconds_median'] * 1e3:.1f}",
                f"{row['user_ratio_to_peer']:.3f}" if ours else "",
                _saved(row["user_saved_per_saved_flops"]),
                f"{row['page_faults_median']:.0f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
                f"{row['memory_ratio_to_peer']:.3f}" if ours else "",
            ]
        )
    return Table(head, lines, left=2)


def _saved(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def conditions(result: Result) -> str:
    """What was measured and what the columns mean."""
    options = result["options"]
    return (
        f"Width {options['width']}, {options['depth']} blocks, {options['batch']} pictures of "
        f"{options['image_tokens']} tokens, {options['dtype'].removeprefix('torch.')}, "
        f"{'compiled' if options['compile'] else 'not compiled'}, {result['threads']} CPU threads. "
        "Forward and backward of one step; the peer is diffusers' PRX with Photoroom/PRX's routing. "
        "Saved per saved FLOPs: share of the dense time over share of the dense FLOPs. User ms: "
        "processor time outside the system; unlike the clock it leaves out what fresh memory costs (a "
        "page fault for every 4 KiB), which a GPU's caching allocator does not ask for. "
        f"Memory: {result['memory_method']}."
    )


def draw(content: Result, path: Path) -> None:
    """The share of the saved FLOPs that became saved time, ours beside the peer's, as a chart."""
    names = {"ours": "Millrace", "peer": "diffusers, routed as PRX does"}
    groups = {
        variant.upper(): [
            Bar(names[row["side"]], share, f"{share:.2f}", row["side"] == "ours")
            for row in content["rows"]
            if row["variant"] == variant and (share := row["saved_time_per_saved_flops"]) is not None
        ]
        for variant in ("tread", "sprint")
    }
    note = "Share of the dense time saved over share of its FLOPs saved.\nDashed, 1: all of it. " + source(
        content
    )
    groups = {name: bars for name, bars in groups.items() if bars}
    draw_bars(path, "What routing saves of what it could", groups, note, mark=1.0)


def section(results: list[Result]) -> str:
    """Of the performance page: what routing saves, and our step beside diffusers', on each device."""
    text = ["## Routing"]
    newest: dict[tuple[str, str], Result] = {}
    for result in of(results, "routing"):
        on_gpu = result["options"]["device"] == "cuda"
        newest[result["options"]["device"], gpu_of(result) if on_gpu else f"{result['cpu']} (CPU)"] = result
    if not newest:
        return "\n\n".join([*text, "Not measured: no result of `python -m benchmarks routing`."])
    if all(kind != "cuda" for kind, _ in newest):
        text.append("On a GPU: not measured.")
    for (_, device), result in newest.items():
        text += [f"### {device}", origin(result), conditions(result), table(result["rows"]).markdown()]
        if result["chart"]:
            text.append(f"![Share of the saved FLOPs that became saved time]({CHARTS}/{result['chart']})")
    return "\n\n".join(text)
