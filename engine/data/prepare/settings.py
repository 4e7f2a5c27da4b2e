"""Settings of preparation, and the buckets that pictures are sorted into."""

import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from millrace.engine.data.crop import buckets
from millrace.engine.util.errors import UserError

ROOM = 1 / 0.8
"""A picture is stored at most this many times larger than its bucket in each edge, up to the difference of
their shapes: the smallest random crop by default is 0.8 of the largest, so nothing is lost in training."""

_BREAKS = re.compile("[\\0-\\x1f\\x7f-\\x9f\\u2028\\u2029]")
"""Control characters and what else begins a new line."""

_PRX = {
    256: ("160x352 192x320 224x288 256x256", ""),
    512: ("352x704 384x672 384x640 416x608 448x576 480x544 512x512", ""),
    1024: (
        "704x1440 736x1408 736x1376 768x1344 768x1312 832x1216 896x1152 928x1120 992x1056 1024x1024",
        "800x1280 832x1248 1088x960 1184x864 1248x832",
    ),
}
"""Bins of the published PRX pipeline: sizes (h x w) that come both ways round, and those that do not."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the shards contain. What does not, such as workers, is not here."""

    resolution: int
    patch: int = 32
    aspect: str = "mixed"
    """mixed: the engine's buckets; square: one; prx: those of the PRX pipeline."""
    shard_bytes: int = 256 * 2**20
    store: str = "auto"
    """auto: pictures larger than needed are stored smaller; original: JPEG files stay as they are."""
    quality: int = 95
    upscale: bool = False
    """Take pictures smaller than their bucket."""
    picture_column: str | None = None
    """Of parquet files; None looks for usual names."""
    caption_columns: tuple[str, ...] = ()
    """Of parquet files: one for both captions, or (long, short)."""

    def __post_init__(self) -> None:
        low = self.resolution // self.patch * self.patch
        if low != self.resolution:
            choices = " or ".join(str(edge) for edge in (low, low + self.patch) if edge)
            raise UserError(
                f"--resolution {self.resolution} is not a multiple of --patch {self.patch}; use {choices}"
            )
        if self.aspect == "prx" and (self.resolution not in _PRX or 32 % self.patch):
            raise UserError(
                f"--aspect prx has sizes in multiples of 32 for {', '.join(map(str, _PRX))}, not for "
                f"--resolution {self.resolution} --patch {self.patch}; use --aspect mixed"
            )

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(h, w) in pixels, sorted."""
        if self.aspect == "square":
            return ((self.resolution, self.resolution),)
        if self.aspect == "mixed":
            return buckets(self.resolution, self.patch)
        both, single = (
            [tuple(map(int, size.split("x"))) for size in text.split()] for text in _PRX[self.resolution]
        )
        return tuple(sorted({*both, *((w, h) for h, w in both), *single}))

    def bucket_of(self, width: int, height: int) -> int:
        """Index of the bucket nearest in shape to a picture of width x height pixels."""

        def distance(index: int) -> tuple[float, int, int]:
            h, w = self.buckets[index]
            # As `crop.output_size`, so that training at `mixed` gives each picture the size of its folder.
            return abs(math.log(h / w) - math.log(height / width)), abs(h * w - self.resolution**2), h

        return min(range(len(self.buckets)), key=distance)

    def described(self) -> dict[str, Any]:
        """For the manifest: the settings, and the libraries on which the stored bytes depend."""
        columns = list(self.caption_columns)  # as it comes back from JSON
        return asdict(self) | {
            "caption_columns": columns,
            "pillow": PIL.__version__,
            "libjpeg": features.version("jpg"),
        }


def relative(path: Path, root: Path) -> str:
    """Path below `root` for people: characters that are no text are written as escapes."""
    return readable(path.relative_to(root).as_posix())


def readable(name: str) -> str:
    """A file name as one line of text that every file and terminal can take."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
