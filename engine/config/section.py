"""Base class of all sections of the configuration."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


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


def _expanded(text: str) -> str:
    """A path, URL or id of a hub with `~`, `$NAME` and `${NAME}` as a shell would read them."""
    expanded = os.path.expandvars(os.path.expanduser(text))
    if lacking := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise ValueError(f"{text}: the environment has no {lacking[1].strip('{}')}")
    if expanded.startswith("~"):
        raise ValueError(f"{text}: there is no user {expanded[1:].partition('/')[0]!r}")
    return expanded


PathText = Annotated[str, AfterValidator(_expanded)]
"""A file or folder, or what stands for one: a URL, the id of a hub."""

Share = Annotated[float, Field(ge=0, lt=1)]
