"""Pictures, captions, crops and batches."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.section import Section


class Data(Section):
    """Pictures, captions, crops and batches."""

    source: Literal["builtin", "digits", "folder"] = "builtin"
    """`builtin`: the photographs that ship inside scikit-image and scikit-learn, captioned for this project.
    `digits`: the 32 x 32 handwritten digits of scikit-learn, captioned by what is measured of them.
    `folder`: images with a .txt or .json file of the same name beside each."""
    path: str | None = None
    """Folder of `source: folder`."""
    resolution: int = Field(256, ge=1)
    """Edge in pixels of a square picture, or of the square with the same area in `mixed`."""
    aspect: Literal["square", "mixed"] = "square"
    """`mixed` keeps each picture near its own aspect ratio (between 1:2 and 2:1), in one batch."""
    crop: Literal["random", "center"] = "random"
    """`random` scales and places the crop differently each time; `center` takes the largest centred crop."""
    crop_scale: float = Field(0.8, gt=0, le=1)
    """Smallest edge of a random crop as a share of the largest possible crop."""
    flip: float = Field(0.0, ge=0, le=1)
    """Share of samples mirrored left to right."""
    upscale: bool = False
    """Allow pictures smaller than the crop to be enlarged; otherwise they are an error."""
    long_caption: float = Field(0.5, ge=0, le=1)
    """Share of samples that get the long caption, where a picture has both."""
    global_batch: int = Field(256, ge=1)
    """Samples of one optimizer step, over all processes and micro-batches."""
    micro_batch: int = Field(32, ge=1)
    """Samples of one forward pass of one process."""
    workers: int = Field(4, ge=0)
    """Threads that decode pictures in each process; 0 decodes in the training thread."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches prepared ahead."""
    max_bad_share: float = Field(0.0, ge=0, lt=1)
    """Share of unreadable pictures that is tolerated (each counted and named); above it the run stops."""

    @model_validator(mode="after")
    def _path(self) -> "Data":
        if self.source == "folder" and not self.path:
            raise ValueError("source folder needs data.path")
        return self
