"""Conditioning section: text encoder, autoencoder and caption dropout."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.autoencoder_tuning import AutoencoderTuning
from millrace.engine.config.section import PathText, Section


class TextTower(Section):
    """The frozen network that turns captions into text tokens."""

    kind: Literal["hash", "t5gemma", "qwen3vl"] = "hash"
    """`hash` maps words to fixed Gaussian vectors: it has no weights and knows no language, and is there so
    that everything runs anywhere. `t5gemma` and `qwen3vl` are the towers of the PRX models."""
    path: PathText | None = None
    """Local folder or hub id of the tower's weights; default the published one on the hub."""
    max_tokens: int = Field(256, ge=1)
    """Longer captions are cut here; the log counts how many were."""
    kernels: Literal["auto", "hf", "liger"] = "auto"
    """Whose RMSNorm, RoPE and gated MLP run in `t5gemma` and `qwen3vl`: liger-kernel's Triton kernels, or the
    PyTorch of transformers (`hf`). `auto` is `liger` on CUDA where it is installed. The rows are the same but
    for rounding."""


class Autoencoder(Section):
    """The frozen network that turns pictures into latents."""

    kind: Literal["pixels", "flux1", "flux2", "repa_e", "dc_ae"] = "flux1"
    """`pixels` trains on pixels in [-1, 1]; the others encode with that autoencoder."""
    path: PathText | None = None
    """Local folder or hub id of the autoencoder's weights; default the published one on the hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the encoder."""
    tuning: AutoencoderTuning = AutoencoderTuning()
    form: Literal["raw", "patchified"] = "raw"
    """`flux2`: its 32 latent channels as they are (PRX), or as FLUX.2's own pipeline trains on them: 2x2
    positions as 128 channels, 16 pixels each, normalised with the statistics in the weights; for
    model.patch_size 1."""

    @model_validator(mode="after")
    def _of_flux2(self) -> "Autoencoder":
        if self.form == "patchified" and self.kind != "flux2":
            raise ValueError(f"form patchified belongs to kind flux2, but kind is {self.kind}; remove form")
        return self


class Conditioning(Section):
    """The frozen networks around the denoiser."""

    text: TextTower = TextTower()
    autoencoder: Autoencoder = Autoencoder()
    caption_drop: float = Field(0.1, ge=0, lt=1)
    """Share of samples trained with the empty caption, for classifier-free guidance."""
    overlap: bool = True
    """On CUDA: encode the next micro-batch on a stream of its own, beside the step. The activations of the
    frozen networks then add to those of the step; false encodes in turn. The numbers are the same."""
