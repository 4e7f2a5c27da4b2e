"""The update of the weights: optimizer, learning rate over time, average."""

from typing import Literal

from pydantic import Field

from millrace.engine.config.section import Section, Share


class Optimizer(Section):
    """The update of the weights."""

    kind: Literal["adamw"] = "adamw"
    """AdamW, fused on CUDA."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(1e-15, ge=0)
    """The post's value; it needs the second moment in FP32."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled: weights shrink by lr * weight_decay a step."""
    clip: float = Field(0.2, ge=0)
    """Largest global gradient norm (0.2 in PRX's recipe); 0 is off."""


class Schedule(Section):
    """Learning rate over the run."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After the warm-up: constant; linear or cosine decay to `final`; or warm-up-stable-decay."""
    warmup: int = Field(1_000, ge=0)
    """Steps of linear rise from 0."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the run that decays at its end (`wsd` only)."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak (not for `constant`)."""


class Ema(Section):
    """Exponential moving average of the weights, in FP32."""

    enabled: bool = False
    """Keep the average; sampling and export prefer it."""
    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the average that is kept at an update (0.999 every 10 steps in PRX)."""
    every: int = Field(10, ge=1)
    """Steps between updates."""
    start: int = Field(0, ge=0)
    """The average starts as a copy of the weights at this step."""
