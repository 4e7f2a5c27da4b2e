"""What the frozen networks of a run add, by their published shapes."""

from pathlib import Path
from typing import NamedTuple

from millrace.engine.config import Config


class FrozenNetwork(NamedTuple):
    """Size and work of a network, from its shape."""

    parameters: int
    flops: float
    """Of one text token, one pixel (encoder of an autoencoder) or one patch (teacher), forward."""


FROZEN = {
    "t5gemma": FrozenNetwork(2_614_341_888, 2.0 * (2_614_341_888 - 256_000 * 2304)),
    "flux1": FrozenNetwork(83_819_683, 4_164_864.0),
    "repa_e": FrozenNetwork(83_819_683, 4_164_864.0),
    "flux2": FrozenNetwork(84_046_115, 4_169_600.0),
    "dc_ae": FrozenNetwork(362_893_923, 4_965_696.0),
    "dinov2": FrozenNetwork(304_372_736, 2.0 * 304_372_736),
    "dinov3": FrozenNetwork(303_129_600, 2.0 * 303_129_600),
}
"""Of `benchmarks/frozen_networks.py`, whose shapes a test counts again; an embedding looks up and multiplies
nothing, encoders are counted for pictures of 256 pixels."""


class Load(NamedTuple):
    """A frozen network that a run loads."""

    role: str
    """text, autoencoder, teacher or perceptual."""
    kind: str
    bytes: float
    flops: float
    """For one image."""
    known: bool
    """Whether there is a published shape to count by; else it counts as nothing."""


class Loaded(tuple[Load, ...]):
    """The frozen networks that a run loads and what they do for an image."""

    __slots__ = ()

    def of(self, *roles: str) -> "Loaded":
        """Those in some roles."""
        return Loaded(load for load in self if load.role in roles)

    @property
    def bytes(self) -> float:
        """Of all weights."""
        return sum(load.bytes for load in self)

    @property
    def flops(self) -> float:
        """Of all networks for one image."""
        return sum(load.flops for load in self)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Kinds that are not counted."""
        return tuple(load.kind for load in self if not load.known)


def frozen_networks(config: Config, image_tokens: int, text_tokens: int) -> Loaded:
    """Live ones; what has a complete cache in `data.cached` is neither loaded nor run.

    By their published shapes; a folder of weights that is smaller, as those of a smoke run, counts as large
    as its files.
    """
    conditioning, alignment, objective = config.conditioning, config.alignment, config.objective
    text, autoencoder = conditioning.text, conditioning.autoencoder
    found: list[Load] = []
    if "text" not in config.data.cached and text.kind != "hash":
        found.append(_load("text", text.kind, text.path, text_tokens))
    if "latents" not in config.data.cached and autoencoder.kind != "pixels":
        found.append(_load("autoencoder", autoencoder.kind, autoencoder.path, config.data.resolution**2))
    if alignment.active and alignment.teacher.cache is None:
        found.append(_load("teacher", alignment.teacher.kind, alignment.teacher.path, image_tokens))
    if objective.dino.weight:
        found.append(_load("perceptual", objective.dino.kind, objective.dino.path, image_tokens))
    return Loaded(found)


def _load(role: str, kind: str, path: str | None, units: float) -> Load:
    if kind not in FROZEN:
        return Load(role, kind, 0.0, 0.0, known=False)
    network = FROZEN[kind]
    size = float(network.parameters * (4 if kind == "dc_ae" else 2))
    if path is not None and Path(path).is_dir():
        size = min(size, sum(file.stat().st_size for file in Path(path).rglob("*.safetensors")))
    return Load(role, kind, size, network.flops * units, known=True)
