"""Objective section: what the denoiser is trained to predict, and the terms of its loss."""

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from millrace.engine.config.conditioning import Autoencoder
from millrace.engine.config.data import Data
from millrace.engine.config.section import PathText, Section

_LEAST_SHARE = 0.01
"""Share of the time distribution that must lie above `time_floor`; with less, the floor would be the law."""

SMALLEST_VGG = 16
"""Pixels of an edge below which LPIPS' network has nothing left after its four poolings."""


class Lpips(Section):
    """LPIPS (arXiv 1801.03924) of predicted and true picture, for x-prediction in pixels."""

    weight: float = Field(0.0, ge=0)
    """0 is off; 0.1 in PRX's speedrun and in PixelGen (arXiv 2602.02493)."""
    path: PathText | None = None
    """Weights of VGG16 and of the linear heads: one file (safetensors, or a state dict of the `lpips`
    package), or a folder with torchvision's `vgg16*.pth` and the package's `vgg.pth`."""
    resize: float = Field(0.5, gt=0, le=1)
    """Both pictures are made this much smaller first, along each edge, bilinearly."""
    t_max: float = Field(1.0, gt=0, le=1)
    """Samples with a larger t go without; 1 is all (PRX), 0.7 PixelGen's."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the convolutions."""


class PerceptualDino(Section):
    """P-DINO (PixelGen, arXiv 2602.02493): 1 - cosine of DINO's patch features of predicted and true picture,
    for x-prediction in pixels."""

    weight: float = Field(0.0, ge=0)
    """0 is off; 0.01 in PRX's speedrun and in PixelGen."""
    kind: Literal["dinov2", "dinov3"] = "dinov2"
    """Family of the network."""
    path: PathText | None = None
    """Local folder or hub id of the weights; default the published ViT-B on the hub."""
    size: int = Field(224, ge=14)
    """Edge in pixels of the squares that both pictures are resized to, bilinearly; a multiple of the patch
    (14 for dinov2, 16 for dinov3)."""
    t_max: float = Field(1.0, gt=0, le=1)
    """Samples with a larger t go without; 1 is all (PRX), 0.7 PixelGen's."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the network."""


class Objective(Section):
    """Flow matching: x_t = (1-t) x0 + t n, v = n - x0; t = 0 is data and t = 1 noise."""

    prediction: Literal["velocity", "sample"] = "velocity"
    """What the network outputs: v, or x0 (x-prediction, compared in v-space)."""
    t_min: float = Field(0.05, gt=0, lt=1)
    """Floor of t in the division (x_t - x) / max(t, t_min) of x-prediction."""
    time_mean: float = Field(0.0, ge=-5, le=5)
    """Mean of the normal whose sigmoid is t: 0 (PRX), 0.8 (JiT, which writes -0.8 because its t is 1 - t)."""
    time_std: float = Field(1.0, gt=0, le=5)
    """Standard deviation of the same normal: 1 (PRX), 0.8 (JiT)."""
    time_shift: float = Field(1.0, gt=0)
    """s of t -> s t / (1 + (s-1) t): 1 for latents, 3 for pixels at 1024 px; also in sampling."""
    time_uniform: float = Field(0.1, ge=0, le=1)
    """Share of samples whose t is uniform instead of logit-normal."""
    time_floor: float = Field(1e-3, gt=0, lt=0.5)
    """Smallest t that is trained."""
    noise_scale: float | Literal["resolution"] = 1.0
    """Standard deviation of the noise, also in sampling. `resolution` is JiT's rule: edge of the picture in
    pixels / 256, for pictures that are not square the root of their area."""
    contrastive_weight: float = Field(0.0, ge=0, lt=1)
    """Lambda of contrastive flow matching (arXiv 2506.05350); 0 is off, 0.05 the post's value."""
    contrastive_negatives: Literal["roll", "random"] = "roll"
    """Whose target a sample is pushed away from, in its micro-batch: the one before it (PRX), or any other
    with the same chance (the paper's code)."""
    contrastive_empty: bool = True
    """Whether samples without their caption take part in the contrastive term: yes in PRX; no is the paper's
    option, which leaves the unconditional model as flow matching trains it."""
    lpips: Lpips = Lpips()
    dino: PerceptualDino = PerceptualDino()

    @property
    def perceptual(self) -> bool:
        """Whether a term looks at pictures."""
        return self.lpips.weight > 0 or self.dino.weight > 0

    @property
    def cut(self) -> float:
        """Where the standard normal behind t is cut off, so that no shifted time lies below `time_floor`."""
        floor = self.time_floor / (self.time_shift - (self.time_shift - 1) * self.time_floor)
        return (math.log(floor / (1 - floor)) - self.time_mean) / self.time_std

    @field_validator("noise_scale", mode="before")
    @classmethod
    def _positive(cls, value: object) -> object:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "resolution" and not (number and value > 0):
            raise ValueError('expected a positive number or "resolution"')
        return value

    @model_validator(mode="after")
    def _reaches_above_the_floor(self) -> "Objective":
        above = 0.5 * math.erfc(self.cut / math.sqrt(2))
        if above < _LEAST_SHARE:
            raise ValueError(
                f"time_mean {self.time_mean} and time_std {self.time_std} put {1 - above:.1%} of all times "
                f"below time_floor {self.time_floor}; raise the first two or lower the floor"
            )
        return self


def check_perceptual(objective: Objective, autoencoder: Autoencoder, data: Data, patch: int) -> None:
    """Raise ValueError where a term that looks at pictures gets none, or too small ones."""
    for name, weight in (("lpips", objective.lpips.weight), ("dino", objective.dino.weight)):
        if not weight:
            continue
        if objective.prediction != "sample":
            raise ValueError(
                f"objective.{name} compares pictures, which objective.prediction {objective.prediction} does "
                f"not give; set prediction to sample or objective.{name}.weight to 0"
            )
        if autoencoder.kind != "pixels":
            raise ValueError(
                f"objective.{name} compares pictures, but conditioning.autoencoder.kind {autoencoder.kind} "
                f"trains on latents; set kind to pixels or objective.{name}.weight to 0"
            )
    if objective.lpips.weight:
        if objective.lpips.path is None:
            raise ValueError(
                "objective.lpips.path is not set; name a file or folder with the weights of VGG16 and of "
                "LPIPS' linear heads"
            )
        edge = data.resolution
        if data.aspect != "square":
            # Sides of whole patches with about this area differ by a factor of two at most.
            edge = patch * math.ceil(edge / patch / math.sqrt(2) - 0.25)
        small = int(edge * objective.lpips.resize)
        if small < SMALLEST_VGG:
            raise ValueError(
                f"objective.lpips.resize makes edges of {edge} pixels {small} pixels small, LPIPS needs "
                f"{SMALLEST_VGG}; raise resize or data.resolution"
            )
