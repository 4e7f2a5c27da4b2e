"""Tables of `weights`: bytes, collectives and waits of a step's weights."""

from collections import defaultdict
from typing import Any

from millrace.benchmarks.models.weight_ledger import PARTS
from millrace.benchmarks.report.recording import Result, of, origin
from millrace.benchmarks.report.tables import Table

PRX = 1.17e9
"""Elements of the 1.2 B model, for which the table is written in GB."""
SMALL = 4096
"""Bytes up to which a collective is an agreement (a norm, a flag) and no part of the model's state."""


def per_step(row: dict[str, Any], part: str) -> float:
    """Bytes of a part of the step for each trained element."""
    return sum(row["bytes"][part].values())


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each stage and number of processes: GB a step and process of the 1.2 B model."""
    head = ["ZeRO", "processes", "micro-batches", *(f"{part}, GB" for part in PARTS), "all, GB", "host waits"]
    lines = []
    for row in rows:
        parts = [per_step(row, part) * PRX / 1e9 for part in PARTS]
        lines.append(
            [
                str(row["stage"]),
                str(row["processes"]),
                str(row["accumulation"]),
                *(f"{size:.1f}" for size in (*parts, sum(parts))),
                str(waits(row)),
            ]
        )
    return Table(head, lines, left=0)


def waits(row: dict[str, Any]) -> int:
    """Tensors of the device that the host reads. DeepSpeed looks at the norm again, on the host."""
    return sum(number for where, number in row["host_reads"].items() if "is_invalid_grad_norm" not in where)


def collectives(rows: list[dict[str, Any]]) -> Table:
    """One line for each kind of collective of each stage."""
    head = ["ZeRO", "processes", "part", "collective", "dtype", "number", "GB", "beside backward"]
    lines = []
    for row in rows:
        groups: dict[tuple[str, str, str, bool], list[dict[str, Any]]] = defaultdict(list)
        for found in row["collectives"]:
            groups[found["part"], found["kind"], found["dtype"], found["bytes"] <= SMALL].append(found)
        for (part, kind, dtype, agreement), found in groups.items():
            size = sum(one["bytes"] for one in found)
            beside = sum(one["bytes"] for one in found if one["beside_backward"])
            lines.append(
                [
                    str(row["stage"]),
                    str(row["processes"]),
                    part,
                    kind,
                    dtype,
                    str(len(found)),
                    f"{size:.0f} bytes" if agreement else f"{size / row['elements'] * PRX / 1e9:.1f}",
                    "" if agreement or not size else f"{beside / size:.0%}",
                ]
            )
    return Table(head, lines, left=5)


def section(results: list[Result]) -> str:
    """Of the performance page."""
    text = ["## What the weights of a step cost"]
    results = of(results, "weights")
    if not results:
        return "\n\n".join([*text, "Not counted: no result of `python -m benchmarks weights`."])
    result = results[-1]
    text += [
        origin(result),
        "Counted, not timed: one optimizer step of a small model in BF16 with FP32 masters, clipped, with "
        "EMA, scaled to the 1.17 billion elements of the 1.2 B model. Bytes that operators read and write on "
        "one process, outside matrix products and collectives.",
        table(result["rows"]).markdown(),
        collectives(result["rows"]).markdown(),
    ]
    return "\n\n".join(text)
