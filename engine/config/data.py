"""Data section: pictures, captions, mixtures, crops and batches."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from millrace.engine.config.section import AUTO, PathText, Section

LAST_STEP = 10_000_000
"""Last step that a schedule may name: what a mixture gives is counted step by step up to there."""

CacheKind = Literal["text", "latents"]
"""What a cache beside the shards holds: outputs of the text encoder, or of the autoencoder."""

Points = tuple[tuple[int, float], ...]
"""(optimizer step, value) of a piecewise linear function of the step, constant before and after."""

SourceKind = Literal["builtin", "digits", "folder", "shards", "mds"]
_WITHOUT_PATH = ("builtin", "digits", "mixture")
"""Sources that lie in no folder of the user's."""
_WITH_BUCKETS = ("shards", "mds")
"""Sources whose pictures are sorted by size."""


def _scheduled(high: float | None) -> BeforeValidator:
    """Checks a number or a list of points, values in [0, high], with one line for whatever is wrong."""
    bounds = "at least 0" if high is None else f"from 0 to {high:g}"

    def number(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where} is {value!r}; it is a number or a list of [step, value]")
        if not 0 <= value <= (float("inf") if high is None else high) or value == float("inf"):
            raise ValueError(f"{where} is {value:g}; it must be {bounds}")
        return float(value)

    def check(value: Any) -> float | Points:
        if not isinstance(value, list | tuple):
            return number(value, "the value")
        if not value:
            raise ValueError("the list of [step, value] is empty; give it a point or write a number")
        points: list[tuple[int, float]] = []
        for i, point in enumerate(value):
            if not isinstance(point, list | tuple) or len(point) != 2:
                raise ValueError(f"point {i} is {point!r}; write it as [step, value]")
            step = point[0]
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= LAST_STEP:
                raise ValueError(f"the step of point {i} is {step!r}; it is a whole number to {LAST_STEP}")
            if points and step <= points[-1][0]:
                raise ValueError(
                    f"step {step} comes after step {points[-1][0]}; list the points by increasing step"
                )
            points.append((step, number(point[1], f"the value at step {step}")))
        return tuple(points)

    return BeforeValidator(check)


ScheduledShare = Annotated[float | Points, _scheduled(1.0)]
"""A number in [0, 1], or [[step, number], ...]: linear in between, constant before and after."""
ScheduledWeight = Annotated[float | Points, _scheduled(None)]
"""A number >= 0, or [[step, number], ...]: linear in between, constant before and after."""


def _count(value: Any) -> Any:
    if value != AUTO and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"the value is {value!r}; it is a whole number of at least 1, or auto")
    return value


Count = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_count)]


class Columns(Section):
    """Which columns of MDS shards are read; null takes the first of the usual names that is there."""

    image: str | None = None
    """The picture: stored as bytes, jpeg, png or pil. Usual: image, jpg, jpeg, img."""
    long: str | None = None
    """The long caption. Usual: caption_long, long_caption, long, caption, captions, prompt, text."""
    short: str | None = None
    """The short caption. Usual: caption_short, short_caption, short, caption, captions, prompt, text; where
    none of them is there, the long one."""


class Remote(Section):
    """How shards are read whose `data.path` is a URL. None of it changes a sample."""

    requests: int = Field(64, ge=1, le=4096)
    """Requests for ranges of files that each process has under way at a time, for each data set. Four
    times as many samples are asked for ahead."""
    cache_dir: PathText | None = None
    """Folder on a local disk for samples that were read, which all processes of the machine share; null is
    `samples` in the cache folder of the user (MILLRACE_CACHE, else ~/.cache/millrace)."""
    cache_gb: float = Field(16.0, ge=0)
    """Most that this folder holds, in GB of 10^9 bytes; 0 keeps nothing. What was not read for longest goes
    first."""


class Part(Section):
    """One data set of a mixture."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Names the part in keys, log and errors: letters, digits, `_`, `.` and `-`."""
    source: SourceKind = "folder"
    """As `data.source`."""
    path: PathText | None = None
    """As `data.path`."""
    columns: Columns = Columns()
    """As `data.columns`."""
    keys: PathText | None = None
    """As `data.keys`."""
    weight: ScheduledWeight = 1.0
    """Share of the samples, up to a common factor; a number, or [[step, number], ...] with what lies between
    interpolated. 0 is allowed as long as another part has more."""
    long_caption: ScheduledShare | None = None
    """`data.long_caption` for this part, where it differs."""

    @model_validator(mode="after")
    def _path(self) -> "Part":
        _check_path(self, f"part {self.name!r}: ")
        return self


