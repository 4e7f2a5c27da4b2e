"""Model section: the denoiser, and the routing of its training."""

from typing import Any, Literal

from pydantic import Field, model_validator

from millrace.engine.config.section import Section

AttentionBackend = Literal["auto", "reference", "triton", "sdpa", "varlen", "flash_attn", "xformers"]


GegluBackend = Literal["auto", "reference", "triton", "liger"]


class Model(Section):
    """The PRX denoiser (a single-stream DiT with static text keys)."""

    width: int = Field(1792, ge=8)
    """C, features of a token."""
    depth: int = Field(16, ge=1)
    """Number of blocks."""
    heads: int = Field(28, ge=1)
    """H, attention heads; head_dim = width / heads."""
    mlp_ratio: float = Field(3.5, gt=0)
    """F / C of the GeGLU MLP."""
    patch_size: int = Field(2, ge=1)
    """Edge of a square patch, in latent positions or pixels."""
    in_channels: int = Field(16, ge=1)
    """Channels of the latent (16 FLUX.1, 32 FLUX.2 and DC-AE) or 3 for pixels."""
    bottleneck: int | None = Field(None, ge=1)
    """Width of the linear bottleneck of the patch embedding (JiT), or null for a single linear layer."""
    context_dim: int = Field(2304, ge=1)
    """Features of a text token as the text encoder emits it."""
    rope_axes: tuple[int, int] | None = None
    """Head features that encode the row and the column; default half of head_dim each."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the RoPE frequencies."""
    resolution_embedding: bool = False
    """Add an embedding of (height, width) to the time vector (PRX's 7 B pixel model)."""
    resolution_tokens: bool = False
    """Give each picture two more text tokens, embeddings of its height and of its width (the other form that
    PRX's code has); diffusers has no place for them."""
    attention_backend: AttentionBackend = "auto"
    """How `rope_attention` computes: plain PyTorch, own fused kernels, or own prologue and then torch's SDPA,
    torch's varlen attention, flash-attn or xformers; `auto` takes the fastest measured on this GPU."""
    geglu_backend: GegluBackend = "auto"
    """How the MLP's activation computes: plain PyTorch, own kernels, or on CUDA liger-kernel's; `auto`
    takes the fastest measured on this GPU."""

    @property
    def head_dim(self) -> int:
        """D, features of an attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """F, hidden features of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def axes(self) -> tuple[int, int]:
        """Head features that encode the row and the column."""
        return self.rope_axes or (self.head_dim // 2, self.head_dim // 2)

    @model_validator(mode="after")
    def _shapes(self) -> "Model":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if sum(self.axes) != self.head_dim or any(a % 2 for a in self.axes):
            raise ValueError(
                f"rope_axes {list(self.axes)} must be even and add up to head_dim {self.head_dim}"
            )
        return self


def _usual_drop(routing: dict[str, Any]) -> float:
    return 0.75 if routing.get("policy") == "sprint" else 0.5


class Routing(Section):
    """Which tokens run through which blocks during training."""

    policy: Literal["none", "tread", "sprint"] = "none"
    """`tread` (arXiv 2501.04765) lets a random share of tokens bypass a span of blocks. `sprint` (arXiv
    2510.21986) lets all tokens bypass it and fuses them with the few that ran, in a layer of its own; the
    defaults are Photoroom/PRX's, `configs/latent_256_sprint_paper.json` is the paper's form."""
    start: int = Field(2, ge=0)
    """First routed block (0-based)."""
    end: int | None = Field(None, ge=0)
    """Last routed block, inclusive; default depth - 4."""
    drop: float = Field(default_factory=_usual_drop, ge=0, lt=1)
    """Share of tokens that do not run through the span; default 0.5, for `sprint` 0.75. 0 runs all of them:
    the fine-tune that may follow sparse training."""
    structured: bool = False
    """`sprint`: drop the same number of tokens in each square of 2 x 2 or 4 x 4, instead of anywhere."""
    fuse_order: Literal["dense_deep", "deep_dense"] = "dense_deep"
    """`sprint`: which stream comes first in the fusion layer's input."""
    mask_token: Literal["learned", "frozen"] = "learned"
    """`sprint`: what the fusion layer gets for tokens that did not run, a parameter that starts at zero or a
    fixed random vector."""
    path_drop: float = Field(0.0, ge=0, lt=1)
    """`sprint`: share of samples for which none of the tokens counts as having run."""

    def last(self, depth: int) -> int:
        """Index of the last routed block of `depth`: as set, or depth - 4 (TREAD's absolute rule)."""
        return depth - 4 if self.end is None else self.end

    @model_validator(mode="after")
    def _of_sprint(self) -> "Routing":
        if self.policy != "sprint":
            for name in ("structured", "fuse_order", "mask_token", "path_drop"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} belongs to policy sprint, but policy is {self.policy}; remove one of the two"
                    )
        if self.structured and not (16 * self.drop).is_integer():
            raise ValueError(f"structured drops whole sixteenths of the tokens; drop {self.drop} is none")
        return self
