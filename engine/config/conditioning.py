"""The frozen networks around the denoiser."""

from typing import Literal

from pydantic import Field

from millrace.engine.config.section import Section


class TextTower(Section):
    """The frozen network that turns captions into text tokens."""

    kind: Literal["hash", "t5gemma", "qwen3vl"] = "hash"
    """`hash` maps words to fixed Gaussian vectors: it has no weights and knows no language, and is there so
    that everything runs anywhere. `t5gemma` and `qwen3vl` are the towers of the PRX models."""
    path: str | None = None
    """Local folder or hub id of the tower's weights; default the published one on the hub."""
    max_tokens: int = Field(256, ge=1)
    """Longer captions are cut here; the log counts how many were."""


class Autoencoder(Section):
    """The frozen network that turns pictures into latents."""

    kind: Literal["pixels", "flux1", "flux2", "repa_e", "dc_ae"] = "flux1"
    """`pixels` trains on pixels in [-1, 1]; the others encode with that autoencoder."""
    path: str | None = None
    """Local folder or hub id of the autoencoder's weights; default the published one on the hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the encoder."""


class Conditioning(Section):
    """The frozen networks around the denoiser."""

    text: TextTower = TextTower()
    autoencoder: Autoencoder = Autoencoder()
    caption_drop: float = Field(0.1, ge=0, lt=1)
    """Share of samples trained with the empty caption, for classifier-free guidance."""