class Data(Section):
    """Pictures, captions, mixtures, crops and batches."""

    source: Literal[SourceKind, "mixture"] = "builtin"
    """`builtin`: the photographs that ship inside scikit-image and scikit-learn, captioned for this project.
    `digits`: the 32 x 32 handwritten digits of scikit-learn, captioned by what is measured of them.
    `folder`: images with a .txt or .json file of the same name beside each.
    `shards`: a folder that millrace prepare has made.
    `mds`: shards of MosaicML's streaming library. `mixture`: several of these."""
    path: PathText | None = None
    """Folder of `source: folder`, `shards` and `mds`; of `shards` also a URL that fsspec reads, such as
    s3://bucket/set."""
    columns: Columns = Columns()
    """Which columns of `source: mds` are the picture and the captions."""
    keys: PathText | None = None
    """File that lists the pictures to keep, one key a line; null keeps all."""
    mixture: tuple[Part, ...] = ()
    """Parts of `source: mixture`."""
    resolution: int = Field(256, ge=1)
    """Edge in pixels of a square picture, or of the square with the same area in `mixed`."""
    aspect: Literal["square", "mixed", "prx", "bucket"] = "square"
    """`mixed` keeps each picture near its own aspect ratio (between 1:2 and 2:1), in one batch. `prx` does so
    at the sizes of Photoroom/PRX, in multiples of 32 pixels whatever the patch. `bucket` does so at the sizes
    that shards were prepared for, and gives each micro-batch a single one of them."""
    bucket_run: int = Field(64, ge=1)
    """Samples in a row that come from one bucket. It fixes the order of `bucket`, and micro_batch divides it,
    so that the order depends neither on the batch nor on the processes."""
    crop: Literal["random", "center", "none"] = "random"
    """`random` scales and places the crop differently each time; `center` takes the largest centred crop;
    `none` resizes the whole picture, which changes its aspect to that of its size, as Photoroom/PRX does."""
    crop_scale: float = Field(0.8, gt=0, le=1)
    """Smallest edge of a random crop as a share of the largest possible crop."""
    flip: float = Field(0.0, ge=0, le=1)
    """Share of samples mirrored left to right."""
    upscale: bool = False
    """Allow pictures smaller than the crop to be enlarged; otherwise they are an error."""
    long_caption: ScheduledShare = 0.5
    """Share of samples that get the long caption, where a picture has both; a number, or
    [[step, number], ...] with what lies between interpolated."""
    global_batch: int = Field(256, ge=1)
    """Samples of one optimizer step, over all processes and micro-batches."""
    micro_batch: Count = 32
    """Samples of one forward pass of one process; `auto` takes the largest that fits."""
    loader: Literal["auto", "dali", "python"] = "auto"
    """What decodes pictures: NVIDIA DALI, or Pillow in threads. `auto` takes DALI where it is installed and
    the source has JPEG files. Samples and their order are the same."""
    cached: tuple[CacheKind, ...] = ()
    """Which caches of shards training reads in place of running the frozen network; `text` also of MDS shards
    with PRX's text latents."""
    remote: Remote = Remote()
    """How shards are read whose path is a URL."""
    verify: bool = False
    """Compare the checksum of each shard when it is first read."""
    workers: int = Field(4, ge=0)
    """Threads that read and decode pictures in each process, at most as many as its share of the machine's
    cores; 0 does it in the training thread."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches prepared ahead."""
    max_bad_share: float = Field(0.0, ge=0, lt=1)
    """Share of unreadable pictures that is tolerated (each counted and named, over all processes); above it
    the run saves and stops. In a mixture it holds for each part."""

    @property
    def follows_steps(self) -> bool:
        """Whether sample i depends on how many samples a step has: in mixtures and scheduled captions."""
        return self.source == "mixture" or not isinstance(self.long_caption, float)

    @model_validator(mode="after")
    def _sources(self) -> "Data":
        _check_path(self, "")
        if self.source == "mixture":
            _check_mixture(self)
        elif self.mixture:
            raise ValueError(f"data.mixture is for source mixture, not {self.source}; set one or the other")
        if self.aspect == "bucket":
            _check_buckets(self)
        if self.cached:
            _check_caches(self)
        return self

    @property
    def named_sources(self) -> dict[str, str]:
        """The kind of each source by how messages call it: of all parts, or of the only one."""
        if self.source == "mixture":
            return {f"part {part.name!r}": part.source for part in self.mixture}
        return {"data.source": self.source}


