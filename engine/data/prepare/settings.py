"""Settings of preparation, and the buckets that pictures are sorted into."""

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from millrace.engine.data.crop import PRX_UNIT, nearest_size, sizes_of
from millrace.engine.util.errors import UserError

ROOM = 1 / 0.8
"""A picture is stored at most this many times larger than its bucket in each edge, up to the difference of
their shapes: the smallest random crop by default is 0.8 of the largest, so nothing is lost in training."""

_BREAKS = re.compile("[\\0-\\x1f\\x7f-\\x9f\\u2028\\u2029]")
"""Control characters and what else begins a new line."""

_PRX_RULE = "|w / h - W / H| over all of crop.prx_buckets"
"""How `prx` chooses a size, for the manifest: sets that were made by another rule are not gone on with."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the shards contain. What does not, such as workers, is not here."""

    resolution: int
    patch: int = 32
    aspect: str = "mixed"
    """That of training: square, mixed or prx."""
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
        unit, named = self.patch, f"--patch {self.patch}"
        if self.aspect == "prx":
            unit, named = PRX_UNIT, f"the {PRX_UNIT} pixels of --aspect prx"
            if PRX_UNIT % self.patch:
                raise UserError(
                    f"--aspect prx has sizes in multiples of {PRX_UNIT} pixels, which --patch {self.patch} "
                    "does not divide; use --aspect mixed"
                )
        low = self.resolution // unit * unit
        if low != self.resolution:
            choices = " or ".join(str(edge) for edge in (low, low + unit) if edge)
            raise UserError(f"--resolution {self.resolution} is not a multiple of {named}; use {choices}")

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(h, w) in pixels, sorted."""
        return sizes_of(self.aspect, self.resolution, self.patch)

    def bucket_of(self, width: int, height: int) -> int:
        """Index of the bucket of a picture of width x height pixels: the size that training gives it."""
        return self.buckets.index(nearest_size(width, height, self.aspect, self.resolution, self.patch))

    def described(self) -> dict[str, Any]:
        """For the manifest: the settings, and the libraries on which the stored bytes depend."""
        columns = list(self.caption_columns)  # as it comes back from JSON
        rule = {"sizes": _PRX_RULE} if self.aspect == "prx" else {}
        return (
            asdict(self)
            | rule
            | {
                "caption_columns": columns,
                "pillow": PIL.__version__,
                "libjpeg": features.version("jpg"),
            }
        )


def relative(path: Path, root: Path) -> str:
    """Path below `root` for people: characters that are no text are written as escapes."""
    return readable(path.relative_to(root).as_posix())


def readable(name: str) -> str:
    """A file name as one line of text that every file and terminal can take."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
