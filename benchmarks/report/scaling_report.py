"""Several processes, measured and modelled: text, chart and section of the performance page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from millrace.benchmarks.models.scaling_model import MEMORY_BOUND, TIME_BOUND
from millrace.benchmarks.report.charts import chart
from millrace.benchmarks.report.recording import CHARTS, Result, of, origin
from millrace.benchmarks.report.tables import Table
from millrace.engine.planning.devices import ASSUMED

NOT_MEASURED = "Not measured: no result of `python -m benchmarks scaling`."
FORMULAS = """\
The model (`engine/planning`; formulas in [planning.md](planning.md)):

- step = slack x (products / FLOP/s + other operators' bytes / bandwidth) + copies of the gradients and the
  update, their bytes / bandwidth + communication that is not hidden. Products by `engine/model/flops.py`,
  other operators' bytes from a trace of the step on tensors without data.
- memory = what is always held (weights, masters, moments, EMA, each over the processes that share it) + the
  worst of backward, reduction and update, activations from the same trace.
- communication: at stage 0 an all-reduce of the gradients; at 1 and 2 the same and an all-gather of the
  weights (DeepSpeed's default reduces with an all-reduce where the ZeRO paper has a reduce-scatter, so it
  moves 3 Psi through each process and not 2); at 3 an all-gather of the weights for forward, again for
  backward if the model is large, and a reduce-scatter."""


def section(results: list[Result]) -> str:
    """Of the performance page: the newest result of each kind of machine."""
    text = ["## Several processes"]
    newest = {_where(result): result for result in of(results, "scaling")}
    if not newest:
        return "\n\n".join([*text, NOT_MEASURED])
    text.append(FORMULAS)
    for where, result in newest.items():
        text += [f"### {where}", origin(result), _setting(result), table(result["rows"]).markdown()]
        text.append(largest_errors(result["rows"]))
        if result["chart"]:
            text.append(f"![Measured and modelled steps]({CHARTS}/{result['chart']})")
    last = list(newest.values())[-1]
    return "\n\n".join([*text, _gpu_points(last["gpu_points"]), *_far(last["modelled"])])


def _where(result: Result) -> str:
    return result["gpus"][0]["name"] if result["device"] == "cuda" else f"{result['cpu']} (CPU)"


def _setting(result: Result) -> str:
    model, data = result["config"]["model"], result["config"]["data"]
    machine = "; ".join(
        f"{name} process(es): {one['gemm_flops_per_second'] / 1e9:.1f} GFLOP/s and "
        f"{one['copy_bytes_per_second'] / 1e9:.1f} GB/s for each"
        for name, one in result["machine"].items()
    )
    shared = (
        f"The processes share {result['cpu_cores']} cores: what a process reaches falls with their number, "
        "and is measured in as many at the same time. "
        if result["device"] == "cpu"
        else ""
    )
    measure = (
        "what PyTorch's CPU allocator has handed out since the process began, read from its profiler, at the "
        "highest point of a step after the first; interpreter, libraries and gloo's own buffers are not in it"
        if result["device"] == "cpu"
        else "most allocated on the GPU in a step"
    )
    rounds = len(result["points"][0]["step_seconds"])
    return (
        f"Width {model['width']}, {model['depth']} blocks, pictures of {data['resolution']} px, micro-batch "
        f"{data['micro_batch']} on each process, {result['config']['precision']['compute']}, AdamW and EMA, "
        f"inputs from memory. {shared}Measured in the same run and given to the model: {machine}, and "
        f"collectives of {len(next(iter(_collectives(result)), []))} sizes. Slack "
        f"{result['rows'][0]['slack']:.2f}, fitted to the step of stage 0 on one process alone; every other "
        f"time and all memories are predictions. Measured in {rounds} rounds; step: the median of the "
        f"fastest. Memory: {measure}. Sent: size of all "
        "collectives' whole tensors in a step, counted where PyTorch is called."
    )


def _collectives(result: Result) -> Iterable[list[Any]]:
    return (points for one in result["machine"].values() for points in one["collectives"].values())


def table(rows: list[Result]) -> Table:
    """A line for each stage and number of processes."""
    head = ["ZeRO", "processes", "step ms", "model", "error", "peak MiB", "model", "error"]
    head += ["highest in", "sent MB", "model"]
    lines = [
        [
            str(row["stage"]),
            str(row["processes"]),
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['predicted_seconds'] * 1e3:.0f}",
            "fitted" if row["calibration"] else f"{row['seconds_error']:+.1%}",
            f"{row['memory'] / 2**20:.1f}",
            f"{row['predicted_memory'] / 2**20:.1f}",
            f"{row['memory_error']:+.1%}",
            row["predicted_phase"],
            f"{row['communication'] / 1e6:.1f}",
            f"{row['predicted_communication'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    return Table(head, lines)


def largest_errors(rows: list[Result]) -> str:
    """How far the model is from what was measured, beside what is accepted."""
    memory, seconds = (max(abs(row[f"{name}_error"]) for row in rows) for name in ("memory", "seconds"))
    return (
        f"Largest error: memory {memory:.1%} (accepted up to {MEMORY_BOUND:.0%}), step {seconds:.1%} "
        f"(accepted up to {TIME_BOUND:.0%})."
    )


def gpu_table(points: list[Result]) -> Table:
    """Steps measured on GPUs beside the model; slack: the one that would have been right."""
    head = [
        "GPU",
        "configuration",
        "ZeRO",
        "step ms",
        "model",
        "error",
        "peak GB",
        "model",
        "error",
        "slack",
    ]
    lines = [
        [
            f"{row['devices']} x {row['device']}",
            " ".join([f"`{row['config']}`", *(f"`{override}`" for override in row["overrides"])]),
            str(row["stage"]),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['predicted_seconds'] * 1e3:.1f}",
            f"{row['seconds_error']:+.1%}",
            f"{row['memory'] / 1e9:.1f}",
            f"{row['predicted_memory'] / 1e9:.1f}",
            f"{row['memory_error']:+.1%}",
            f"{row['slack']:.2f}",
        ]
        for row in points
    ]
    return Table(head, lines, left=2)


def _gpu_points(points: list[Result]) -> str:
    if not points:
        return "On GPUs: no measured step among the results yet."
    return (
        "Steps measured on GPUs (inputs from memory) beside the model as it was then; slack: the one that "
        f"would have been right.\n\n{gpu_table(points).markdown()}"
    )


def _far(rows: list[Result]) -> Iterable[str]:
    """What was modelled; none of it is measured, and the text says so."""
    if rows:
        first = rows[0]
        assumed = ", ".join(f"{key} {ASSUMED[key]:g}" for key in first["assumed"])
        most = max(row["devices"] for row in rows)
        yield (
            f"The chart on the right is no measurement: the model of `{first['config']}` on "
            f"{first['device']}, {first['micro_batch']} images on each device, up to {most} of them, inputs "
            "from memory, reductions beside the backward pass at stages 1 to 3. It rests on data sheets "
            f"(`engine/planning/devices.py`), slack {first['slack']:.2f} and what is assumed: {assumed}. "
            "Hollow points do not fit into memory."
        )


def draw(content: Result, path: Path) -> None:
    """Write the chart of a result: prediction beside measurement, and what is modelled far away."""
    rows, far = content["rows"], content["modelled"]
    titles = (("seconds", 1.0, "step, s"), ("memory", 2**20, "peak memory, MiB"))
    with chart(path, panels=3 if far else 2) as axes:
        for axis, (name, unit, title) in zip(axes, titles, strict=False):
            places = range(len(rows))
            axis.bar([i - 0.2 for i in places], [row[name] / unit for row in rows], 0.4, label="measured")
            predicted = [row[f"predicted_{name}"] / unit for row in rows]
            axis.bar([i + 0.2 for i in places], predicted, 0.4, label="model")
            labels = [f"ZeRO {row['stage']}\nx {row['processes']}" for row in rows]
            axis.set_xticks(list(places), labels, fontsize=8)
            axis.set_title(f"{title}, {_where(content)}")
            axis.margins(y=0.25)
            axis.legend(loc="upper left", ncols=2)
        if far:
            _draw_far(axes[-1], far)


def _draw_far(axis: Any, rows: list[Result]) -> None:
    """Images/s of each device over their number by ZeRO stage; hollow where memory does not suffice."""
    for stage in dict.fromkeys(row["stage"] for row in rows):
        line = [row for row in rows if row["stage"] == stage]
        devices, speeds = (
            [row[name] for row in line] for name in ("devices", "images_per_second_per_device")
        )
        (drawn,) = axis.plot(devices, speeds, "--" if stage == 2 else "-", label=f"ZeRO {stage}")
        for row, x, y in zip(line, devices, speeds, strict=True):
            face = drawn.get_color() if row["fits"] else "none"
            axis.plot(x, y, "o", color=drawn.get_color(), markerfacecolor=face)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row["devices"] for row in rows}), sorted({row["devices"] for row in rows}))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("GPUs")
    axis.set_title(f"modelled, not measured: images/s a GPU, {rows[0]['device']}")
    axis.legend(loc="lower left")
