"""Where a step's time goes: text, chart and section of the performance page."""

from pathlib import Path

from millrace.benchmarks.report.charts import LIGHT, chart
from millrace.benchmarks.report.recording import CHARTS, Result, gpu_of, of, origin
from millrace.benchmarks.report.tables import Table

NOT_MEASURED = "Not measured: no result of `benchmarks/throughput.py --profile` from a GPU."


def table(found: Result) -> Table:
    """Time of each category beside the least that it could take."""
    bounds, step = found["roofline_seconds"] or {}, found["step_seconds"]
    lines = []
    for category, seconds in found["seconds"].items():
        bound = bounds.get(category)
        least = "-" if bound is None else f"{bound * 1e3:.2f}"
        lines.append([category, f"{seconds * 1e3:.2f}", f"{seconds / step:.1%}", least])
    lines.append(["step", f"{step * 1e3:.2f}", "100.0%", ""])
    return Table(["category", "ms", "share", "at least ms"], lines)


def draw(found: Result, path: Path) -> None:
    """A bar for each category, one beginning where the last ended; a mark at the least it could take."""
    rows, bounds = found["seconds"], found["roofline_seconds"] or {}
    step = found["step_seconds"]
    where = gpu_of(found) if found["device"] == "cuda" else found["cpu"]
    began = 0.0
    with chart(path, height=0.45 * len(rows) + 1.6) as (axis,):
        for place, (category, seconds) in enumerate(rows.items()):
            axis.barh(place, seconds * 1e3, left=began * 1e3, color=LIGHT["green"])
            label = f"{seconds * 1e3:.2f} ms, {seconds / step:.1%}"
            if bound := bounds.get(category):
                at = (began + bound) * 1e3
                axis.plot([at, at], [place - 0.45, place + 0.45], color=LIGHT["ink"])
                label += f", at least {bound * 1e3:.2f} ms"
            end = (began + seconds) * 1e3
            axis.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            began += seconds
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * step * 1e3)
        axis.set_title(
            f"One training step of {found['config']}, {found['conditioning']} inputs: {step * 1e3:.1f} ms\n"
            f"{found['devices']} x {where}, micro-batch {found['micro_batch']} of {found['global_batch']}\n"
            f"torch {found['versions']['torch']}{', --smoke' if found['smoke'] else ''}",
            fontsize=9,
        )
        axis.set_xlabel(
            f"ms; no roofline: {found['roofline_missing']}"
            if found["roofline_seconds"] is None
            else "ms; upright: the least it could take, at the copy and product rates measured in this run",
            fontsize=8,
        )


def section(results: list[Result]) -> str:
    """Of the performance page: the newest profile of each step on each GPU, with its chart."""
    text = ["## Where a step's time goes"]
    newest = {
        (gpu_of(result), result["config"], result["conditioning"]): result
        for result in of(results, "profile")
        if result["device"] == "cuda"
    }
    if not newest:
        text.append(NOT_MEASURED)
    for (gpu, config, conditioning), result in newest.items():
        text += [f"### {config}, {conditioning}, {gpu}", origin(result), table(result).markdown()]
        if result["chart"]:
            text.append(f"![Where the time of the step went]({CHARTS}/{result['chart']})")
    return "\n\n".join(text)
