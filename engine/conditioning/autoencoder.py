"""Pictures to what the denoiser is trained on, and back: pixels, or the latents of a frozen autoencoder.

    encode: z = scale · (mean + std · noise - shift)        decode: picture = D(z / scale + shift)

| kind   | network (diffusers)  | channels | factor | posterior | scale and shift                     |
|--------|----------------------|----------|--------|-----------|-------------------------------------|
| pixels | none                 | 3        | 1      |           | 1, 0                                |
| flux1  | AutoencoderKL        | 16       | 8      | sampled   | of the weights' configuration       |
| repa_e | AutoencoderKL        | 16       | 8      | sampled   | of the weights' configuration       |
| flux2  | AutoencoderKLFlux2   | 32       | 8      | sampled   | 0.18215, 0                          |
|   patchified              | 128      | 16     | sampled   | batch-norm statistics of the weights|
| dc_ae  | AutoencoderDC        | 32       | 32     | none      | of the weights' configuration, 0    |

Channels and factor are read from the weights; the table has those of the published ones.

FLUX.2's own pipeline folds 2x2 positions into 128 channels and normalises them with the batch-norm statistics
in its weights: z = (fold(mean + std noise) - running mean) / sqrt(running variance + eps), by channel.
That is `form` patchified. PRX, whose results this engine reproduces, does neither: it loads the weights as a
plain `AutoencoderKL`, whose default scale 0.18215 then applies to the raw 32 channels; the default, `raw`.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.engine import config as settings
from millrace.engine.conditioning.latent_norm import load_statistics
from millrace.engine.conditioning.pretrained import import_class, load_network, unreadable
from millrace.engine.errors import UserError

_PUBLISHED = {
    "flux1": ("AutoencoderKL", "black-forest-labs/FLUX.1-dev"),
    "repa_e": ("AutoencoderKL", "REPA-E/e2e-flux-vae"),
    "flux2": ("AutoencoderKLFlux2", "black-forest-labs/FLUX.2-dev"),
    "dc_ae": ("AutoencoderDC", "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"),
}
_KEY = "conditioning.autoencoder.path"

PUBLISHED_FACTOR = {"pixels": 1, "flux1": 8, "flux2": 8, "repa_e": 8, "dc_ae": 32}
"""Pixels per latent position of the published weights of each kind, before any folding."""

_FOLD = 2
"""Edge of the squares of positions that FLUX.2 folds into channels."""

FLUX2_SCALE = 0.18215
"""Default `scaling_factor` of diffusers' AutoencoderKL, which PRX applies to FLUX.2's latents."""


def published_factor(config: settings.Autoencoder) -> int:
    """Pixels per latent position of the published weights, as the denoiser gets them."""
    return PUBLISHED_FACTOR[config.kind] * (_FOLD if config.form == "patchified" else 1)


class Autoencoder(ABC):
    """A frozen map from pictures to latents and back."""

    channels: int
    """Channels of a latent (3 for pixels)."""
    factor: int
    """Pixels per latent position, along each edge."""
    identity: str
    """Name and origin of the weights, for logs and checkpoints."""
    stochastic: bool
    """Whether `encode` samples a posterior, so that noise has an effect."""

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, channels, h/factor, w/factor) float32 of images (B, 3, h, w) float32 in [-1, 1].

        `noise` ~ N(0, 1) has the latents' shape and comes from the caller, so that it can belong to the
        sample; None takes the posterior's mean. Autoencoders that are not `stochastic` do not read it.
        Raises UserError when h or w is not a multiple of `factor`.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"pictures of {height} x {width} pixels do not fit {self.identity}: both edges must be "
                f"multiples of {self.factor}; change data.resolution"
            )
        shape = (len(images), self.channels, height // self.factor, width // self.factor)
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the latents {shape}")
        return self._encode(images, noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) float32 in [-1, 1] of latents (B, channels, h/factor, w/factor)."""
        return self._decode(latents).float().clamp(-1, 1)

    @abstractmethod
    def _encode(self, images: Tensor, noise: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class Pixels(Autoencoder):
    """No autoencoder: the denoiser works on pixels in [-1, 1]."""

    channels = 3
    factor = 1
    identity = "pixels"
    stochastic = False

    def _encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        return images.float()

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


class Latents(Autoencoder):
    """An autoencoder of diffusers. It computes in its weights' dtype, outside autocast; the posterior is
    sampled and scaled in FP32, by one number or one (C, 1, 1) for each channel."""

    def __init__(
        self, network: Any, identity: str, scale: float | Tensor, shift: float | Tensor, stochastic: bool
    ) -> None:
        config = network.config
        widths = (
            config.encoder_block_out_channels
            if "encoder_block_out_channels" in config
            else config.block_out_channels
        )
        self.network = network
        self.channels = config.latent_channels
        self.factor = 2 ** (len(widths) - 1)
        self.identity = identity
        self.scale = scale
        self.shift = shift
        self.stochastic = stochastic

    def _encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            coded = self.network.encode(images.to(self.network.dtype))
        if not self.stochastic:
            return self.scale * (coded.latent.float() - self.shift)
        posterior = coded.latent_dist
        latents = posterior.mean.float()
        if noise is not None:
            latents = latents + torch.exp(0.5 * posterior.logvar.float()) * noise
        return self.scale * (latents - self.shift)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = latents.float() / self.scale + self.shift
        with torch.autocast(latents.device.type, enabled=False):
            return self.network.decode(raw.to(self.network.dtype)).sample


class FoldedLatents(Latents):
    """FLUX.2's latents as its own pipeline has them: folded and normalised.

    `network.bn` is taken at its running statistics. The posterior's noise comes in the folded shape.
    """

    def __init__(self, network: Any, identity: str) -> None:
        super().__init__(network, identity, 1.0, 0.0, stochastic=True)
        norm = network.bn
        self.mean = norm.running_mean.float()[:, None, None]
        self.deviation = (norm.running_var.float() + norm.eps).sqrt()[:, None, None]
        self.channels *= _FOLD**2
        self.factor *= _FOLD

    def _encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        raw = super()._encode(images, None if noise is None else F.pixel_shuffle(noise, _FOLD))
        return (F.pixel_unshuffle(raw, _FOLD) - self.mean) / self.deviation

    def _decode(self, latents: Tensor) -> Tensor:
        raw = latents.float() * self.deviation + self.mean
        return super()._decode(F.pixel_shuffle(raw, _FOLD))


def open_autoencoder(config: settings.Autoencoder, device: torch.device) -> Autoencoder:
    """The autoencoder of `config` on `device`, from a folder or hub repository that holds it at its top or,
    like the diffusers pipelines, under `vae`.

    Weights and arithmetic are in `config.dtype`, except that dc_ae is always FP32, as in PRX, and so is one
    that is going to be tuned. In a folder of a tuned one its statistics, channel by channel, stand for scale
    and shift. Raises UserError when diffusers or the weights are not there.
    """
    if config.kind == "pixels":
        return Pixels()
    name, published = _PUBLISHED[config.kind]
    source = config.path or published
    network_class = import_class("diffusers", name, f"conditioning.autoencoder.kind {config.kind}")
    subfolder, revision, held = _locate(network_class, source)
    if held not in (name, None):
        # Loaders of diffusers accept each other's weights where the names overlap, with default scales.
        raise UserError(
            f"{source!r} holds weights of {held}, conditioning.autoencoder.kind {config.kind} needs {name}; "
            "set kind or path of conditioning.autoencoder"
        )
    exact = config.kind == "dc_ae" or config.tuning.enabled  # tuning starts from weights that are not rounded
    dtype = torch.float32 if exact else getattr(torch, config.dtype)
    folded = config.form == "patchified"
    # The statistics stay FP32, so they are taken before the weights are rounded.
    network = load_network(
        network_class.from_pretrained,
        source,
        _KEY,
        device,
        subfolder=subfolder,
        torch_dtype=torch.float32 if folded else dtype,
    )
    identity = f"{config.kind} {source}" + (f"@{revision}" if revision else "")
    if folded:
        latents = FoldedLatents(network, f"{identity} ({config.form})")
        network.to(dtype)
        return latents
    scale = FLUX2_SCALE if config.kind == "flux2" else network.config.scaling_factor
    shift = network.config.get("shift_factor") or 0.0
    for folder in (Path(source, "vae"), Path(source)):
        statistics = load_statistics(folder, network.config.latent_channels, device, _KEY)
        if statistics is not None:
            scale, shift = statistics
    return Latents(network, identity, scale, shift, stochastic=config.kind != "dc_ae")


def _locate(network_class: Any, source: str) -> tuple[str | None, str | None, str | None]:
    """Subfolder of the weights inside `source`, their hub revision (None for a local folder), and the class
    that wrote them (None if it did not sign them)."""
    problems = []
    for subfolder in ("vae", None):
        try:
            config, revision = network_class.load_config(source, subfolder=subfolder, return_commit_hash=True)
            return subfolder, revision, config.get("_class_name")
        except (OSError, ValueError) as error:
            problems.append(error)
    raise unreadable(source, _KEY, *problems)
