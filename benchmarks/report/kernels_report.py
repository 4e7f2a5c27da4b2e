"""Kernels beside their peers: tables, chart, section of the performance page, and the fastest of each."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from millrace.benchmarks.kernels.operation_cases import OPERATIONS as OTHERS
from millrace.benchmarks.report.charts import LIGHT, chart
from millrace.benchmarks.report.recording import CHARTS, Result, gpu_of, of, origin
from millrace.benchmarks.report.tables import Table

Row = dict[str, Any]

OPERATIONS = ("rope_attention", *OTHERS)
NEVER = "never ran on a GPU"

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


def without_times(rows: Iterable[Row]) -> list[str]:
    """A line for each operation, implementation and reason of what was not timed, with the shapes."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] != "timed":
            key = tuple(row[name] for name in ("operation", "implementation", "status", "reason"))
            found[key].append(row["shape"]["name"])
    return [
        f"{operation}, {implementation}: {status} ({', '.join(shapes)}): {reason}"
        for (operation, implementation, status, reason), shapes in found.items()
    ]


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


def table(rows: list[Row]) -> Table:
    """Every implementation that was timed, of each case the fastest first."""
    head = ["operation", "shape", "mode", "implementation", "us", "p20", "p80", "GB/s", "TFLOP/s"]
    lines = [
        _cells(row)
        for case in by_case(rows).values()
        for row in sorted(case, key=lambda row: row["seconds_median"])
    ]
    return Table([*head, "% ceiling", "error"], lines, left=4)


def text(rows: list[Row], ceilings: Mapping[str, Any]) -> str:
    """The table, what could not be timed, and what the columns mean."""
    notes = [
        f"ceilings of this device: {ceilings_in_words(ceilings)}",
        "GB/s and TFLOP/s: the least work of the operation over the median time, for every implementation",
        "backward: the backward pass alone, on a retained graph; both: forward and backward",
        "error: over the allowed one (kernels/support/accuracy.py); right up to 1",
    ]
    if any(row.get("host_gaps") for row in rows):
        notes.append("*: the device waited for the host in some calls, so this time is too long")
    untimed = without_times(rows)
    return "\n".join([table(rows).text(), "", *untimed, *([""] if untimed else []), *notes])


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


def against_peers(rows: list[Row]) -> Table:
    """Our fastest implementation of each case against the fastest peer."""
    lines = []
    for (operation, shape, mode), timed in by_case(rows).items():
        ours = fastest(row for row in timed if is_ours(row))
        peer = fastest(row for row in timed if not is_ours(row))
        cells = [f"`{operation}`", shape, mode]
        cells += (
            [_name(ours), _spread(ours), f"{ours['share_of_ceiling']:.0%}"] if ours else ["none", "-", "-"]
        )
        cells += [_name(peer), f"{peer['seconds_median'] * 1e6:.1f}"] if peer else ["none", "-"]
        ratio = f"{peer['seconds_median'] / ours['seconds_median']:.2f}" if ours and peer else "-"
        lines.append([*cells, ratio])
    head = [
        "operation",
        "shape",
        "mode",
        "ours",
        "us (p20-p80)",
        "% of ceiling",
        "fastest peer",
        "us",
        "ratio",
    ]
    return Table(head, lines)


def _name(row: Result) -> str:
    return row["implementation"].removeprefix("ours/") + (" (host gaps)" if row["host_gaps"] else "")


def _spread(row: Result) -> str:
    median, p20, p80 = (row[f"seconds_{which}"] * 1e6 for which in ("median", "p20", "p80"))
    return f"{median:.1f} ({p20:.1f}-{p80:.1f})"


def section(results: list[Result]) -> str:
    """Of the performance page: every operation against its fastest peer and the ceiling of the device."""
    newest = {gpu_of(result): result for result in of(results, "kernels") if result["device"] == "cuda"}
    text = ["## Kernels"]
    for gpu, result in newest.items():
        notes = (
            f"Ceilings measured in the same run: {ceilings_in_words(result['ceilings'])}. The share of the "
            "ceiling is the least work of the operation (each input read once, each output written once; or "
            "its products) over what the ceiling does in the median time. Ratio: the fastest peer's time "
            "over ours. Peers are those that were installed and right; *both* is forward and backward."
        )
        text += [f"### {gpu}", origin(result), notes, against_peers(result["rows"]).markdown()]
        if result["chart"]:
            text.append(f"![Share of the ceiling]({CHARTS}/{result['chart']})")
        if untimed := without_times(result["rows"]):
            text += ["Not timed:", "\n".join(f"- {line}" for line in untimed)]
    timed = {
        row["operation"]
        for result in newest.values()
        for row in result["rows"]
        if row["status"] == "timed" and is_ours(row)
    }
    if without := [[f"`{name}`", NEVER] for name in OPERATIONS if name not in timed]:
        text.append(Table(["operation", "GPU measurement"], without).markdown())
        text.append("`benchmarks/gpu_report.sh` on a machine with a GPU measures them.")
    return "\n\n".join(text)


def draw(content: Result, path: Path) -> None:
    """Percent of the ceiling of every implementation, forward and backward together, as a chart.

    Operations without a backward pass are drawn forward.
    """
    cases = by_case(content["rows"])
    shown = [case for case in cases if case[2] == "both" or (*case[:2], "both") not in cases]
    shown = [case for case in shown if case[2] != "backward"]
    bars = [
        (case, row) for case in shown for row in sorted(cases[case], key=lambda row: row["seconds_median"])
    ]
    places = range(len(bars))
    shares = [100 * row["share_of_ceiling"] for _, row in bars]
    names = [f"{', '.join(case)}: {row['implementation']}" for case, row in bars]
    device = gpu_of(content) if content["device"] == "cuda" else "CPU: compares nothing"
    with chart(path, height=0.2 * len(bars) + 1.5) as (axis,):
        axis.barh(places, shares, color=[LIGHT["green" if is_ours(row) else "grey"] for _, row in bars])
        axis.set_yticks(places, names, fontsize=7)
        for place, share in zip(places, shares, strict=True):
            axis.annotate(
                f"{share:.0f} %", (share, place), (4, 0), textcoords="offset points", va="center", fontsize=7
            )
        axis.axvline(100, color=LIGHT["red"], linestyle="--")
        axis.invert_yaxis()
        axis.set_title(f"Share of the measured ceiling, {device}")
