"""Autoencoder (VAE): pictures to what the denoiser is trained on, and back; the registry of its kinds.

    encode: z = scale · (mean + std · noise - shift)        decode: picture = D(z / scale + shift)

`encode` is `sample(posterior(pictures), noise)`. Only the first half needs the network, so a posterior that
was kept gives the same latents without it, to the last bit: the network is loaded when it is first used.

| kind   | network (diffusers)  | channels | factor | posterior | scale and shift                     |
|--------|----------------------|----------|--------|-----------|-------------------------------------|
| pixels | none                 | 3        | 1      |           | 1, 0                                |
| flux1  | AutoencoderKL        | 16       | 8      | sampled   | of the weights' configuration       |
| repa_e | AutoencoderKL        | 16       | 8      | sampled   | of the weights' configuration       |
| flux2  | AutoencoderKLFlux2   | 32       | 8      | sampled   | 0.18215, 0                          |
|   patchified              | 128      | 16     | sampled   | batch-norm statistics of the weights|
| dc_ae  | AutoencoderDC        | 32       | 32     | none      | of the weights' configuration, 0    |

Channels and factor are read from the weights; the table has those of the published ones, as has the entry of
each kind in `encoders/autoencoders/`.

FLUX.2's own pipeline folds 2x2 positions into 128 channels and normalises them with the batch-norm statistics
in its weights: z = (fold(mean + std noise) - running mean) / sqrt(running variance + eps), by channel.
That is `form` patchified. PRX, whose results this engine reproduces, does neither: it loads the weights as a
plain `AutoencoderKL`, whose default scale 0.18215 then applies to the raw 32 channels; the default, `raw`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine import config as settings
from millrace.engine.encoders.latent_statistics import load_statistics
from millrace.engine.encoders.pretrained import (
    NetworkSize,
    Settings,
    import_class,
    load_network,
    name_of,
    random_network,
    shape_alone,
    unreadable,
)
from millrace.engine.util import registry
from millrace.engine.util.errors import UserError

_KEY = "conditioning.autoencoder.path"

_COUNTED = 256
"""Edge of the picture whose encoding is counted, in pixels."""
_FOLD = 2
"""Edge of the squares of positions that FLUX.2 folds into channels."""


class Posterior(NamedTuple):
    """What a network makes of B pictures, in its dtype and before any folding."""

    mean: Tensor
    """(B, C, h, w)."""
    logvar: Tensor | None
    """(B, C, h, w); None where the network has no posterior but one latent, which is then the mean."""

    def sampled(self, noise: Tensor | None) -> Tensor:
        """mean + std * noise, (B, C, h, w) FP32; the mean if there is no noise or no variance."""
        latents = self.mean.float()
        if noise is None or self.logvar is None:
            return latents
        return latents + torch.exp(0.5 * self.logvar.float()) * noise


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
    def posterior(self, images: Tensor) -> Posterior:
        """What the network makes of images (B, 3, h, w) float32 in [-1, 1]. Raises UserError when h or w is
        not a multiple of `factor`."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"pictures of {height} x {width} pixels do not fit {self.identity}: both edges must be "
                f"multiples of {self.factor}; change data.resolution"
            )
        return self._posterior(images)

    @torch.no_grad()
    def sample(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Latents (B, channels, h/factor, w/factor) float32 of a posterior, element by element.

        `noise` ~ N(0, 1) has the latents' shape and comes from the caller, so that it can belong to the
        sample; None takes the posterior's mean. Autoencoders that are not `stochastic` do not read it.
        """
        shape = self.latent_shape(posterior)
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the latents {shape}")
        return self._sample(posterior, noise)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """`sample(posterior(images), noise)`: latents (B, channels, h/factor, w/factor) float32."""
        return self.sample(self.posterior(images), noise)

    def latent_shape(self, posterior: Posterior) -> tuple[int, int, int, int]:
        """(B, channels, h, w) of the latents that `sample` makes of a posterior."""
        samples, channels, height, width = posterior.mean.shape
        fold = round((self.channels / channels) ** 0.5)
        return samples, self.channels, height // fold, width // fold

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) float32 in [-1, 1] of latents (B, channels, h/factor, w/factor)."""
        return self._decode(latents).float().clamp(-1, 1)

    @abstractmethod
    def _posterior(self, images: Tensor) -> Posterior: ...

    @abstractmethod
    def _sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Constants:
    """What `sample` and `decode` need to know of the weights; small enough to be kept beside latents."""

    channels: int
    """Of the network's own latents, before any folding."""
    factor: int
    """Pixels for each of their positions."""
    scale: float | Tensor
    """One number, or (C, 1, 1) FP32."""
    shift: float | Tensor
    norm_mean: Tensor | None = None
    """(4 C, 1, 1) FP32, of FLUX.2's folded latents."""
    norm_deviation: Tensor | None = None
    """(4 C, 1, 1) FP32."""


class Latents(Autoencoder):
    """An autoencoder of diffusers. It computes in its weights' dtype, outside autocast; the posterior is
    sampled and scaled in FP32, by one number or one (C, 1, 1) for each channel.

    Args:
        open_network: loads the network; called when it is first needed.
        constants: of its weights, on the device.
        stochastic: whether it has a posterior.
    """

    def __init__(
        self, open_network: Callable[[], Any], identity: str, constants: Constants, stochastic: bool
    ) -> None:
        self._open = open_network
        self.constants = constants
        self.channels, self.factor = constants.channels, constants.factor
        self.identity = identity
        self.scale, self.shift = constants.scale, constants.shift
        self.stochastic = stochastic

    @cached_property
    def network(self) -> Any:
        """The network; the first use loads it."""
        return self._open()

    def _posterior(self, images: Tensor) -> Posterior:
        with torch.autocast(images.device.type, enabled=False):
            coded = self.network.encode(images.to(self.network.dtype))
        if not self.stochastic:
            return Posterior(coded.latent, None)
        return Posterior(coded.latent_dist.mean, coded.latent_dist.logvar)

    def _sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        return self.scale * (posterior.sampled(noise) - self.shift)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._pictures(latents.float() / self.scale + self.shift)

    def _pictures(self, raw: Tensor) -> Tensor:
        with torch.autocast(raw.device.type, enabled=False):
            return self.network.decode(raw.to(self.network.dtype)).sample


class FoldedLatents(Latents):
    """FLUX.2's latents as its own pipeline has them: folded and normalised with the running statistics of
    its weights. The posterior's noise comes in the folded shape."""

    def __init__(self, open_network: Callable[[], Any], identity: str, constants: Constants) -> None:
        super().__init__(open_network, identity, constants, stochastic=True)
        self.mean, self.deviation = constants.norm_mean, constants.norm_deviation
        self.channels *= _FOLD**2
        self.factor *= _FOLD

    def _sample(self, posterior: Posterior, noise: Tensor | None) -> Tensor:
        raw = posterior.sampled(None if noise is None else F.pixel_shuffle(noise, _FOLD))
        return (F.pixel_unshuffle(raw, _FOLD) - self.mean) / self.deviation

    def _decode(self, latents: Tensor) -> Tensor:
        return self._pictures(F.pixel_shuffle(latents.float() * self.deviation + self.mean, _FOLD))


@dataclass(frozen=True)
class DiffusersNetwork:
    """The network of diffusers behind a kind of autoencoder."""

    source: str
    """Hub id of the published weights."""
    class_name: str
    size: NetworkSize
    """Of the published network, work of the encoder."""
    shape: Settings
    """Arguments of the class for the published network."""
    tiny: Settings
    """Arguments for a small one with the published channels and factor."""
    stochastic: bool = True
    """Whether it has a posterior, not one latent."""
    exact: bool = False
    """Whether it computes in FP32 whatever `dtype` says."""
    scale: float | None = None
    """In place of `scaling_factor` in the weights' configuration."""
    folded_norm: bool = False
    """Whether its weights hold batch-norm statistics of folded latents (FLUX.2)."""


@dataclass(frozen=True)
class AutoencoderEntry:
    """A kind of autoencoder (`conditioning.autoencoder.kind`): all that the engine asks of it.

    Its module in `encoders/autoencoders/` has the kind's name.
    """

    channels: int
    """Of the published weights, before any folding."""
    factor: int
    """Pixels per latent position of the published weights, before any folding."""
    open: Callable[[settings.Autoencoder, torch.device], Autoencoder]
    """As `open_autoencoder`."""
    network: DiffusersNetwork | None = None
    """None for a kind without weights, which has nothing to load, cache or tune."""

    def tiny(self, folder: Path) -> Path:
        """Save a small network of the same class, channels and factor with random weights, for `--smoke`."""
        network_class = import_class("diffusers", self.network.class_name, "a tiny autoencoder")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network_class(**self.network.tiny).save_pretrained(folder)
        return folder


def autoencoder_entry(kind: str) -> AutoencoderEntry:
    """The entry of a kind."""
    return registry.entry("encoders.autoencoders", kind)


def published_factor(config: settings.Autoencoder) -> int:
    """Pixels per latent position of the published weights, as the denoiser gets them."""
    return autoencoder_entry(config.kind).factor * (_FOLD if config.form == "patchified" else 1)


def open_autoencoder(config: settings.Autoencoder, device: torch.device) -> Autoencoder:
    """The autoencoder of `config` on `device`. Raises UserError when a package or its weights are absent."""
    return autoencoder_entry(config.kind).open(config, device)


def network_of(config: settings.Autoencoder) -> DiffusersNetwork:
    """The network behind `config`, of a kind that has one."""
    network = autoencoder_entry(config.kind).network
    if network is None:
        raise ValueError(f"conditioning.autoencoder.kind {config.kind} has no network")
    return network


def source_of(config: settings.Autoencoder) -> str:
    """Folder or hub id of the weights."""
    return config.path or network_of(config).source


def diffusers_entry(channels: int, factor: int, network: DiffusersNetwork) -> AutoencoderEntry:
    """The registry's entry of an autoencoder of diffusers."""
    return AutoencoderEntry(channels, factor, open_latents, network)


def open_latents(config: settings.Autoencoder, device: torch.device) -> Latents:
    """An autoencoder of diffusers, from a folder or hub repository that holds it at its top or, like the
    diffusers pipelines, under `vae`.

    Weights and arithmetic are in `config.dtype`, except that dc_ae is always FP32, as in PRX, and so is one
    that is going to be tuned. In a folder of a tuned one its statistics, channel by channel, stand for scale
    and shift.
    """
    origin = locate(config)
    network, constants = _load(config, origin, device)
    return _latents(config, name_of(config.kind, origin.source, origin.revision), lambda: network, constants)


def open_later(
    config: settings.Autoencoder, device: torch.device, constants: Constants, revision: str | None
) -> Latents:
    """As `open_latents`, but weights are loaded when a picture is first encoded or decoded.

    Args:
        constants: of the same weights, on `device`.
        revision: of the hub repository; None for a local folder.
    """
    name = name_of(config.kind, source_of(config), revision)
    return _latents(config, name, lambda: _load(config, locate(config), device)[0], constants)


def open_random(config: settings.Autoencoder, device: torch.device) -> Latents:
    """The published network with random weights, as benchmarks need it; for `form` raw."""
    entry, own = autoencoder_entry(config.kind), network_of(config)
    network_class = import_class("diffusers", own.class_name, f"conditioning.autoencoder.kind {config.kind}")
    network = random_network(lambda: network_class(**own.shape), device, arithmetic(config))
    scale, shift = _scale_and_shift(own, network.config)
    constants = Constants(entry.channels, entry.factor, scale, shift)
    return _latents(config, f"{config.kind}, random weights", lambda: network, constants)


def size_of(config: settings.Autoencoder) -> NetworkSize:
    """Size of the network and work of its encoder, by the configuration in a local folder or in what was
    fetched of a hub id before. Raises OSError or ValueError where that cannot be read, UserError without
    diffusers."""
    own, source = network_of(config), source_of(config)
    network_class = import_class("diffusers", own.class_name, f"conditioning.autoencoder.kind {config.kind}")
    try:
        shape = network_class.load_config(source, subfolder="vae", local_files_only=True)
    except (OSError, ValueError):
        shape = network_class.load_config(source, local_files_only=True)
    network = shape_alone(lambda: network_class.from_config(shape))
    with FlopCounterMode(display=False) as counter:
        network.encode(torch.empty(1, 3, _COUNTED, _COUNTED, device="meta", dtype=network.dtype))
    parameters = sum(p.numel() for p in network.parameters())
    return NetworkSize(parameters, counter.get_total_flops() / _COUNTED**2)


def arithmetic(config: settings.Autoencoder) -> torch.dtype:
    """Of the network's weights and of its posterior."""
    # Tuning starts from weights that are not rounded.
    exact = network_of(config).exact or config.tuning.enabled
    return torch.float32 if exact else getattr(torch, config.dtype)


def _latents(
    config: settings.Autoencoder, name: str, open_network: Callable[[], Any], constants: Constants
) -> Latents:
    if config.form == "patchified":
        return FoldedLatents(open_network, f"{name} ({config.form})", constants)
    return Latents(open_network, name, constants, network_of(config).stochastic)


def _load(config: settings.Autoencoder, origin: "Origin", device: torch.device) -> tuple[Any, Constants]:
    """The network on `device`, and what is to be known of its weights."""
    dtype, own = arithmetic(config), network_of(config)
    # FLUX.2's statistics stay FP32, so they are taken before the weights are rounded.
    network = load_network(
        origin.network_class.from_pretrained,
        origin.source,
        _KEY,
        device,
        subfolder=origin.subfolder,
        torch_dtype=torch.float32 if own.folded_norm else dtype,
    )
    settings_of = network.config
    widths = (
        settings_of.encoder_block_out_channels
        if "encoder_block_out_channels" in settings_of
        else settings_of.block_out_channels
    )
    channels = settings_of.latent_channels
    scale, shift = _scale_and_shift(own, settings_of)
    for folder in (Path(origin.source, "vae"), Path(origin.source)):
        statistics = load_statistics(folder, channels, device, _KEY)
        if statistics is not None:
            scale, shift = statistics
    mean = deviation = None
    if own.folded_norm:
        norm = network.bn
        mean = norm.running_mean.float()[:, None, None].clone()
        deviation = (norm.running_var.float() + norm.eps).sqrt()[:, None, None]
        network.to(dtype)
    return network, Constants(channels, 2 ** (len(widths) - 1), scale, shift, mean, deviation)


def _scale_and_shift(own: DiffusersNetwork, config: Any) -> tuple[float, float]:
    scale = config.scaling_factor if own.scale is None else own.scale
    return scale, config.get("shift_factor") or 0.0


class Origin(NamedTuple):
    """Where the weights of an autoencoder are."""

    source: str
    """Folder or hub repository."""
    subfolder: str | None
    revision: str | None
    """Of the hub repository; None for a local folder."""
    network_class: Any


def locate(config: settings.Autoencoder) -> Origin:
    """Find the weights of an autoencoder without loading them. Raises UserError."""
    name, source = network_of(config).class_name, source_of(config)
    network_class = import_class("diffusers", name, f"conditioning.autoencoder.kind {config.kind}")
    subfolder, revision, held = _find(network_class, source)
    if held not in (name, None):
        # Loaders of diffusers accept each other's weights where the names overlap, with default scales.
        raise UserError(
            f"{source!r} holds weights of {held}, conditioning.autoencoder.kind {config.kind} needs {name}; "
            "set kind or path of conditioning.autoencoder"
        )
    return Origin(source, subfolder, revision, network_class)


def _find(network_class: Any, source: str) -> tuple[str | None, str | None, str | None]:
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
