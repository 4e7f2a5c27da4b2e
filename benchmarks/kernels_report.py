"""The table and the chart of `kernels.py`, and which implementation is the fastest on a GPU."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from columns import aligned

Row = dict[str, Any]

_COMMON = {"eager": "reference", "ours/triton": "triton", "ours/cuda": "cuda"}
CHOICES = {
    "flow_loss": _COMMON,
    "gated_residual_norm_modulate": _COMMON,
    "gather_tokens": _COMMON,
    "scatter_tokens": _COMMON,
    "geglu": {"eager": "reference", "ours/triton": "triton", "liger-kernel": "liger"},
    "rope_attention": {
        f"ours/{name}": name for name in ("triton", "sdpa", "varlen", "flash_attn", "xformers")
    },
}
"""Operations with a choice, and the names that `measured.json` has for the implementations."""


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Timed rows by (operation, shape, mode), in the order of the run."""
    cases: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "timed":
            cases[row["operation"], row["shape"]["name"], row["mode"]].append(row)
    return dict(cases)


def without_times(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[str]]:
    """Shapes by (operation, implementation, status, reason) of everything that was not timed."""
    found: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] != "timed":
            key = (row["operation"], row["implementation"], row["status"], row["reason"])
            found[key].append(row["shape"]["name"])
    return dict(found)


def is_ours(row: Row) -> bool:
    """Whether a row is one of our implementations."""
    return row["implementation"].startswith("ours/")


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the smallest median."""
    return min(rows, key=lambda row: row["seconds_median"], default=None)


def choices(rows: Iterable[Row]) -> dict[str, str]:
    """The fastest implementation by the keys of `kernels/support/measured.json`.

    It must have been right and timed in every case of its key; it has the smallest geometric mean of forward
    plus backward times. Keys for which nothing qualifies are missing.
    """
    seconds: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        name = CHOICES.get(row["operation"], {}).get(row["implementation"])
        if name is None or row["status"] != "timed" or row["mode"] != "both":
            continue
        seconds[_choice_key(row)][name][row["shape"]["name"]] = row["seconds_median"]
    found = {}
    for key, candidates in seconds.items():
        shapes = {shape for times in candidates.values() for shape in times}
        complete = {name: times for name, times in candidates.items() if times.keys() == shapes}
        if complete:
            found[key] = min(complete, key=lambda name: sum(map(math.log, complete[name].values())))
    return found


def _choice_key(row: Row) -> str:
    if row["operation"] != "rope_attention":
        return row["operation"]
    return "rope_attention_ragged" if row["shape"]["ragged"] else "rope_attention_uniform"


def ceilings_in_words(ceilings: Mapping[str, Any]) -> str:
    """Both ceilings of a device."""
    copy, products = ceilings["copy_bytes_per_second"], ceilings["gemm_flops_per_second"]
    edge, dtype = ceilings["gemm_edge"], ceilings["gemm_dtype"]
    return f"copy {copy / 1e9:.0f} GB/s, {dtype} product of {edge} x {edge} {products / 1e12:.1f} TFLOP/s"


def table(rows: list[Row], ceilings: Mapping[str, Any]) -> str:
    """The rows for people, then what could not be timed, then what the columns mean."""
    head = ["operation", "shape", "mode", "implementation", "us", "p20", "p80", "GB/s", "TFLOP/s"]
    lines = [[*head, "% ceiling", "error"]]
    for case in by_case(rows).values():
        lines += [_cells(row) for row in sorted(case, key=lambda row: row["seconds_median"])]
    untimed = [
        f"{operation} {implementation}: {status} at {', '.join(shapes)}: {reason}"
        for (operation, implementation, status, reason), shapes in without_times(rows).items()
    ]
    notes = [
        f"ceilings of this device: {ceilings_in_words(ceilings)}",
        "GB/s and TFLOP/s: the least work of the operation over the median time, for every implementation",
        "backward: the backward pass alone, on a retained graph; both: forward and backward",
        "error: over the allowed one, which is twice plain PyTorch's in the same dtype (1 = just right)",
    ]
    if any(row.get("host_gaps") for row in rows):
        notes.append("*: the device waited for the host in some calls, so this time is too long")
    return "\n".join([*aligned(lines, 4), "", *untimed, *([""] if untimed else []), *notes])


def _cells(row: Row) -> list[str]:
    seconds = row["seconds_median"]
    return [
        row["operation"],
        row["shape"]["name"],
        row["mode"],
        row["implementation"] + ("*" if row["host_gaps"] else ""),
        *(f"{row[f'seconds_{which}'] * 1e6:.1f}" for which in ("median", "p20", "p80")),
        f"{row['bytes'] / seconds / 1e9:.0f}" if row["bytes"] else "-",
        f"{row['flops'] / seconds / 1e12:.1f}" if row["flops"] else "-",
        f"{row['share_of_ceiling']:.0%}",
        f"{row['error_over_allowed']:.2f}",
    ]


BAR, GAP, LABEL, SCALE = 14, 10, 330, 4
"""Pixels: height of a bar, space between groups, width of the names, width of one percent."""
COLOURS = {True: "#1f6f54", False: "#9aa5b1"}


def chart(rows: list[Row], title: str) -> str:
    """Percent of the ceiling of every implementation, forward and backward together, as SVG.

    Operations without a backward pass are drawn forward.
    """
    cases = by_case(rows)
    groups = [
        (case, timed)
        for case, timed in cases.items()
        if case[2] == "both" or (case[2] == "forward" and (*case[:2], "both") not in cases)
    ]
    body, y = [], 34
    for (operation, shape, mode), timed in groups:
        body.append(_text(4, y + 11, f"{operation}, {shape}, {mode}", bold=True))
        y += BAR + 4
        for row in sorted(timed, key=lambda row: row["seconds_median"]):
            percent = 100 * row["share_of_ceiling"]
            width = max(percent, 0.2) * SCALE
            body.append(_text(18, y + 11, row["implementation"]))
            size = f'width="{width:.1f}" height="{BAR - 2}"'
            body.append(f'<rect x="{LABEL}" y="{y}" {size} fill="{COLOURS[is_ours(row)]}"/>')
            body.append(_text(LABEL + width + 4, y + 11, f"{percent:.0f} %"))
            y += BAR
        y += GAP
    end = LABEL + 100 * SCALE
    line = f'<line x1="{end}" y1="26" x2="{end}" y2="{y}" stroke="#b03a2e" stroke-dasharray="3 3"/>'
    width = end + 200
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 10}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{y + 10}" fill="white"/>',
            _text(4, 16, title, bold=True),
            line,
            _text(end + 4, 34, "measured ceiling"),
            *body,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, words: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight}>{escape(words)}</text>'
