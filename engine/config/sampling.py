"""Pictures made during training and afterwards."""

from typing import Literal

from pydantic import Field

from millrace.engine.config.section import Section


class Sampling(Section):
    """Pictures made during training, and the defaults of `engine/sample.py`."""

    every_steps: int = Field(0, ge=0)
    """Steps between sample grids during training; 0 is never."""
    prompts: tuple[str, ...] = ()
    """Captions of the grid; empty takes the first captions of the data."""
    count: int = Field(16, ge=1)
    """Pictures in the grid when `prompts` is empty."""
    steps: int = Field(28, ge=1)
    """Solver steps."""
    solver: Literal["euler", "heun"] = "euler"
    """`heun` evaluates the model twice a step."""
    guidance: float = Field(5.0, ge=0)
    """Scale of classifier-free guidance; 1 is off."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """`auto` takes EMA where the run has one."""
