"""A data set of JPEG photographs to measure loading on, made of the built-in pictures, the same everywhere.

    DATA/pictures/00000.jpg .json   parts of the built-in pictures at other sizes, with film grain
    DATA/shards-1024, shards-256    shards that `engine/prepare.py` makes of them
    DATA/mds-1024, files-1024       the stored files once more, byte for byte: MDS shards, and plain files

Enlarged pictures have little detail, and JPEG would store them in a few bytes that decode too fast; the grain
brings them to the bytes of a photograph. Aspect ratios are those that cameras and screens have.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from millrace.engine.data.formats.mds_shards import load_library
from millrace.engine.data.formats.shard_index import Manifest
from millrace.engine.data.prepare.settings import Settings
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.sources.builtin import BuiltinSource
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError

SEED = 20260101
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 1, 4 / 3, 3 / 2, 16 / 9, 2)
"""Width over height; as common as they are listed."""
ROOM = 1.3
"""Edges of a picture over those of the square it is made for: enough for any bucket and a random crop."""
QUALITY = 92
"""As PRX's pictures."""
GRAIN = 6.0
"""Standard deviation of the grain, in levels of 255."""
PATCH = 32
SHARD_BYTES = 16 * 2**20
"""Small, so that every bucket has several shards and each reader finds one."""


def make_pictures(folder: Path, count: int, resolution: int, workers: int) -> Path:
    """Write `count` pictures, each of about (ROOM * resolution)^2 pixels; those that are there stay.

    Picture i depends on (SEED, i) alone, whatever `count` is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(count) if not _path(folder, i).with_suffix(".json").exists()]
    make = partial(make_picture, folder, resolution)
    if workers and len(missing) > 1:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(make, missing, chunksize=8))
    else:
        list(map(make, missing))
    for extra in folder.iterdir():
        if int(extra.stem) >= count:
            extra.unlink()
    return folder


def make_picture(folder: Path, resolution: int, i: int) -> None:
    """Write picture `i` and its captions."""
    rng = np.random.default_rng((SEED, i))
    source = _builtin()
    which = int(rng.integers(len(source)))
    aspect = ASPECTS[int(rng.integers(len(ASPECTS)))]
    picture = source.image(which)
    largest = min(picture.width / aspect, picture.height)
    high = largest * (0.5 + 0.5 * rng.random())
    wide = high * aspect
    left, top = rng.random() * (picture.width - wide), rng.random() * (picture.height - high)
    height = round(ROOM * resolution / aspect**0.5)
    size = (round(height * aspect), height)
    box = (left, top, left + wide, top + high)
    large = picture.resize(size, Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        large = large.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grain = np.roll(_grain(), rng.integers(4096, size=2), (0, 1))
    grain = np.tile(grain, (-(-size[1] // 1024), -(-size[0] // 1024)))[: size[1], : size[0], None]
    pixels = (np.asarray(large, np.int16) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(_path(folder, i), quality=QUALITY)
    captions = source.captions(which)
    text = json.dumps({"long": f"{captions.long} Part {i}.", "short": f"{captions.short} {i}"})
    _path(folder, i).with_suffix(".json").write_text(text)  # the last thing: with it the picture is whole


def make_shards(pictures: Path, output: Path, resolution: int, workers: int, patch: int = PATCH) -> Manifest:
    """The pictures as shards for `resolution`, or what is there of them already."""
    settings = Settings(resolution=resolution, patch=patch, shard_bytes=SHARD_BYTES)
    manifest, _ = prepare(pictures, output, settings, workers, 0.0)
    if manifest.rejects:
        raise UserError(
            f"{output}: prepare.py rejected pictures: {manifest.rejects}; remove it and try again"
        )
    return manifest


def copy_to_mds(shards: Path, output: Path) -> None:
    """The stored files of `shards` as MDS, one folder a bucket, byte for byte."""
    load_library()
    from streaming.base.format.mds import MDSWriter

    source = ShardsSource(shards)
    columns = {
        "image": "jpeg",
        "caption_long": "str",
        "caption_short": "str",
        "height": "int",
        "width": "int",
    }
    for folder, members in _new_folders(source, output):
        height, width = map(int, folder.name.split("x"))
        with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES, hashes=["xxh64"]) as writer:
            for i in members:
                long, short = source.captions(i)
                writer.write(
                    {
                        "image": source.encoded(i),
                        "caption_long": long,
                        "caption_short": short,
                        "height": height,
                        "width": width,
                    }
                )


def copy_to_files(shards: Path, output: Path) -> None:
    """The stored files of `shards` as plain files, one folder a bucket, byte for byte."""
    source = ShardsSource(shards)
    for folder, members in _new_folders(source, output):
        folder.mkdir(parents=True)
        for i in members:
            (folder / f"{i:09d}.jpg").write_bytes(source.encoded(i))


def _new_folders(source: ShardsSource, output: Path) -> Iterator[tuple[Path, list[int]]]:
    """Folders to fill, each with the samples of its bucket; none if `output` was made from these shards."""
    mark = output / "digest"
    if mark.exists() and mark.read_text() == source.digest:
        return
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for number, (h, w) in enumerate(source.buckets):
        yield output / f"{h}x{w}", np.flatnonzero(source.bucket_of == number).tolist()
    mark.write_text(source.digest)


def _path(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.jpg"


@cache
def _builtin() -> BuiltinSource:
    return BuiltinSource()


@cache
def _grain() -> np.ndarray:
    """(1024, 1024) int16, soft as the grain of film is, of standard deviation GRAIN."""
    noise = np.random.default_rng(SEED).standard_normal((1024, 1024))
    soft = noise + 0.5 * (np.roll(noise, 1, 0) + np.roll(noise, 1, 1))
    return (soft * (GRAIN / soft.std())).round().astype(np.int16)
