"""Chart of a comparison, by matplotlib: the curves of every setting by samples seen, one panel a quantity."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from millrace.engine.comparison.run_curves import HELD_OUT, TRAINING
from millrace.engine.comparison.verdicts import Setting


def draw(settings: Sequence[Setting], path: Path) -> None:
    """Write the picture: a thin line a run, a thick one for the mean of a setting's seeds.

    Raises ModuleNotFoundError without matplotlib, OSError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    present = {name for setting in settings for run in setting.runs for name in run.curves}
    names = [name for name in HELD_OUT.values() if name in present]
    names += sorted(present - {*names, TRAINING})
    names += [TRAINING] if TRAINING in present else []
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, setting in enumerate(settings):
            colour = "black" if number == 0 else f"C{(number - 1) % 10}"
            curves = [run.curves[name].values for run in setting.runs if name in run.curves]
            for values in curves:
                counts = sorted(values)
                axis.plot(counts, [values[n] for n in counts], color=colour, lw=0.7, alpha=0.5)
            common = sorted(set.intersection(*map(set, curves))) if curves else []
            means = [statistics.fmean(values[n] for values in curves) for n in common]
            axis.plot(common, means, color=colour, lw=1.8, label=f"{setting.letter} ({len(curves)})")
        axis.set(title=name, xlabel="samples seen")
        axis.grid(alpha=0.3)
    axes[0][0].legend(title="setting (seeds)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
