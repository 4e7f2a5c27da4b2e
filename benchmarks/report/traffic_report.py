"""Sums, roofline and tables of `traffic`."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from millrace.benchmarks.models.ledger import Entry
from millrace.benchmarks.report.charts import Bar, draw_bars
from millrace.benchmarks.report.recording import CHARTS, Result, of, origin
from millrace.benchmarks.report.tables import Table

GEMM_FLOPS = 790e12
"""BF16 products on an H200 as cuBLAS reaches them at these shapes, FLOP/s."""
COPY_BYTES = 4.3e12
"""Bytes an H200 reads and writes in a copy, a second, of the 4.8e12 of its data sheet."""
PEAK_FLOPS = 989e12
"""Dense BF16 of the data sheet, FLOP/s: what MFU is a share of."""
ATTENTION_TFLOPS = (450.0, 420.0)
"""Forward and backward, head_dim 64; backward is counted as 2.5 times the FLOPs of forward."""

KINDS = ("gemm", "attention", "other")
GROUPS = ("operator", "block", "phase")


def ceilings(attention_forward: float, attention_backward: float) -> dict[str, float]:
    """The rates of the roofline, for the JSON."""
    return {
        "gemm_flops_per_second": GEMM_FLOPS,
        "copy_bytes_per_second": COPY_BYTES,
        "attention_forward_flops_per_second": attention_forward * 1e12,
        "attention_backward_flops_per_second": attention_backward * 1e12,
        "peak_flops_per_second": PEAK_FLOPS,
    }


def seconds(entry: Entry, attention_forward: float, attention_backward: float) -> float:
    """Time of one entry on the roofline; rates of attention in TFLOP/s."""
    cost = entry.cost
    moving = cost.moved / COPY_BYTES
    match cost.kind:
        case "gemm":
            return max(cost.flops / GEMM_FLOPS, moving)
        case "attention":
            rate = attention_forward if entry.phase == "forward" else attention_backward
            return cost.flops / (rate * 1e12)
    return moving


def summarise(
    entries: Sequence[Entry], model_flops: float, attention_forward: float, attention_backward: float
) -> dict[str, Any]:
    """Sums of a ledger, its roofline, and the bound of MFU.

    Args:
        model_flops: of the step, as the MFU counts them.
        attention_forward, attention_backward: TFLOP/s.
    """
    time = {kind: 0.0 for kind in KINDS}
    for entry in entries:
        time[entry.cost.kind] += seconds(entry, attention_forward, attention_backward)
    step = sum(time.values())
    return {
        "totals": {kind: _total(e for e in entries if e.cost.kind == kind) for kind in KINDS},
        "kernels": sum(entry.cost.kernels for entry in entries),
        "model_flops": model_flops,
        "roofline_seconds": time | {"step": step},
        "mfu_bound": model_flops / (step * PEAK_FLOPS),
        "fused": [
            {name: row[name] for name in ("operator", "kernels", "read", "written")}
            for row in grouped(entries, "operator")
            if row["operator"].startswith("millrace::")
        ],
    }


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """Enter in both rows how their bytes outside products and attention, and their times, relate."""
    for row in (ours, peer):
        row["other_bytes_to_peer"] = row["totals"]["other"]["bytes"] / peer["totals"]["other"]["bytes"]
        row["time_to_peer"] = row["roofline_seconds"]["step"] / peer["roofline_seconds"]["step"]


def _total(entries: Iterable[Entry]) -> dict[str, int]:
    entries = list(entries)
    read, written = sum(e.cost.read for e in entries), sum(e.cost.written for e in entries)
    return {
        "read": read,
        "written": written,
        "bytes": read + written,
        "kernels": sum(e.cost.kernels for e in entries),
        "flops": sum(e.cost.flops for e in entries),
    }


def grouped(entries: Sequence[Entry], group: str) -> list[dict[str, Any]]:
    """Sums by kind and phase, and by operator or place as `group` says; most bytes first."""
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        name = {"operator": entry.operator, "block": entry.place, "phase": entry.phase}[group]
        groups[name, entry.phase, entry.cost.kind].append(entry)
    rows = [
        {group: name, "phase": phase, "kind": kind, **_total(found)}
        for (name, phase, kind), found in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each configuration, variant and side."""
    head = [
        "configuration",
        "step",
        "side",
        "GEMM GB",
        "attention GB",
        "other GB",
        "other, to peer",
        "kernels",
    ]
    head += ["GEMM ms", "attention ms", "other ms", "roofline ms", "time to peer", "MFU at most"]
    return Table(head, [_cells(row) for row in rows], left=3)


