"""Sample grids: pictures with their captions on one PNG for people, and single pictures as they are."""

import functools
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from millrace.engine.cli import versions
from millrace.engine.config import Config, Sampling
from millrace.engine.data.sources.pictures import Source
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import atomic_file, write_atomically

TEXT_KEY = "millrace"
"""Keyword of the PNG's text chunk that says how its pictures were made."""
PROMPTS = "prompts.txt"
"""File beside the grids of a run: the captions of their tiles, one a line."""
SMALLEST = 96
"""Pixels that the shorter edge of a shown picture has at least."""

_PAPER, _INK, _FAINT = "white", "black", "#666666"
_GAP = 6
"""Pixels around a tile."""
_LINES = 3
"""Lines of a caption at most."""
_ELLIPSIS = "\u2026"
_HYPHEN = re.compile(r"(?<=\w-)(?=\w)")
_PLAIN = str.maketrans(
    {"\u2013": "-", "\u2014": "-", "\u2212": "-", "\u2044": "/", "\xa0": " "}
    | {"\xdf": "ss", "\xe6": "ae", "\xc6": "Ae", "\xf8": "o", "\xd8": "O", "\u0142": "l", "\u0141": "L"}
    | {"\u0153": "oe", "\u0152": "Oe", "\u0111": "d", "\u0131": "i", "\xd7": "x"}
)
"""Letters and signs that do not decompose, in letters that a small font has."""


@dataclass(frozen=True)
class GridPrompts:
    """What the grids of a run show: `sampling.prompts`, and the first long captions of its data."""

    own: tuple[str, ...]
    data: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """In the order of the tiles."""
        return [*self.own, *self.data]


@dataclass(frozen=True)
class Part:
    """Rows of a grid under one heading."""

    pictures: Tensor
    """(N, 3, h, w) in [-1, 1]."""
    captions: Sequence[str] = ()
    """One a picture; without them tiles have numbers alone."""
    heading: str = ""
    beside: Tensor | None = None
    """Pictures of the same shape, each shown on the left of its own."""


def grid_prompts(sampling: Sampling, source: Source) -> GridPrompts:
    """The captions that a run's grids show."""
    first = range(min(sampling.count, len(source)))
    return GridPrompts(tuple(sampling.prompts), tuple(source.captions(i).long for i in first))


def draw_grid(sampler: Sampler, config: Config, prompts: GridPrompts, path: Path, origin: str) -> None:
    """Sample the prompts of a run as one PNG. They go into `prompts.txt` beside it, a line each in the order
    of the tiles. `origin` names the weights in the file."""
    size, seed = (config.data.resolution, config.data.resolution), config.run.seed
    pictures, own = sampler(prompts.all, size, config.sampling, seed), len(prompts.own)
    parts = [
        Part(pictures[:own], prompts.own, "prompts of the configuration" if prompts.data else ""),
        Part(pictures[own:], prompts.data, "first captions of the data" if own else ""),
    ]
    asked = {"prompts": prompts.all, "seed": seed, "numbers": [*range(len(prompts.all))]}
    made = made_by(config.sampling, origin, size) | asked
    save_grid([part for part in parts if len(part.pictures)], path, config.sampling.tile, made)
    write_atomically(path.parent / PROMPTS, "\n".join(prompts.all) + "\n")


def made_by(sampling: Sampling, origin: str, size: tuple[int, int]) -> dict[str, Any]:
    """What a picture keeps of its making, beside caption and seed: versions, weights, size (h, w), settings.

    It goes into a text chunk of the file.
    """
    settings = sampling_settings(sampling)
    return {"versions": versions().splitlines(), "model": origin, "size": list(size), "sampling": settings}


def sampling_settings(sampling: Sampling) -> dict[str, Any]:
    """The settings that a picture depends on."""
    of_grids = {"every_steps", "prompts", "count", "weights", "tile"}
    return sampling.model_dump(mode="json", exclude=of_grids)


def save_picture(picture: Tensor, path: Path, made_by: dict[str, Any] | None = None) -> None:
    """Write a picture (3, h, w) in [-1, 1] as it is, as PNG. `made_by` goes into a text chunk, as JSON.
    Raises UserError."""
    _save(_images(picture[None])[0], path, made_by)


def save_grid(
    parts: Sequence[Part], path: Path, largest: int = 256, made_by: dict[str, Any] | None = None
) -> None:
    """Write parts of pictures of one size as one PNG, each part as square as possible.

    Small pictures are enlarged by a whole factor, without interpolation, until their shorter edge has
    SMALLEST pixels; larger ones are shrunk until the longer edge has `largest`. Under each tile stand its
    number, from 1 over all parts, and its caption as far as it fits. `made_by` goes into a text chunk of the
    file, as JSON. Raises UserError.
    """
    form = _Form.of(parts, largest)
    sheet = Image.new("RGB", (form.width, sum(form.height_of(part) for part in parts) + _GAP), _PAPER)
    top, number = _GAP, 1
    for part in parts:
        form.draw(part, sheet, top, number)
        top += form.height_of(part)
        number += len(part.pictures)
    _save(sheet, path, made_by)


