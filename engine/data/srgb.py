"""Colour: any decoded picture in 8-bit sRGB, transparency over white.

    sixteen bits ──▶ high byte ──▶ embedded ICC profile to sRGB (LittleCMS) ──▶ over white

A picture without a profile is taken as sRGB, as is one whose profile cannot be used, which is counted.
"""

import io
import logging
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

PROFILE = "icc_profile"
"""Of `Image.info`: bytes; None or empty where the file has a profile that cannot be read."""
SAME = 2
"""Levels of 255 by which a profile may differ from sRGB and be taken for it: makers round its curve and its
primaries differently."""
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_SPACES = {"RGB": ("RGB",), "GRAY": ("L",), "CMYK": ("CMYK",)}
"""Modes of pictures that a profile of a colour space fits; grey pictures fit RGB too."""


class UnusableProfile(Exception):
    """A colour profile that cannot be applied to its picture."""


class UnusableProfiles:
    """Counts pictures with such a profile, in any thread, and names the 1st, 10th, 100th, ... in the log."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, where: str, reason: str) -> None:
        with self._lock:
            self.count += 1
            count = self.count
        if count == 10 ** (len(str(count)) - 1):
            log.warning(
                "%s: its colour profile cannot be used (%s); its colours are taken as sRGB, as those of %d "
                "pictures so far",
                *(where, reason, count),
            )


unusable_profiles = UnusableProfiles()
"""Of this process."""


def to_srgb(image: Image.Image, where: str) -> Image.Image:
    """A decoded picture in mode RGB; `where` names it where its profile cannot be used."""
    image = _eight_bits(image)
    transform = None
    try:
        transform = transform_of(image.info, image.mode)
    except UnusableProfile as problem:
        unusable_profiles.add(where, str(problem))
    if not image.has_transparency_data:
        return _converted(image, transform)
    rgba = image.convert("RGBA")
    if transform is not None:
        alpha = rgba.getchannel("A")
        rgba = _converted(rgba.convert("RGB"), transform)
        rgba.putalpha(alpha)
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def transform_of(info: Mapping[Any, Any], mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings a picture of a mode with `Image.info` to sRGB; None where nothing is to be done.

    Raises UnusableProfile.
    """
    if PROFILE not in info:
        return None
    if not info[PROFILE]:
        raise UnusableProfile("it is incomplete")
    found = _transform(info[PROFILE], _profiled(mode))
    if isinstance(found, str):
        raise UnusableProfile(found)
    return found


def has_unusable_profile(image: Image.Image) -> bool:
    """Whether a picture, decoded or not, has a colour profile that cannot be applied to it."""
    try:
        transform_of(image.info, image.mode)
    except UnusableProfile:
        return True
    return False


def _profiled(mode: str) -> str:
    """The mode of the values that a profile is for: of grey and of colour without transparency."""
    if mode in ("1", "L", "LA", "La", "I") or mode.startswith("I;16"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | str | None:
    """A transform, None for one that changes nothing that counts, or why there is none."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if space == "RGB" and mode == "L":
            mode = "RGB"
        if mode not in _SPACES.get(space, ()):
            return f"it is for {space}, the picture is {mode}"
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", _INTENT, _FLAGS)
        probe = _probe(mode)
        there = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    except Exception as error:  # LittleCMS's own, and whatever Pillow makes of a damaged file
        return " ".join(str(error).split())[:100] or type(error).__name__
    if mode != "CMYK" and np.abs(there - np.asarray(probe.convert("RGB"))).max() <= SAME:
        return None
    return transform


def _probe(mode: str) -> Image.Image:
    """Colours from all over a mode."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 18 if mode == "RGB" else 5).astype(np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), -1).reshape(1, -1, len(mode))
    return Image.fromarray(grid, mode) if mode == "CMYK" else Image.fromarray(grid)


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image.convert(transform.input_mode), transform)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen-bit samples by their high byte, where Pillow has not done that."""
    info = image.info
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip these at 255 instead of scaling them.
        values = np.array(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if "transparency" in info:
            alpha = np.where(values == info["transparency"], 0, 255).astype(np.uint8)
            grey = Image.merge("LA", (grey, Image.fromarray(alpha)))
        if PROFILE in info:
            grey.info[PROFILE] = info[PROFILE]
        return grey
    return image