def _cells(row: dict[str, Any]) -> list[str]:
    time, ours = row["roofline_seconds"], row["side"] == "ours"
    return [
        " ".join([row["config"], *row["overrides"]]),
        row["variant"],
        row["side"],
        *(f"{row['totals'][kind]['bytes'] / 1e9:.2f}" for kind in KINDS),
        f"{row['other_bytes_to_peer']:.3f}" if ours else "",
        str(row["kernels"]),
        *(f"{time[kind] * 1e3:.2f}" for kind in (*KINDS, "step")),
        f"{row['time_to_peer']:.3f}" if ours else "",
        f"{row['mfu_bound']:.1%}",
    ]


def assumptions(rates: dict[str, float]) -> str:
    """What the roofline takes for granted, in a sentence."""
    return (
        f"The roofline assumes {rates['gemm_flops_per_second'] / 1e12:g} TFLOP/s in products, "
        f"{rates['attention_forward_flops_per_second'] / 1e12:g} and "
        f"{rates['attention_backward_flops_per_second'] / 1e12:g} TFLOP/s in attention forward and backward, "
        f"{rates['copy_bytes_per_second'] / 1e12:g} TB/s in all else, nothing overlapped, no launch, no "
        "optimizer; so it bounds the speed from above, and is no measurement. MFU is of "
        f"{rates['peak_flops_per_second'] / 1e12:g} TFLOP/s."
    )


def heaviest(entries: Sequence[Entry], group: str, top: int) -> Table:
    """The rows of a ledger that move most outside products and attention."""
    names = list(dict.fromkeys((group, "phase")))
    rows = [row for row in grouped(entries, group) if row["kind"] == "other"]
    total = sum(row["bytes"] for row in rows)
    lines = [
        [
            *(row[name] for name in names),
            *(f"{row[side] / 1e9:.3f}" for side in ("read", "written")),
            str(row["kernels"]),
            f"{row['bytes'] / total:.1%}",
        ]
        for row in rows[:top]
    ]
    return Table([*names, "read GB", "written GB", "kernels", "share"], lines, left=len(names))


def draw(content: Result, path: Path) -> None:
    """The bytes of a micro-batch, ours beside the peer's, as a chart."""
    names = {"ours": "Millrace", "peer": "diffusers' PRX, eager"}
    rows = [row for row in content["rows"] if not row["overrides"]]
    moved = [sum(part["bytes"] for part in row["totals"].values()) for row in rows]
    largest = {row["config"]: 0 for row in rows}
    for row, total in zip(rows, moved, strict=True):
        largest[row["config"]] = max(largest[row["config"]], total)
    groups: dict[str, list[Bar]] = defaultdict(list)
    for row, total in zip(rows, moved, strict=True):
        bar = Bar(
            names[row["side"]], total / largest[row["config"]], f"{total / 1e9:.0f} GB", row["side"] == "ours"
        )
        groups[f"{row['config']}, {row['variant']}"].append(bar)
    micro = ", ".join(dict.fromkeys(str(row["micro_batch"]) for row in rows))
    note = (
        f"Read and written by forward and backward of a micro-batch of {micro}; counted, not timed.\n"
        f"Each configuration to its own scale. {content['file']}: {content['time'][:10]}"
    )
    draw_bars(path, "Memory traffic of one micro-batch", groups, note)


def section(results: list[Result]) -> str:
    """Of the performance page: the bytes of a step by our ledger, and the roofline that follows."""
    text = ["## Memory traffic, counted"]
    results = of(results, "traffic")
    if not results:
        return "\n\n".join([*text, "Not counted: no result of `python -m benchmarks traffic`."])
    result = results[-1]
    text += [
        origin(result),
        "Counted, not timed: forward and backward of one micro-batch on meta tensors, every operator with "
        "what it reads and writes; ours with its fused operators, the peer (diffusers' PRX, Photoroom/PRX's "
        f"routing) in eager PyTorch. {assumptions(result['ceilings'])}",
        table(result["rows"]).markdown(),
    ]
    if result["chart"]:
        text.append(f"![Bytes that a micro-batch reads and writes]({CHARTS}/{result['chart']})")
    return "\n\n".join(text)
