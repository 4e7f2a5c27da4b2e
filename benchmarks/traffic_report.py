"""Sums, roofline and tables of `traffic.py`."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from columns import aligned
from ledger import Entry

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
        "by_phase": _grouped(entries, "phase"),
        "by_block": _grouped(entries, "block"),
        "by_operator": _grouped(entries, "operator"),
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


def _grouped(entries: Sequence[Entry], group: str) -> list[dict[str, Any]]:
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


def table(rows: list[dict[str, Any]], attention_forward: float, attention_backward: float) -> str:
    """One line for each configuration, variant and side, then what the columns mean."""
    head = ["config", "step", "side", "GEMM GB", "attn GB", "other GB", "ours/peer", "kernels"]
    head += ["GEMM ms", "attn ms", "other ms", "step ms", "ours/peer", "images/s", "MFU <="]
    lines = [head, *(_cells(row) for row in rows)]
    notes = [
        "GB: read and written in forward and backward of one micro-batch; first ours/peer: of other GB",
        f"ms: on a roofline of {GEMM_FLOPS / 1e12:g} TFLOP/s in products, {attention_forward:g} and "
        f"{attention_backward:g} in attention forward and backward, {COPY_BYTES / 1e12:g} TB/s in all else;",
        "    no launch, no overlap, no optimizer",
        f"MFU: model FLOPs over {PEAK_FLOPS / 1e12:g} TFLOP/s in that time",
    ]
    return "\n".join([*aligned(lines, 3), "", *notes])


def _cells(row: dict[str, Any]) -> list[str]:
    time, ours = row["roofline_seconds"], row["side"] == "ours"
    return [
        row["config"] + ("*" if row["overrides"] else ""),
        row["variant"],
        row["side"],
        *(f"{row['totals'][kind]['bytes'] / 1e9:.2f}" for kind in KINDS),
        f"{row['other_bytes_to_peer']:.3f}" if ours else "",
        str(row["kernels"]),
        *(f"{time[kind] * 1e3:.2f}" for kind in (*KINDS, "step")),
        f"{row['time_to_peer']:.3f}" if ours else "",
        f"{row['micro_batch'] / time['step']:.1f}",
        f"{row['mfu_bound']:.3f}",
    ]


def heaviest(rows: list[dict[str, Any]], group: str, top: int) -> str:
    """The rows of each ledger that move most outside products and attention."""
    names = list(dict.fromkeys((group, "phase")))
    text = []
    for row in rows:
        total = row["totals"]["other"]["bytes"]
        found = [entry for entry in row[f"by_{group}"] if entry["kind"] == "other"][:top]
        lines = [[*names, "read GB", "written GB", "kernels", "share"]]
        for entry in found:
            moved = (f"{entry[side] / 1e9:.3f}" for side in ("read", "written"))
            share = f"{entry['bytes'] / total:.1%}"
            lines.append([*(entry[name] for name in names), *moved, str(entry["kernels"]), share])
        title = f"{row['config']}, {row['variant']}, {row['side']}: {total / 1e9:.2f} GB"
        text += [title, *aligned(lines, len(names)), ""]
    return "\n".join(text)
