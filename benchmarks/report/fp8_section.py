"""The section of docs/precision.md about training in FP8, from the newest result of `fp8_parity`."""

import statistics
from pathlib import Path

from millrace.benchmarks.quality.ablations_run import averages
from millrace.benchmarks.report.charts import LIGHT, SERIES, chart
from millrace.benchmarks.report.marked_section import with_section
from millrace.benchmarks.report.recording import Result, of
from millrace.benchmarks.report.tables import Table


def page(results: list[Result], before: str) -> str:
    """The page `before`, with what stands between its marks made anew. Raises UserError without the marks."""
    found = [result for result in of(results, "fp8_parity") if not result["quick"]]
    text = section(found[-1]) if found else "Not measured: no result of `python -m benchmarks fp8_parity`."
    return with_section(before, text, "precision.md")


def section(result: Result) -> str:
    """What the docs say, from the results alone."""
    base, *others = result["table"]
    config = result["config"]
    model, data = config["model"], config["data"]
    spread = base["held_out_spread"]
    head = ["arithmetic", "held-out loss", "from BF16, by seed", "training loss from BF16", "steps skipped"]
    lines = [[base["arm"], f"{base['held_out_loss']:.4f}", "-", "-", str(base["skipped"])]]
    for row in others:
        apart = ", ".join(f"{value:+.2%}" for value in row["held_out_distances"])
        training = statistics.fmean(row["training_distances"])
        lines.append(
            [row["arm"], f"{row['held_out_loss']:.4f}", apart, f"{training:.2%}", str(row["skipped"])]
        )
    where = "a CPU, with emulated products" if not result["gpus"] else result["gpus"][0]["name"]
    changed = " with uncommitted changes" if result["dirty"] else ""
    seeds = "One seed: no spread to compare with."
    if spread is not None:
        seeds = (
            f"Seeds of BF16 lie {spread:.2%} apart in the held-out loss (largest to smallest) and "
            f"{base['training_spread']:.2%} in the training loss (mean over pairs)."
        )
    return "\n".join(
        [
            f"Width {model['width']}, {model['depth']} blocks, {data['resolution']} pixels; "
            f"{config['run']['steps']} steps of {data['global_batch']} pictures, "
            f"{len(result['seeds'])} seeds; {result['held_out_pictures']} held-out pictures; on {where}. "
            f"Commit {(result['commit'] or 'unknown')[:12]}{changed}, torch {result['versions']['torch']}, "
            f"torchao {result['torchao'] or 'not installed'}.",
            "",
            Table(head, lines).markdown(),
            "",
            seeds,
            "",
            *(f"- {verdict(row)}" for row in others),
            "",
            f"![Losses](../benchmarks/results/{result['chart']})",
        ]
    )


def draw(result: Result, path: Path) -> None:
    """Training loss, its distance from the baseline's of the same seed, and the held-out loss, as a chart."""
    horizon, baseline = result["horizon"], result["table"][0]["arm"]
    at = {(run["arm"], run["seed"]): run for run in result["runs"]}
    arms = list(dict.fromkeys(arm for arm, _ in at))
    titles = (
        f"training loss, averaged over {horizon} steps",
        f"its distance from {baseline} of the same seed, %",
        "held-out loss",
    )
    with chart(path, panels=3) as axes:
        for (arm, seed), run in at.items():
            smooth = averages(run["loss"], horizon)
            label = arm if seed == result["seeds"][0] else None
            style = {"color": LIGHT[SERIES[arms.index(arm)]], "lw": 1, "label": label}
            axes[0].plot(range(1, len(smooth) + 1), smooth, **style)
            if (base := at.get((baseline, seed))) is not None and arm != baseline:
                other = averages(base["loss"], horizon)
                apart = [100 * (a / b - 1) for a, b in zip(smooth, other, strict=True)]
                axes[1].plot(range(1, len(apart) + 1), apart, **style)
            steps, losses = zip(*((x["step"], x["held_out_loss"]) for x in run["looks"]), strict=True)
            axes[2].plot(steps, losses, marker="o", ms=3, **style)
        for axis, title in zip(axes, titles, strict=True):
            axis.set(xlabel="step", title=title)
            axis.grid()
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        axes[0].set_yscale("log")
        axes[2].set_yscale("log")


def verdict(row: Result) -> str:
    """What the distances of the held-out loss say, by a fixed rule."""
    apart = row["held_out_distances"]
    text = f"`{row['arm']}`: held-out loss {statistics.fmean(apart):+.2%} from BF16 on average"
    if len(apart) > 1:
        same = "higher" if min(apart) > 0 else "lower" if max(apart) < 0 else None
        text += f", {same} with every seed" if same else ", higher or lower with the seed"
    if row["within_spread"] is not None:
        text += (
            f"; {'every' if row['within_spread'] else 'not every'} distance is within the spread of the seeds"
        )
    return f"{text}."
