"""Charts of results, by matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def new_figure(rows: int, columns: int, width: float = 10.0, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure of `rows` x `columns` axes, each row `height` inches, and the axes in reading order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)
    return figure, list(grid.ravel())


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's name, and forget it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_beside(draw: Callable[[dict[str, Any], Path], None], content: dict[str, Any], output: Path) -> str:
    """Draw a result as PNG beside its file; returns what was written, in words."""
    path = output.with_suffix(".png")
    try:
        draw(content, path)
    except ModuleNotFoundError as error:
        return f"written to {output}; no chart: {error}"
    return f"written to {output} and {path.name}"
