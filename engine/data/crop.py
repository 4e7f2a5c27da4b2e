"""Crop and resize: from a picture of any size to a tensor whose edges are multiples of the patch.

`square` gives resolution x resolution. `mixed` gives the bucket nearest to the picture's own shape: buckets
are all (h, w) in whole patches with an area close to resolution^2 and an aspect between 1:2 and 2:1. `prx`
does so with the sizes and the distance of Photoroom/PRX. A crop has the aspect of the output, lies inside the
picture, and is never smaller than the output unless `data.upscale` says so: the smallest random crop is
`data.crop_scale` of the largest one, or the output's size if that is larger. Without a crop the whole picture
becomes the output, and its aspect the output's.
"""

import math
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from millrace.engine.config import Data
from millrace.engine.data.batch import signed_unit
from millrace.engine.util.errors import UserError

MAX_ASPECT = 2.0
PRX_UNIT = 32
"""Pixels that the edges of PRX's sizes are multiples of (`patch_size_pixels` of its configurations)."""
_AREAS = 1.5
"""Areas of buckets for one resolution differ by less than this factor from its square."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive."""


def check_resolution(config: Data, patch: int) -> None:
    """Raises UserError unless `data.resolution` is a whole number of patches (`patch` in pixels)."""
    if config.aspect == "prx" and PRX_UNIT % patch:
        raise UserError(
            f"data.aspect prx has sizes in multiples of {PRX_UNIT} pixels, which the {patch} pixels of a "
            "patch do not divide; set data.aspect to mixed"
        )
    patch = PRX_UNIT if config.aspect == "prx" else patch
    low = config.resolution // patch * patch
    if low != config.resolution:
        choices = " or ".join(str(edge) for edge in (low, low + patch) if edge)
        raise UserError(
            f"data.resolution {config.resolution} is not a multiple of the {patch} pixels of a patch; "
            f"set it to {choices}"
        )


def check_bucket(size: tuple[int, int], config: Data, patch: int) -> None:
    """Raises UserError unless a bucket (h, w) is whole patches of `patch` pixels, near `data.resolution`."""
    (h, w), area = size, config.resolution**2
    if h % patch or w % patch:
        raise UserError(
            f"the bucket {h}x{w} is not in multiples of the {patch} pixels of a patch; prepare the shards "
            f"for patches of {patch} pixels"
        )
    if not area / _AREAS < h * w < area * _AREAS:
        raise UserError(
            f"data.resolution is {config.resolution}, but the shards have a bucket {h}x{w}; set it to "
            f"{round(math.sqrt(h * w) / patch) * patch}, or prepare shards for it"
        )


@lru_cache
def buckets(resolution: int, patch: int) -> tuple[tuple[int, int], ...]:
    """Sizes (h, w) in pixels for `mixed`, sorted.

    For every edge in whole patches the other edge is the whole number of patches that brings the area nearest
    to resolution^2; (h, w) and (w, h) come together.
    """
    area = (resolution / patch) ** 2
    sizes = set()
    for edge in range(1, math.ceil(math.sqrt(area * MAX_ASPECT)) + 1):
        other = round(area / edge)
        if max(edge, other) <= MAX_ASPECT * min(edge, other):
            sizes |= {(edge * patch, other * patch), (other * patch, edge * patch)}
    return tuple(sorted(sizes))


@lru_cache
def prx_buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """Sizes (h, w) in pixels of Photoroom/PRX, sorted (`build_image_size_list` of its `transforms.py`).

    For every edge in whole units the other is the longest one that keeps the area within resolution^2; (h, w)
    and (w, h) come together.
    """
    area = (resolution / PRX_UNIT) ** 2
    sizes = set()
    first, last = math.ceil(math.sqrt(area / MAX_ASPECT)), math.floor(math.sqrt(area * MAX_ASPECT))
    for edge in range(first, last + 1):
        other = math.floor(area / edge)
        sizes |= {(edge * PRX_UNIT, other * PRX_UNIT), (other * PRX_UNIT, edge * PRX_UNIT)}
    return tuple(sorted(sizes))


