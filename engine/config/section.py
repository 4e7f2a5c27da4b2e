"""Base class of all sections of the configuration."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused, defaults validated too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


AUTO = "auto"
"""Chosen at the start of a run by the planner, for its device and its processes."""

Share = Annotated[float, Field(ge=0, lt=1)]
