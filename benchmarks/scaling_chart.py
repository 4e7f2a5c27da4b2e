"""The chart of `scaling.py`: prediction beside measurement, and images/s per device far from it."""

from pathlib import Path
from typing import Any


def draw(content: dict[str, Any], path: Path) -> None:
    """Write the chart of a result as PNG; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, far = content["rows"], content["modelled"]
    names = list(dict.fromkeys(row["config"] for row in far))
    lines = 1 + -(-len(names) // 2)
    figure, grid = pyplot.subplots(lines, 2, figsize=(10, 3.8 * lines), squeeze=False)
    axes = grid.ravel()
    for axis in axes[2 + len(names) :]:
        axis.set_visible(False)
    labels = [f"ZeRO {row['stage']}\nx {row['processes']}" for row in rows]
    panels = (("seconds", 1.0, "step, s"), ("memory", 2**20, "peak memory, MiB"))
    for axis, (name, unit, title) in zip(axes, panels, strict=False):
        places = range(len(rows))
        axis.bar([i - 0.2 for i in places], [row[name] / unit for row in rows], 0.4, label="measured")
        predicted = [row[f"predicted_{name}"] / unit for row in rows]
        axis.bar([i + 0.2 for i in places], predicted, 0.4, label="model")
        axis.set_xticks(list(places), labels, fontsize=8)
        axis.set_title(f"{title}, {content['cpu'] if content['device'] == 'cpu' else 'GPU'}", fontsize=10)
        axis.legend()
    for axis, name in zip(axes[2:], names, strict=False):
        for stage in range(4):
            points = [row for row in far if row["config"] == name and row["stage"] == stage]
            fits = [row["images_per_second_per_device"] if row["fits"] else None for row in points]
            style = "--" if stage == 2 else "-"  # stages 1 and 2 often coincide
            devices = [row["devices"] for row in points]
            axis.plot(devices, fits, style, marker="o", label=f"ZeRO {stage}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(devices, [str(n) for n in devices], fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("devices (H200, modelled)")
        axis.set_title(f"{name}: images/s per device", fontsize=10)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