def sizes_of(aspect: str, resolution: int, patch: int) -> tuple[tuple[int, int], ...]:
    """Sizes (h, w) in pixels that pictures are given with `aspect` square, mixed or prx, sorted."""
    if aspect == "square":
        return ((resolution, resolution),)
    return prx_buckets(resolution) if aspect == "prx" else buckets(resolution, patch)


def nearest_size(width: int, height: int, aspect: str, resolution: int, patch: int) -> tuple[int, int]:
    """The one of `sizes_of` for a picture of width x height pixels: of the nearest shape.

    `prx` compares w / h as Photoroom/PRX does; `mixed` its logarithm, and of equals takes the area nearest to
    resolution^2. Training and `millrace prepare` share it, so that both give a picture the same size.
    """
    area = resolution**2

    def distance(size: tuple[int, int]) -> tuple[float, int, int]:
        h, w = size
        if aspect == "prx":
            return abs(w / h - width / height), 0, 0
        return abs(math.log(h / w) - math.log(height / width)), abs(h * w - area), h

    return min(sizes_of(aspect, resolution, patch), key=distance)


def output_size(width: int, height: int, config: Data, patch: int) -> tuple[int, int]:
    """(h, w) in pixels that a picture of width x height pixels is trained at."""
    return nearest_size(width, height, config.aspect, config.resolution, patch)


def crop_box(
    width: int, height: int, size: tuple[int, int], config: Data, rng: np.random.Generator | None, key: str
) -> Box:
    """The part of a picture of width x height pixels that becomes `size` (h, w).

    `rng` scales and places it; None takes the largest centred one, or with `data.crop` none all of it. Raises
    UserError, naming the picture `key`, where the picture is smaller than `size` and `data.upscale` is off.
    """
    h, w = size
    largest = min(width / w, height / h)
    if largest < 1 and not config.upscale:
        raise UserError(
            f"{key}: the picture is {width}x{height} pixels (width x height) but its crop needs {w}x{h}; "
            "set data.upscale to true to enlarge it, lower data.resolution, or remove it"
        )
    if config.crop == "none":
        return 0, 0, width, height
    scale = 1.0
    if rng is not None:
        smallest = config.crop_scale if config.upscale else max(config.crop_scale, 1 / largest)
        scale = smallest + (1 - smallest) * rng.random()
    crop_w = min(width, max(1, round(w * largest * scale)))
    crop_h = min(height, max(1, round(h * largest * scale)))
    if rng is None:
        left, top = (width - crop_w) // 2, (height - crop_h) // 2
    else:
        left, top = int(rng.integers(width - crop_w + 1)), int(rng.integers(height - crop_h + 1))
    return left, top, left + crop_w, top + crop_h


def cut(image: Image.Image, box: Box, size: tuple[int, int]) -> Tensor:
    """`box` of an RGB picture, resized to `size` (h, w): (3, h, w) uint8."""
    return resize(np.array(image.crop(box)), size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A picture (H, W, 3) uint8, or a part of one, resized to `size` (h, w) by Lanczos: (3, h, w) uint8.

    By torch's kernel, which takes a fifth of the time of Pillow's and is within two levels of it where the
    aspect is kept. A torch that does not have it for this filter leaves it to Pillow.
    """
    if _torch_has_lanczos():
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return F.interpolate(planes, size=size, mode="lanczos", antialias=True)[0].contiguous()
    resized = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


@cache
def _torch_has_lanczos() -> bool:
    try:
        F.interpolate(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size=4, mode="lanczos", antialias=True)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def evaluation_view(image: Image.Image, config: Data, patch: int, key: str = "picture") -> Tensor:
    """The picture as evaluation sees it, (3, h, w) float32 in [-1, 1]: its largest centred crop, or all of it
    with `data.crop` none.

    Sizes and errors are those of training; `key` names the picture in errors.
    """
    check_resolution(config, patch)
    size = output_size(image.width, image.height, config, patch)
    return signed_unit(cut(image, crop_box(image.width, image.height, size, config, None, key), size))
