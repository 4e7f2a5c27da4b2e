"""Report pictures of a data set: a few samples of each bucket, and how long the captions are."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from millrace.engine.data.formats.shard_index import bucket_name
from millrace.engine.data.sources.pictures import UnreadablePicture
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.files import write_atomically

THUMBNAIL = 128
"""Height in pixels of a picture on the contact sheet."""
ACROSS = 8
"""Pictures of each bucket."""
BINS = 40
_MARGIN, _LABEL = 8, 150
_INK, _PAPER, _BAR, _LINE = (30, 30, 30), (255, 255, 255), (70, 110, 180), (215, 215, 215)


def draw_contact_sheet(source: ShardsSource, path: Path) -> None:
    """A row for each bucket: its size, its number of samples, and pictures from all over it, as the largest
    centred crop shows them."""
    widths = [round(THUMBNAIL * w / h) for h, w in source.buckets]
    width = _LABEL + ACROSS * (max(widths) + _MARGIN) + _MARGIN
    height = len(source.buckets) * (THUMBNAIL + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (bucket, thumb_width) in enumerate(zip(source.buckets, widths, strict=True)):
        top = _MARGIN + row * (THUMBNAIL + _MARGIN)
        samples = np.flatnonzero(source.bucket_of == row)
        label = f"{bucket_name(bucket)}\n{len(samples):,} samples"
        draw.multiline_text((_MARGIN, top), label, _INK, font)
        chosen = np.unique(np.linspace(0, len(samples) - 1, ACROSS).astype(int))
        for column, sample in enumerate(samples[chosen].tolist()):
            left = _LABEL + column * (thumb_width + _MARGIN)
            sheet.paste(_thumbnail(source, sample, thumb_width), (left, top))
    _save(sheet, path)


def _thumbnail(source: ShardsSource, sample: int, width: int) -> Image.Image:
    try:
        image = source.image(sample)
    except UnreadablePicture:  # the disk lost it since it was written; training will name it
        return Image.new("RGB", (width, THUMBNAIL), (200, 0, 0))
    return ImageOps.fit(image, (width, THUMBNAIL), Image.Resampling.LANCZOS)


def draw_caption_lengths(long: np.ndarray, short: np.ndarray, path: Path) -> None:
    """Histograms of the lengths in characters (n,) of long and short captions, one above the other.

    The last bin also has everything that is longer than 99.5 % of all captions.
    """
    plot_width, plot_height = 800, 220
    sheet = Image.new("RGB", (plot_width + 120, 2 * (plot_height + 80)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (name, lengths) in enumerate((("long", long), ("short", short))):
        left, top = 80, 40 + row * (plot_height + 80)
        bottom = top + plot_height
        step = max(1, int(np.ceil((np.percentile(lengths, 99.5) + 1) / BINS)))
        bins = np.minimum(lengths // step, BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        median, top_length = np.median(lengths), lengths.max()
        title = f"{name} captions: {len(lengths):,}, median {median:.0f}, longest {top_length:,} characters"
        draw.text((left, top - 30), title, _INK, font)
        for share in (0.0, 0.5, 1.0):
            y = bottom - round(share * plot_height)
            draw.line((left, y, left + plot_width, y), _LINE)
            draw.text((left - 8, y), f"{round(share * counts.max()):,}", _INK, font, anchor="rm")
        bar = plot_width / BINS
        for i, count in enumerate(counts.tolist()):
            if count:
                x = left + round(i * bar)
                y = bottom - max(1, round(plot_height * count / counts.max()))
                draw.rectangle((x, y, x + round(bar) - 2, bottom), _BAR)
        for i in range(0, BINS + 1, BINS // 8):
            x = left + round(i * bar)
            draw.text((x, bottom + 6), f"{i * step:,}", _INK, font, anchor="mt")
    _save(sheet, path)


def caption_summary(lengths: np.ndarray) -> dict[str, float]:
    """Of lengths in characters (n,), for the manifest."""
    low, middle, high, higher, top = np.percentile(lengths, [0, 50, 95, 99, 100]).round(1).tolist()
    mean = round(float(lengths.mean()), 1)
    return {"min": low, "median": middle, "mean": mean, "p95": high, "p99": higher, "max": top}


def _save(sheet: Image.Image, path: Path) -> None:
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_atomically(path, file.getvalue())
