"""Validation section: pictures that are kept out of training, and the loss of the model on them."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.data import SourceKind
from millrace.engine.config.section import PathText, Section


class Validation(Section):
    """Loss on held-out pictures, at fixed times and with fixed noise.

    Runs whose `share` (or `path`), `samples`, `times` and `seed` are the same look at the same pictures,
    times and noise, so that their losses can be compared picture by picture.
    """

    every_steps: int = Field(0, ge=0)
    """Steps between two measurements during training; 0 is never. The last step of a stage has one too."""
    share: float = Field(0.0, ge=0, lt=1)
    """Share of the pictures of `data` that is kept out of training. A hash of a picture's key and `seed`
    chooses them, so that a picture is held out in every stage, mixture and layout where it has this key."""
    source: SourceKind = "folder"
    """Kind of `path`, as `data.source`."""
    path: PathText | None = None
    """A data set to look at in place of a share of `data`; nothing is taken out of training."""
    samples: int = Field(512, ge=1)
    """Held-out pictures that are looked at, at most: those with the smallest hash."""
    times: int = Field(8, ge=1)
    """Times at which the loss of each is taken: the middles of so many equal intervals of (0, 1)."""
    caption: Literal["long", "short"] = "long"
    """Caption of a picture that has two."""
    seed: int = Field(1138, ge=0, lt=2**63)
    """Of the choice of the pictures and of their noise. Another seed holds out other pictures, among them
    some that a run has been trained on."""

    @model_validator(mode="after")
    def _one_set(self) -> "Validation":
        if self.share and self.path is not None:
            raise ValueError(
                f"validation.share {self.share:g} and validation.path are both given; set one, share of the "
                "training pictures or path of other ones"
            )
        if self.every_steps and not self.share and self.path is None:
            raise ValueError(
                "validation.every_steps is given without pictures; set validation.share, the share of the "
                "training pictures that is held out, or validation.path"
            )
        return self
