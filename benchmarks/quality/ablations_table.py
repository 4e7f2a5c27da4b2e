"""What the runs of a logbook amount to: one row each, means and spreads over seeds, curves."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from millrace.benchmarks.report.charts import LIGHT, SERIES, chart
from millrace.benchmarks.report.recording import ROOT
from millrace.engine.comparison.run_curves import HELD_OUT, Curve, RunCurves
from millrace.engine.comparison.verdicts import Row, Setting
from millrace.engine.comparison.verdicts import compare as compare_settings

Result = dict[str, Any]

PUBLISHED = ROOT / "benchmarks" / "published.json"
MEASURES = ("frechet", "accuracy", "recall", "held_out_loss", "loss", "images_per_second", "frechet_curated")
"""What a run yields; of these accuracy, recall and images_per_second are better the higher they are."""
HIGHER = ("accuracy", "recall", "images_per_second")
QUALITY = {"held_out_loss": HELD_OUT["model"], "frechet": "Frechet distance"}
"""What a row is judged by, the loss of the model and its samples, and the curve of it as compare names it."""


class Value(NamedTuple):
    """A measure over seeds."""

    mean: float
    spread: float | None
    """Standard deviation over seeds (n - 1); None for one seed."""
    seeds: int


class Beside(NamedTuple):
    """A measure of a row beside the baseline's, as `millrace compare` judges it."""

    measure: str
    seeds: int
    """Of the row or the baseline, whichever has fewer."""
    row: Row

    @property
    def half(self) -> float | None:
        """Half the width of the interval of the difference; None where the noise is not known."""
        return None if self.row.interval is None else self.row.interval.half

    @property
    def difference(self) -> float:
        """From the baseline; the mean over the seeds that both have, if there are enough of them."""
        interval = self.row.interval
        return self.row.second - self.row.first if interval is None else interval.difference

    @property
    def verdict(self) -> str:
        """better, worse, not decided, one seed; not comparable where the held-out pictures are others."""
        if self.row.verdict == "-":
            return "not comparable"
        return "one seed" if self.seeds < 2 else self.row.verdict


def measures(run: Result) -> dict[str, float]:
    """The measures of a finished run, at its end."""
    found = {key: value for key, value in run["looks"][-1].items() if key in MEASURES}
    return found | {"loss": run["loss"][-1], "images_per_second": run["images_per_second"]}


def finished(result: Result, name: str) -> dict[int, Result]:
    """The finished runs of a row by seed, without the sweep's."""
    runs = [run for run in result["runs"] if run["name"] == name and run.get("lr") is None]
    return {run["seed"]: run for run in runs if run["status"] == "done"}


