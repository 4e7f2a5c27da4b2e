"""Drawings in SVG: boxes, arrows and words, in colours that follow light and dark.

Written by hand instead of by a plotting library, because the same file stands in README (where it follows the
reader's system), and in the page of the site (where it follows the page's switch), and because it must be the
same bytes with every version of every library: a test compares.
"""

import re
from html import escape

LIGHT = {
    "ink": "#1b1f23",
    "soft": "#5c6670",
    "line": "#8a949e",
    "faint": "#e3e7ea",
    "paper": "#ffffff",
    "green": "#1f6f54",
    "green-pale": "#d6ebe2",
    "blue": "#2273a3",
    "blue-pale": "#d8e9f4",
    "orange": "#b5651d",
    "orange-pale": "#f7e4d1",
    "purple": "#6a4c93",
    "purple-pale": "#e6def0",
    "grey": "#717c87",
    "grey-pale": "#eef0f2",
}
DARK = {
    "ink": "#e6edf3",
    "soft": "#a6b0ba",
    "line": "#7d8894",
    "faint": "#39414b",
    "paper": "#1e2129",
    "green": "#4fb58e",
    "green-pale": "#173f32",
    "blue": "#5aa9d6",
    "blue-pale": "#16384d",
    "orange": "#e0964f",
    "orange-pale": "#4d3218",
    "purple": "#a88bd4",
    "purple-pale": "#35274d",
    "grey": "#8b97a3",
    "grey-pale": "#2b323b",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def style(site: bool) -> str:
    """The rules of the drawings, as a sheet of the site or as part of a file that stands alone."""
    dark = (
        f'[data-md-color-scheme="slate"] .drawing {{ {_variables(DARK)} }}'
        if site
        else f"@media (prefers-color-scheme: dark) {{ .drawing {{ {_variables(DARK)} }} }}"
    )
    rules = [
        f".drawing {{ {_variables(LIGHT)} font-family: {FONT}; }}",
        dark,
        ".drawing text { fill: var(--ink); }",
        ".drawing .mono { font-family: ui-monospace, 'DejaVu Sans Mono', monospace; }",
    ]
    return "\n".join(rules) + "\n"


class Canvas:
    """A drawing; lengths in pixels, y downwards.

    Args:
        title: what a reader who cannot see it is told.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        colour: str = "grey",
        *,
        solid: bool = False,
        dashed: bool = False,
        round: float = 5,
    ) -> None:
        """A rectangle: outlined and pale, or `solid`; a bar without an outline has round 0 and is solid."""
        fill = f"var(--{colour})" if solid else f"var(--{colour}-pale)"
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}" fill="{fill}" '
            f'stroke="var(--{colour})"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        anchor: str = "start",
        colour: str = "ink",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """A line of words with its baseline at y; `anchor` start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        kind = ' class="mono"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{weight}{kind} '
            f'style="fill: var(--{colour})">{escape(words)}</text>'
        )

    def label(self, x: float, y: float, w: float, h: float, *lines: str, colour: str = "grey") -> None:
        """A box with words in its middle: the first line bold, the others small."""
        self.box(x, y, w, h, colour)
        top = y + h / 2 - (len(lines) - 1) * 8 + 4.5
        for i, line in enumerate(lines):
            self.text(
                x + w / 2,
                top + 16 * i,
                line,
                size=13 if i == 0 else 11.5,
                anchor="middle",
                bold=i == 0,
                colour="ink" if i == 0 else "soft",
            )

    def line(
        self,
        *points: tuple[float, float],
        colour: str = "line",
        arrow: bool = False,
        dashed: bool = False,
        width: float = 1.5,
    ) -> None:
        """A line through points, with an arrow at its end if wanted."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="var(--{colour})" stroke-width="{width:g}"{dash}/>'
        )
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            dx, dy = (x - x0) / length, (y - y0) / length
            corners = [
                (x, y),
                (x - 8 * dx - 4 * dy, y - 8 * dy + 4 * dx),
                (x - 8 * dx + 4 * dy, y - 8 * dy - 4 * dx),
            ]
            shape = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
            self.parts.append(f'<polygon points="{shape}" fill="var(--{colour})"/>')

    def curve(self, path: str, colour: str = "line", width: float = 1.5, dashed: bool = False) -> None:
        """A path in SVG's own words."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="var(--{colour})" stroke-width="{width:g}"{dash}/>'
        )

    def svg(self) -> str:
        """The file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" width="{self.width}" '
            f'height="{self.height}" viewBox="0 0 {self.width} {self.height}">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style(site=False)}</style>\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def figure(svg: str, alternative: str = "") -> str:
    """A drawing as part of a page of the site, which has the rules in its style sheet."""
    inner = re.sub(r"<style>.*?</style>\n?", "", svg, flags=re.DOTALL)
    label = f' aria-label="{escape(alternative)}"' if alternative else ""
    return f'<figure class="drawing-frame"{label}>\n{inner.strip()}\n</figure>'
