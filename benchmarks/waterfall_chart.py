"""The picture of a step: a bar for each category, one beginning where the last ended, over its roofline."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 1200, 210, 330, 84, 30, 14
"""Pixels: picture, names, figures, title, height of a bar, and between two."""
COLOURS = {
    "GEMM": "#1f6f54",
    "attention": "#2e86ab",
    "fused kernels": "#6a4c93",
    "other operators": "#c77d3a",
    "optimizer": "#8d6b94",
    "data and conditioning": "#b58900",
    "communication": "#b03a2e",
    "host gaps": "#9aa5b1",
}
INK, PALE = "#1b1f23", "#e6e8eb"


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture of a profile as PNG."""
    rows = list(found["seconds"].items())
    height = TOP + len(rows) * (BAR + GAP) + 66
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    large, normal, small = (ImageFont.load_default(size) for size in (20, 15, 13))
    step, bounds = found["step_seconds"], found["roofline_seconds"] or {}
    scale = (WIDTH - LEFT - RIGHT) / step
    where = found["gpus"][0]["name"] if found["device"] == "cuda" else found["cpu"]
    title = f"One training step of {found['config']}, {found['conditioning']} inputs: {step * 1e3:.1f} ms"
    pen.text((16, 14), title, INK, large)
    made = f"{found['devices']} x {where}, micro-batch {found['micro_batch']} of {found['global_batch']}"
    made += ", torch " + found["versions"]["torch"] + (", --smoke" if found["smoke"] else "")
    pen.text((16, 46), made, INK, small)
    x, y = float(LEFT), TOP
    for category, seconds in rows:
        pen.text((16, y + 6), category, INK, normal)
        pen.line([(LEFT, y + BAR + GAP // 2), (WIDTH - RIGHT, y + BAR + GAP // 2)], PALE)
        end = x + seconds * scale
        pen.rectangle([x, y, max(end, x + 1), y + BAR], COLOURS[category])
        bound = bounds.get(category)
        figures = f"{seconds * 1e3:.2f} ms  {seconds / step:.1%}"
        if bound:
            mark = min(x + bound * scale, WIDTH - RIGHT)
            pen.line([(x, y + BAR - 4), (mark, y + BAR - 4)], "white", 2)
            pen.line([(mark, y - 3), (mark, y + BAR + 3)], INK, 2)
            figures += f"   at least {bound * 1e3:.2f} ms"
        pen.text((WIDTH - RIGHT + 14, y + 6), figures, INK, normal)
        x, y = end, y + BAR + GAP
    pen.line([(LEFT, y), (WIDTH - RIGHT, y)], INK)
    pen.text((LEFT, y + 6), "0", INK, small)
    pen.text((WIDTH - RIGHT - 50, y + 6), f"{step * 1e3:.1f} ms", INK, small)
    note = (
        "black mark: the least this category could take, at the copy and product rates measured in this run"
    )
    if found["roofline_seconds"] is None:
        note = f"no roofline: {found['roofline_missing']}"
    pen.text((16, y + 32), note, INK, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