def _check_path(section: Data | Part, where: str) -> None:
    if section.source not in _WITHOUT_PATH and not section.path:
        raise ValueError(f"{where}source {section.source} needs data.path")
    if section.source in ("folder", "mds") and "://" in section.path:
        raise ValueError(
            f"{where}source {section.source} reads a folder on a disk, not {section.path}; make shards of it "
            "with millrace prepare: source shards reads them from a URL"
        )


def _check_mixture(data: Data) -> None:
    if not data.mixture:
        raise ValueError("source mixture needs data.mixture, a list of parts")
    for key in ("path", "keys"):
        if getattr(data, key) is not None:
            raise ValueError(
                f"data.{key} says nothing in a mixture; set it to null and give {key} to the parts"
            )
    names = [part.name for part in data.mixture]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two parts of the mixture are named {name!r}; name them apart")
    # A sum of linear pieces that are not negative is zero somewhere only if it is at one of the points.
    weights = [part.weight for part in data.mixture]
    steps = {step for weight in weights if not isinstance(weight, float) for step, _ in weight}
    for step in sorted(steps or {0}):
        if not any(value_at(weight, step) for weight in weights):
            raise ValueError(f"all weights of the mixture are 0 at step {step}; give a part some there")


def _check_buckets(data: Data) -> None:
    for where, source in data.named_sources.items():
        if source not in _WITH_BUCKETS:
            raise ValueError(
                f"{where} is {source}, which is not sorted into buckets; prepare shards of it, or set "
                "data.aspect to mixed"
            )
    run, micro = data.bucket_run, data.micro_batch
    if micro != AUTO and run % micro:
        fitting = max(size for size in range(1, min(run, micro) + 1) if run % size == 0)
        raise ValueError(
            f"data.micro_batch {micro} does not divide data.bucket_run {run}, so a micro-batch would hold "
            f"two sizes; set data.micro_batch to {fitting} or data.bucket_run to {-(-run // micro) * micro}"
        )
    if data.source == "mixture" and data.global_batch % run:
        raise ValueError(
            f"data.global_batch {data.global_batch} is not a multiple of data.bucket_run {run}, but steps "
            "of a mixture give whole runs to its parts; set data.bucket_run to "
            f"{math.gcd(data.global_batch, run) if micro == AUTO else micro}"
        )


def _check_caches(data: Data) -> None:
    if len(set(data.cached)) < len(data.cached):
        raise ValueError(f"data.cached names {data.cached[0]!r} twice; remove one")
    there = set(data.named_sources.values())
    if "shards" not in there and not (data.cached == ("text",) and "mds" in there):
        raise ValueError(
            f"data.cached is of shards, but data.source is {data.source}; set data.cached to [] or prepare "
            "shards"
        )
    for part in data.mixture or (data,):
        if part.path and "://" in part.path:
            raise ValueError(
                f"data.cached is read from a disk, not from {part.path}; copy that data set, or set "
                "data.cached to []"
            )
    if "latents" in data.cached and (data.aspect != "bucket" or data.crop != "center" or data.flip > 0):
        raise ValueError(
            "data.cached latents are of pictures that always look the same; set data.aspect bucket, "
            "data.crop center and data.flip 0, or cache text alone"
        )


def value_at(value: float | Points, step: int) -> float:
    """A scheduled value at one optimizer step."""
    if isinstance(value, float):
        return value
    before = [point for point in value if point[0] <= step]
    after = [point for point in value if point[0] > step]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (a, low), (b, high) = before[-1], after[0]
    return low + (high - low) * (step - a) / (b - a)
