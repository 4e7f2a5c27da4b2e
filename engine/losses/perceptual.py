"""Perceptual losses of x-prediction in pixels: LPIPS and P-DINO of predicted and true picture.

    prediction (T, P) ──unpatchify──▶ pictures (b, 3, h, w) ──resize──▶ network ──▶ one number a sample
                      of one size together                    ▲
    images [B x (3, h, w)] ───────────────────────────────────┘ no gradient

As Photoroom/PRX adds them to its speedrun, after PixelGen (Ma et al., arXiv 2602.02493), except that a sample
above `t_max` counts as zero: PRX divides by the number of samples below it, which would make a sample's loss
depend on its micro-batch. With t_max 1 the two are the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.engine.config import Config, Objective
from millrace.engine.encoders.dino import Dino, load_dino
from millrace.engine.encoders.lpips import Lpips, load_lpips
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.losses.loss_term import LossInputs, LossTerm
from millrace.engine.model.layout import Grid, Layout, unpatchify
from millrace.engine.util.errors import UserError
from millrace.kernels.support.packed import to_device

Distance = Callable[[Tensor, Tensor], Tensor]
"""Pictures (B, 3, h, w) FP32 in [-1, 1] and the true ones -> distance (B,)."""
Features = Callable[[Tensor], Tensor]
"""Pictures (B, 3, h, w) FP32 in [-1, 1] -> features of patches (B, n, dim)."""


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


class PerceptualTerms(LossTerm):
    """LPIPS and P-DINO of the predicted pictures.

    Args:
        config: the objective, whose prediction is of clean pixels.
        patch: edge of a token in pixels.
        networks: that look at the pictures.
    """

    needs_images = True

    def __init__(self, config: Objective, patch: int, networks: PerceptualNetworks) -> None:
        self.config, self.patch, self.networks = config, patch, networks
        self.names = perceptual_terms(config)

    @classmethod
    def build(cls, config: Config, device: torch.device) -> Self | None:
        objective = config.objective
        if not objective.perceptual:
            return None
        return cls(objective, config.model.patch_size, open_perceptual(objective, device))

    def __call__(self, inputs: LossInputs) -> dict[str, Tensor]:
        outputs, batch, _, t, _ = inputs
        lpips, dino = self.networks
        features = dino.patch_tokens if dino else None
        return perceptual_losses(
            outputs.prediction, batch.images, batch.layout, t, self.patch, self.config, lpips, features
        )


def perceptual_terms(config: Objective) -> tuple[str, ...]:
    """Names of the terms that `perceptual_losses` gives."""
    return tuple(name for name in ("lpips", "dino") if getattr(config, name).weight)


def perceptual_losses(
    prediction: Tensor,
    images: Sequence[Tensor],
    layout: Layout,
    t: Tensor,
    patch: int,
    config: Objective,
    distance: Distance | None = None,
    features: Features | None = None,
) -> dict[str, Tensor]:
    """Weighted terms (B,) FP32 of the samples by name, differentiable in `prediction`.

    Args:
        prediction: (T, P), predicted clean patches of pixels.
        images: B true pictures (3, h, w) FP32 in [-1, 1].
        layout: of the batch.
        t: (B,) times.
        patch: edge of a token in pixels.
        config: weights, sizes and the largest time of each term.
        distance: LPIPS, where its weight is not 0.
        features: of DINO, where P-DINO's weight is not 0.
    """
    groups: dict[Grid, list[int]] = {}
    for i, grid in enumerate(layout.grids):
        groups.setdefault(grid, []).append(i)
    tokens = prediction.split(layout.lengths)
    found: dict[str, list[Tensor]] = {name: [] for name in perceptual_terms(config)}
    for grid, members in groups.items():
        whole = len(groups) == 1
        stack = prediction.unflatten(0, (len(members), -1)) if whole else _stack(tokens, members)
        pictures, wanted = unpatchify(stack.float(), grid, patch), _stack(images, members)
        if config.lpips.weight:
            found["lpips"].append(_lpips(pictures, wanted, config.lpips.resize, distance))
        if config.dino.weight:
            found["dino"].append(_dino(pictures, wanted, config.dino.size, features))
    order = None
    if len(groups) > 1:
        # Where each sample came to lie when those of one size were put together.
        places = torch.tensor([i for members in groups.values() for i in members])
        order = to_device(places.argsort(), t.device)
    losses = {}
    for name, parts in found.items():
        term, settings = torch.cat(parts), getattr(config, name)
        term = term if order is None else term[order]
        losses[name] = settings.weight * (t <= settings.t_max) * term
    return losses


def _stack(parts: Sequence[Tensor], members: list[int]) -> Tensor:
    return torch.stack([parts[i] for i in members])


def _lpips(pictures: Tensor, wanted: Tensor, resize: float, distance: Distance) -> Tensor:
    if resize != 1:
        pictures, wanted = (
            F.interpolate(x, scale_factor=resize, mode="bilinear", align_corners=False)
            for x in (pictures, wanted)
        )
    return distance(pictures, wanted)


def _dino(pictures: Tensor, wanted: Tensor, size: int, features: Features) -> Tensor:
    """Mean over patches of 1 - cosine. DINO knows no colours outside [-1, 1], where PRX cuts them too."""
    pictures, wanted = (
        F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False).clamp(-1, 1)
        for x in (pictures, wanted)
    )
    with torch.no_grad():
        theirs = features(wanted).float()
    return (1 - F.cosine_similarity(features(pictures).float(), theirs, dim=2)).mean(1)
