"""Alignment section: the denoiser's features follow those of a frozen vision network (REPA, iREPA, HASTE)."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.data import Data
from millrace.engine.config.model import Model, Routing
from millrace.engine.config.section import PathText, Section


class Teacher(Section):
    """The frozen network whose features are the target."""

    kind: Literal["dinov2", "dinov3", "classifier"] = "dinov2"
    """`dinov2` and `dinov3` are ViT-L of transformers (patches of 14 and 16 pixels, 1024 features);
    `classifier` is a small network trained in this project (`engine/evaluation/digit_judge.py`)."""
    path: PathText | None = None
    """Local folder or hub id of the weights; default the published ones on the hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Weights, arithmetic and features of the teacher."""
    resize: Literal["bicubic", "nearest"] = "bicubic"
    """How pictures are brought to as many of the teacher's patches as the denoiser has tokens: antialiased
    bicubic, or the nearest pixel, which is what Photoroom/PRX's code does."""
    cache: PathText | None = None
    """Folder that keeps the features of each picture once computed; needs pictures that always look the same
    (data.crop center or none, data.flip 0)."""


class AttentionAlignment(Section):
    """HASTE's second term (arXiv 2505.16792): attention maps follow the teacher's."""

    weight: float = Field(0.0, ge=0)
    """0 is off; the paper's value is 0.5."""
    blocks: tuple[int, ...] = (4, 5, 6, 7)
    """Blocks (0-based) of the denoiser whose attention is aligned."""
    teacher_layers: tuple[int, ...] | None = None
    """Layers (0-based) of the teacher, one for each block; default its last ones, 8 to 11 of the authors'
    ViT-B."""
    heads: int = Field(12, ge=1)
    """How many of the first heads take part; at most the teacher's and the denoiser's."""


class Alignment(Section):
    """REPA (arXiv 2410.06940), iREPA (arXiv 2512.10794) and HASTE (arXiv 2505.16792)."""

    kind: Literal["none", "repa", "irepa"] = "none"
    """`irepa` projects with a 3x3 convolution and normalises the teacher's tokens over space."""
    weight: float = Field(0.5, ge=0)
    """Lambda of the term -mean cosine(projected feature, teacher's feature)."""
    block: int = Field(7, ge=0)
    """Block (0-based) whose output is aligned; 7, the post's, is the eighth."""
    projector: Literal["mlp", "conv", "attention"] | None = None
    """Default `mlp` for repa and `conv` for irepa. `attention`, of 4 heads, is PRX's replacement of the
    convolution where tokens are missing, as inside TREAD's or SPRINT's span."""
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

    @property
    def projector_kind(self) -> str:
        """The projector as set, or the one that goes with `kind`."""
        return self.projector or ("conv" if self.kind == "irepa" else "mlp")

    @model_validator(mode="after")
    def _agrees(self) -> "Alignment":
        ours, theirs = self.attention.blocks, self.attention.teacher_layers
        if not ours or len(set(ours)) < len(ours) or min(ours) < 0:
            raise ValueError(f"attention.blocks is {list(ours)}; name each aligned block once, from 0")
        if theirs is not None and len(ours) != len(theirs):
            raise ValueError(
                f"attention.blocks names {len(ours)} blocks, attention.teacher_layers {len(theirs)} layers; "
                "each block needs one layer"
            )
        if theirs is not None and min(theirs) < 0:
            raise ValueError(f"attention.teacher_layers is {list(theirs)}; layers count from 0")
        if self.until is not None and not self.active:
            raise ValueError("until ends an alignment, but there is none; set kind or remove until")
        if self.attention.weight > 0 and self.teacher.kind == "classifier":
            raise ValueError("attention aligns with a vision transformer; a classifier has no attention")
        if self.attention.weight > 0 and self.teacher.cache:
            raise ValueError("teacher.cache keeps no attention; set attention.weight 0 or teacher.cache null")
        if self.kind != "none" and self.weight == 0:
            raise ValueError(f"kind is {self.kind} but weight is 0; set a weight, or kind none")
        return self


def check_alignment(alignment: Alignment, model: Model, routing: Routing, data: Data) -> None:
    """Raise ValueError where the alignment does not fit what it is applied to."""
    if not alignment.active:
        return
    if alignment.kind != "none":
        _check_projector(alignment, model, routing)
    attention, depth = alignment.attention, model.depth
    if attention.weight > 0:
        last = max(attention.blocks)
        if last >= depth:
            raise ValueError(
                f"alignment.attention.blocks names block {last}, but model.depth is {depth}; "
                f"the last block is {depth - 1}"
            )
        if attention.heads > model.heads:
            raise ValueError(
                f"alignment.attention.heads is {attention.heads}, but model.heads is {model.heads}; "
                f"set it to {model.heads} or less"
            )
    if alignment.teacher.cache and (data.crop == "random" or data.flip > 0):
        raise ValueError(
            "alignment.teacher.cache needs pictures that always look the same; set data.crop center or "
            "none and data.flip 0, or no cache"
        )


def _check_projector(alignment: Alignment, model: Model, routing: Routing) -> None:
    block, depth = alignment.block, model.depth
    if block >= depth:
        raise ValueError(
            f"alignment.block is {block}, but model.depth is {depth}; the last block is {depth - 1}"
        )
    # Heads of the attention projector, each with two rotated axes of pairs.
    if alignment.projector_kind == "attention" and model.width % 16:
        raise ValueError(
            f"alignment.projector attention needs model.width in multiples of 16, it is {model.width}"
        )
    routed = routing.policy != "none" and routing.drop > 0
    if alignment.projector_kind == "conv" and routed and routing.start <= block <= routing.last(depth):
        raise ValueError(
            f"alignment.projector conv needs all tokens, but block {block} lies inside the routed blocks "
            f"{routing.start}..{routing.last(depth)}; set alignment.projector attention, or alignment.block "
            "outside them"
        )
