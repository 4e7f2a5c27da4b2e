"""Alignment of the denoiser's features with those of a frozen vision network."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.section import Section


class Teacher(Section):
    """The frozen network whose features are the target."""

    kind: Literal["dinov2", "dinov3", "classifier"] = "dinov2"
    """`dinov2` and `dinov3` are ViT-L of transformers (patches of 14 and 16 pixels, 1024 features);
    `classifier` is a small network trained in this project (`engine/metrics/classifier.py`)."""
    path: str | None = None
    """Local folder or hub id of the weights; default the published ones on the hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the teacher."""
    cache: str | None = None
    """Folder that keeps the features of each picture once computed; needs pictures that always look the same
    (data.crop center, data.flip 0)."""


class AttentionAlignment(Section):
    """HASTE's second term (arXiv 2505.16792): attention maps follow the teacher's."""

    weight: float = Field(0.0, ge=0)
    """0 is off; the paper's value is 0.5."""
    blocks: tuple[int, ...] = (4, 5, 6, 7)
    """Blocks (0-based) of the denoiser whose attention is aligned."""
    teacher_layers: tuple[int, ...] = (8, 9, 10, 11)
    """Layers (0-based) of the teacher, one for each block."""
    heads: int = Field(12, ge=1)
    """How many of the first heads take part; at most the teacher's."""


class Alignment(Section):
    """REPA (arXiv 2410.06940), iREPA (arXiv 2512.10794) and HASTE (arXiv 2505.16792)."""

    kind: Literal["none", "repa", "irepa"] = "none"
    """`irepa` projects with a 3x3 convolution and normalises the teacher's tokens over space."""
    weight: float = Field(0.5, ge=0)
    """Lambda of the term -mean cosine(projected feature, teacher's feature)."""
    block: int = Field(7, ge=0)
    """Block (0-based) whose output is aligned; 7, the post's, is the eighth."""
    projector: Literal["mlp", "conv", "attention"] | None = None
    """Default `mlp` for repa and `conv` for irepa. `attention` is PRX's replacement of the convolution where
    tokens are missing, as under TREAD."""
    projector_width: int | None = Field(None, ge=1)
    """Hidden features of the mlp; default the teacher's (PRX), 2048 in REPA's code."""
    spatial_norm: Literal["constant", "feature_mean"] = "feature_mean"
    """irepa: what weighs the mean over tokens that is subtracted: `spatial_gamma`, as in the authors' code,
    or each token's own mean feature, as in Photoroom/PRX."""
    spatial_gamma: float = Field(0.6, ge=0)
    """irepa: the constant, 0.6 for latents and 0.8 for pixels in the authors' code."""
    teacher: Teacher = Teacher()
    attention: AttentionAlignment = AttentionAlignment()
    until: int | None = Field(None, ge=1)
    """Step at which alignment ends and the teacher leaves memory; null is never. The post and HASTE stop
    early."""

    @property
    def active(self) -> bool:
        """Whether a teacher is needed."""
        return self.kind != "none" or self.attention.weight > 0

    @model_validator(mode="after")
    def _pairs(self) -> "Alignment":
        ours, theirs = self.attention.blocks, self.attention.teacher_layers
        if len(ours) != len(theirs):
            raise ValueError(
                f"attention.blocks names {len(ours)} blocks, attention.teacher_layers {len(theirs)} layers; "
                "each block needs one layer"
            )
        return self
