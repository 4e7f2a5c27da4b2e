"""Charts of results, by matplotlib, as SVG files whose colours follow the reader's light or dark scheme.

A chart is drawn in the colours of `LIGHT`; `chart` replaces each by a variable that the file defines for both
schemes. Words stay words, so that they can be searched, and two charts of one result can be compared.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f23",
    "soft": "#5c6670",
    "line": "#8a949e",
    "faint": "#e3e7ea",
    "grey": "#9aa5b1",
    "green": "#1f6f54",
    "orange": "#b5651d",
    "blue": "#2273a3",
    "purple": "#6a4c93",
    "red": "#b03a2e",
}
DARK = {
    "paper": "#1e2329",
    "ink": "#e6edf3",
    "soft": "#a6b0ba",
    "line": "#7d8894",
    "faint": "#39414b",
    "grey": "#66717d",
    "green": "#4fb58e",
    "orange": "#e0964f",
    "blue": "#5aa9d6",
    "purple": "#a88bd4",
    "red": "#e0766b",
}
SERIES = ("green", "orange", "blue", "purple", "red", "grey")
WIDTH = 6.4
"""Inches of a chart: on a telephone its letters are then still read."""


def _style() -> dict[str, Any]:
    from cycler import cycler

    return {
        "axes.axisbelow": True,
        "axes.edgecolor": LIGHT["line"],
        "axes.facecolor": LIGHT["paper"],
        "axes.labelcolor": LIGHT["soft"],
        "axes.labelsize": 9,
        "axes.prop_cycle": cycler(color=[LIGHT[name] for name in SERIES]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10.5,
        "figure.facecolor": LIGHT["paper"],
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "grid.color": LIGHT["faint"],
        "legend.edgecolor": LIGHT["faint"],
        "legend.fontsize": 8.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "millrace",
        "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["soft"],
        "xtick.labelsize": 8.5,
        "ytick.color": LIGHT["soft"],
        "ytick.labelsize": 8.5,
    }


@contextmanager
def chart(path: Path, panels: int = 1, height: float = 3.2) -> Iterator[list[Any]]:
    """The axes of a chart, one above the other, each `height` inches; the file is written when all is drawn.

    Raises ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_style()):
        figure, grid = pyplot.subplots(panels, figsize=(WIDTH, height * panels), squeeze=False)
        try:
            yield list(grid.ravel())
            figure.tight_layout()
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        finally:
            pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_with_schemes(buffer.getvalue()))


def _with_schemes(svg: str) -> str:
    """A drawing with each colour of `LIGHT` as a variable, and both values of the variables in its style."""
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    light, dark = (" ".join(f"--{k}: {v};" for k, v in colours.items()) for colours in (LIGHT, DARK))
    rules = f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return svg.replace("</style>", f"\n{rules}\n</style>", 1)


def words(svg: str) -> list[str]:
    """What is written in a drawing, in its order; the same with every version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


class Bar(NamedTuple):
    """A bar of `draw_bars`: the text beside it, its length, the text at its end, and whether it is ours."""

    name: str
    value: float
    shown: str
    ours: bool


def draw_bars(
    path: Path, title: str, groups: dict[str, list[Bar]], note: str, mark: float | None = None
) -> None:
    """Horizontal bars in groups, to one scale that begins at zero; a line at `mark`."""
    lines = [line for name, bars in groups.items() for line in (name, *bars)]
    with chart(path, height=0.25 * len(lines) + 1.1) as (axis,):
        for place, line in enumerate(lines):
            if isinstance(line, Bar):
                axis.barh(place, line.value, color=LIGHT["green" if line.ours else "grey"])
                label = axis.annotate(line.shown, (line.value, place), (4, 0), textcoords="offset points")
                label.set(va="center", fontsize=8.5, bbox={"fc": LIGHT["paper"], "ec": "none", "pad": 1})
        axis.set_yticks(range(len(lines)), [line.name if isinstance(line, Bar) else line for line in lines])
        for line, label in zip(lines, axis.get_yticklabels(), strict=True):
            if isinstance(line, str):
                label.set(fontweight="bold", color=LIGHT["ink"])
        if mark is not None:
            axis.axvline(mark, color=LIGHT["red"], linestyle="--", linewidth=1)
        axis.set_ylim(len(lines) - 0.5, -0.7)
        axis.margins(x=0.12)
        axis.tick_params(left=False, bottom=False, labelbottom=False)
        axis.spines["bottom"].set_visible(False)
        axis.set_title(title)
        axis.set_xlabel(note, fontsize=8)


def draw_beside(draw: Callable[[dict[str, Any], Path], None], content: dict[str, Any], output: Path) -> str:
    """Draw a result beside its file; returns what was written, in words."""
    path = output.with_suffix(".svg")
    try:
        draw(content | {"file": output.name}, path)
    except ModuleNotFoundError as error:
        return f"written to {output}; no chart: {error}"
    return f"written to {output} and {path.name}"
