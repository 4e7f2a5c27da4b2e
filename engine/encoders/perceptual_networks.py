"""The frozen networks of the perceptual losses."""

from typing import NamedTuple

import torch

from millrace.engine.config import Objective
from millrace.engine.encoders.dino import (
    Dino,
    load_dino,
)
from millrace.engine.encoders.lpips import (
    Lpips,
    load_lpips,
)
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.util.errors import UserError

_DINO = "objective.dino.path"


class PerceptualNetworks(NamedTuple):
    """What judges predicted pictures; None where its weight is 0."""

    lpips: Lpips | None = None
    dino: Dino | None = None


def open_perceptual(config: Objective, device: torch.device) -> PerceptualNetworks:
    """The networks that the objective asks for, frozen, on `device`.

    Raises UserError for weights that cannot be used, and for a size that is no multiple of DINO's patch.
    """
    lpips = dino = None
    if config.lpips.weight:
        lpips = load_lpips(config.lpips.path, device, getattr(torch, config.lpips.dtype))
    if config.dino.weight:
        kind, size = config.dino.kind, config.dino.size
        dtype = getattr(torch, config.dino.dtype)
        dino = load_dino(kind, config.dino.path, _DINO, device, dtype, vision_entry(kind).base.source)
        if size % dino.patch:
            near = max(round(size / dino.patch), 1) * dino.patch
            raise UserError(
                f"objective.dino.size {size} is no multiple of the {dino.patch} pixels of a patch of "
                f"{dino.identity}; set it to {near}"
            )
    return PerceptualNetworks(lpips, dino)
