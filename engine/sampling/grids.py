"""Sample grids: pictures of prompts as one PNG for people."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from millrace.engine.config import Config, Sampling
from millrace.engine.data.sources.pictures import Source
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import atomic_file, write_atomically


def grid_prompts(sampling: Sampling, source: Source) -> list[str]:
    """`sampling.prompts`, or where there are none the first long captions of the data."""
    return list(sampling.prompts) or [
        source.captions(i).long for i in range(min(sampling.count, len(source)))
    ]


def draw_grid(sampler: Sampler, config: Config, prompts: list[str], path: Path) -> None:
    """Sample the prompts as one PNG. They go into `prompts.txt` beside it, in the order of the pictures."""
    size = (config.data.resolution, config.data.resolution)
    save_grid(sampler(prompts, size, config.sampling, config.run.seed), path)
    write_atomically(path.parent / "prompts.txt", "\n".join(prompts) + "\n")


TEXT_KEY = "millrace"
"""Keyword of the PNG's text chunk that says how its pictures were made."""


def save_grid(
    pictures: Tensor, path: Path, columns: int | None = None, made_by: dict[str, Any] | None = None
) -> None:
    """Write pictures (N, 3, h, w) in [-1, 1] as one PNG, row by row; as square as possible by default.
    `made_by` goes into a text chunk of the file, as JSON."""
    count, _, height, width = pictures.shape
    columns = columns or min(count, max(1, round((count * height / width) ** 0.5)))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for i, picture in enumerate(levels):
        sheet.paste(Image.fromarray(picture), ((i % columns) * width, (i // columns) * height))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
            sheet.save(file, form, **({} if made_by is None else {"pnginfo": _text_chunk(made_by)}))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _text_chunk(values: dict[str, Any]) -> PngInfo:
    chunk = PngInfo()
    chunk.add_text(TEXT_KEY, json.dumps(values))
    return chunk
