"""Tables: aligned text for a terminal, Markdown for a page."""

from typing import NamedTuple


class Table(NamedTuple):
    """Cells that are text already."""

    head: list[str]
    rows: list[list[str]]
    left: int = 1
    """Columns that stand flush left in a terminal; the others stand flush right."""

    def text(self) -> str:
        """Columns of equal width."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """A table of a page."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
