"""What the denoiser is trained to predict, and how that is scored."""

from typing import Literal

from pydantic import Field

from millrace.engine.config.section import Section


class Objective(Section):
    """Flow matching: x_t = (1-t) x0 + t n, v = n - x0; t = 0 is data and t = 1 noise."""

    prediction: Literal["velocity", "sample"] = "velocity"
    """What the network outputs: v, or x0 (x-prediction, compared in v-space)."""
    t_min: float = Field(0.05, gt=0, lt=1)
    """Floor of t in the division (x_t - x) / max(t, t_min) of x-prediction."""
    time_shift: float = Field(1.0, gt=0)
    """s of t -> s t / (1 + (s-1) t): 1 for latents, 3 for pixels at 1024 px; also in sampling."""
    time_uniform: float = Field(0.1, ge=0, le=1)
    """Share of samples whose t is uniform instead of logit-normal."""
    time_floor: float = Field(1e-3, gt=0, lt=0.5)
    """Smallest t that is trained."""
    noise_scale: float = Field(1.0, gt=0)
    """Standard deviation of the noise."""
    contrastive_weight: float = Field(0.0, ge=0, lt=1)
    """Lambda of contrastive flow matching (arXiv 2506.05350); 0 is off, 0.05 the post's value."""