def value(numbers: list[float]) -> Value:
    """Mean and spread."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Value(statistics.fmean(numbers), spread, len(numbers))


def table(result: Result) -> dict[str, dict[str, Value]]:
    """For each row with a finished run its measures over seeds."""
    found = {}
    for row in result["rows"]:
        runs = [measures(run) for run in finished(result, row["name"]).values()]
        if runs:
            names = [name for name in MEASURES if all(name in run for run in runs)]
            found[row["name"]] = {name: value([run[name] for run in runs]) for name in names}
    return found


def compare(result: Result) -> dict[str, list[Beside]]:
    """Each other row beside the first, by the measures of QUALITY that both have; without the rows that have
    no finished run, and empty where the first has none."""
    settings = {}
    for row in result["rows"]:
        if runs := finished(result, row["name"]):
            settings[row["name"]] = Setting(row["name"], [curves(run) for run in runs.values()])
    first = settings.get(result["rows"][0]["name"])
    found: dict[str, list[Beside]] = {}
    for beside in compare_settings(list(settings.values())) if first else []:
        rows = {row.quantity: row for row in beside.rows}
        seeds = min(len(first.runs), len(beside.setting.runs))
        found[beside.setting.letter] = [
            Beside(key, seeds, rows[title]) for key, title in QUALITY.items() if title in rows
        ]
    return found


def curves(run: Result) -> RunCurves:
    """What compare knows of a run: the measures of QUALITY at each look."""
    found = RunCurves(run["name"], run["seed"], {}, 1)
    for look in run["looks"]:
        for measure, title in QUALITY.items():
            if measure in look:
                found.curves.setdefault(title, Curve()).values[look["step"]] = look[measure]
        if loss := found.curves.get(QUALITY["held_out_loss"]):
            loss.sets[look["step"]] = look.get("held_out_set", "")
            if "held_out_losses" in look:
                loss.losses[look["step"]] = look["held_out_losses"]
    return found


def at_times(result: Result, name: str, shares: tuple[float, ...]) -> list[Value]:
    """The averaged flow loss after each share of the run."""
    runs = list(finished(result, name).values())
    found = []
    for share in shares:
        numbers = []
        for run in runs:
            place = min(
                range(len(run["loss"])), key=lambda i: abs(run["loss_steps"][i] - share * run["steps"])
            )
            numbers.append(run["loss"][place])
        found.append(value(numbers))
    return found


def published_rows() -> dict[str, tuple[Result, Result]]:
    """(row, its table's baseline) of the post by name of the configuration that reproduces it."""
    found: dict[str, tuple[Result, Result]] = {}
    for part in json.loads(PUBLISHED.read_text())["tables"]:
        for row in part["rows"]:
            if row["config"]:
                found.setdefault(row["config"], (row, part["rows"][0]))
    return found


def swept(result: Result) -> dict[str, dict[float, dict[str, float]]]:
    """Measures of the sweep's finished runs by configuration and learning rate."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for run in result["runs"]:
        if run.get("lr") is not None and run["status"] == "done":
            found.setdefault(run["name"], {})[run["lr"]] = measures(run)
    return found


RATED_BY = "held_out_loss"
"""What a sweep goes by: a mean over all held-out pictures and eight times. With one run a rate, the distance
between a few hundred samples would choose by chance."""


def best_rate(rates: dict[float, dict[str, float]]) -> float:
    """The learning rate of a sweep with the lowest `RATED_BY`."""
    return min(rates, key=lambda rate: rates[rate][RATED_BY])


def as_text(result: Result) -> str:
    """The table for a terminal."""
    rows = table(result)
    names = [name for name in MEASURES if any(name in found for found in rows.values())]
    lines = [["configuration", "seeds", *names]]
    for name, found in rows.items():
        seeds = next(iter(found.values())).seeds
        lines.append([name, str(seeds), *(show(found.get(measure)) for measure in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def show(found: Value | None, digits: int = 3) -> str:
    """`mean ± spread`, with so many significant digits of the mean."""
    if found is None:
        return "-"
    if not math.isfinite(found.mean) or found.mean == 0:
        return f"{found.mean:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(found.mean))))
    text = f"{found.mean:.{places}f}"
    return text if found.spread is None else f"{text} ± {found.spread:.{places}f}"


def draw(result: Result, path: Path) -> None:
    """Learning curves, means over the seeds of each row, as a chart; nothing where no row has finished."""
    names = [row["name"] for row in result["rows"] if finished(result, row["name"])]
    if not names:
        return
    looked = [m for m in ("frechet", "accuracy", "recall") if m in table(result)[names[0]]]
    with chart(path, panels=1 + len(looked), height=3.6) as axes:
        for i, name in enumerate(names):
            runs = list(finished(result, name).values())
            # The baseline in the colour of the text; the others in six colours by four dashes.
            style = {
                "color": LIGHT["ink"] if i == 0 else LIGHT[SERIES[(i - 1) % len(SERIES)]],
                "ls": "-" if i == 0 else ("-", "--", ":", "-.")[(i - 1) // len(SERIES) % 4],
                "lw": 2.2 if i == 0 else 1.3,
                "label": name,
            }
            steps = runs[0]["loss_steps"]
            axes[0].plot(
                steps, [statistics.fmean(r["loss"][k] for r in runs) for k in range(len(steps))], **style
            )
            for axis, measure in zip(axes[1:], looked, strict=True):
                marks = [look["step"] for look in runs[0]["looks"]]
                heights = [statistics.fmean(r["looks"][k][measure] for r in runs) for k in range(len(marks))]
                axis.plot(marks, heights, marker="o", ms=3, **style)
        for axis, title in zip(axes, ("flow loss of the training, averaged", *looked), strict=True):
            axis.set(xlabel="step", title=title)
            axis.grid()
            if title != "accuracy" and title != "recall":
                axis.set_yscale("log")
        axes[0].legend(fontsize=6.5, ncols=2)


def draw_samples(result: Result, path: Path, folders: dict[str, Path]) -> None:
    """The samples of each row's last run as PNG, one row each; nothing where there are none."""
    from PIL import Image

    names = [row["name"] for row in result["rows"] if finished(result, row["name"])]
    strips = [folders[name] / "samples.png" for name in names if name in folders]
    strips = [Image.open(path) for path in strips if path.exists()]
    if strips:
        wide, high = max(s.width for s in strips), sum(s.height for s in strips)
        sheet = Image.new("RGB", (wide, high))
        top = 0
        for strip in strips:
            sheet.paste(strip, (0, top))
            top += strip.height
        sheet.resize((2 * wide, 2 * high), Image.Resampling.NEAREST).save(path, optimize=True)