@dataclass(frozen=True)
class _Form:
    """Measures of a grid in pixels, the same for all its parts."""

    picture: tuple[int, int]
    """(width, height) of a shown picture."""
    tile: int
    """Width of a tile, of one picture or two."""
    foot: int
    """Height of the text below it."""
    columns: int
    font: ImageFont.FreeTypeFont

    @classmethod
    def of(cls, parts: Sequence[Part], largest: int) -> Self:
        """About as many columns as make the grid square, of these numbers the one that leaves the fewest
        places empty."""
        width, height = shown_size(parts[0].pictures.shape[3], parts[0].pictures.shape[2], largest)
        font = _font(min(12 + max(0, width - 160) // 32, 20))
        captioned = any(caption for part in parts for caption in part.captions)
        foot = _leading(font) * (_LINES if captioned else 1) + 2
        tile = max(width if part.beside is None else 2 * width + 1 for part in parts)
        counts = [len(part.pictures) for part in parts]
        square = math.sqrt(sum(counts) * (height + foot) / tile)
        near = range(max(1, round(0.8 * square)), max(1, round(1.25 * square)) + 1)
        columns = min(near, key=lambda n: (sum(-count % n for count in counts), abs(n - square)))
        columns = min(columns, max(counts))
        return cls((width, height), tile, foot, columns, font)

    @property
    def width(self) -> int:
        """Of the grid."""
        return self.columns * (self.tile + _GAP) + _GAP

    @property
    def _row(self) -> int:
        return self.picture[1] + self.foot + _GAP

    def height_of(self, part: Part) -> int:
        """Of a part with its heading."""
        head = _leading(self.font) + _GAP if part.heading else 0
        return head + -(-len(part.pictures) // self.columns) * self._row

    def draw(self, part: Part, sheet: Image.Image, top: int, first: int) -> None:
        """Draw a part, whose tiles are numbered from `first`."""
        text, width = ImageDraw.Draw(sheet), self.picture[0]
        if part.heading:
            (line,) = wrapped(part.heading, self.font, self.width - 2 * _GAP, 1)
            text.text((_GAP, top), line, _FAINT, self.font)
            top += _leading(self.font) + _GAP
        shown = [part.pictures] if part.beside is None else [part.beside, part.pictures]
        for i, pictures in enumerate(zip(*map(_images, shown), strict=True)):
            left, high = _GAP + i % self.columns * (self.tile + _GAP), top + i // self.columns * self._row
            for place, picture in enumerate(pictures):
                sheet.paste(_resized(picture, self.picture), (left + place * (width + 1), high))
            caption = drawable(part.captions[i], self.font) if part.captions else ""
            lines = wrapped(f"{first + i} {caption}", self.font, self.tile, _LINES)
            below = left, high + self.picture[1] + 2
            text.multiline_text(below, "\n".join(lines), _INK, self.font, spacing=1)


def _leading(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from line to line."""
    return sum(font.getmetrics()) + 1


def shown_size(width: int, height: int, largest: int) -> tuple[int, int]:
    """Width and height that a picture has in a grid."""
    if max(width, height) > largest:
        share = largest / max(width, height)
        return max(1, round(width * share)), max(1, round(height * share))
    factor = max(1, min(-(-SMALLEST // min(width, height)), largest // max(width, height)))
    return width * factor, height * factor


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    enlarged = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow: ASCII and a few signs."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


@functools.cache
def _has_glyph(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether the font draws something of its own for the letter."""
    found, missing = font.getmask(letter), font.getmask("\uffff")
    return found.size != missing.size or bytes(found) != bytes(missing)


def drawable(caption: str, font: ImageFont.FreeTypeFont) -> str:
    """A caption in the letters of the font: accents are dropped, and so is what it lacks (emoji, say).

    Empty where more than half of it is lacking, as of a script that the font does not have.
    """
    plain = unicodedata.normalize("NFKD", caption.translate(_PLAIN))
    letters = [letter for letter in " ".join(plain.split()) if not unicodedata.combining(letter)]
    kept = "".join(letter for letter in letters if _has_glyph(font, letter))
    return " ".join(kept.split()) if 2 * len(kept) > len(letters) else ""


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels, at most so many; what is left out is an ellipsis. A word that is
    longer than a line is broken."""
    lines = [""]
    # A compound word may be parted behind a hyphen.
    parts = [zip(chain(" ", repeat("")), _HYPHEN.split(word), strict=False) for word in text.split()]
    for blank, piece in chain.from_iterable(parts):
        longer = f"{lines[-1]}{blank}{piece}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        rest = piece
        while rest:
            lines[-1] = _beginning(rest, font, width)
            rest = rest[len(lines[-1]) :]
            lines += [""] if rest else []
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + _ELLIPSIS) > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip(" ,.;:") + _ELLIPSIS]


def _beginning(word: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As many letters as fit, at least one."""
    length = len(word)
    while length > 1 and font.getlength(word[:length]) > width:
        length -= 1
    return word[:length]


def _images(pictures: Tensor) -> list[Image.Image]:
    """(N, 3, h, w) in [-1, 1] as images of 8 bits; what is outside is cut off."""
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]


def _save(image: Image.Image, path: Path, made_by: dict[str, Any] | None) -> None:
    chunk = PngInfo()
    if made_by is not None:
        chunk.add_text(TEXT_KEY, json.dumps(made_by))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            image.save(file, "PNG", pnginfo=chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
