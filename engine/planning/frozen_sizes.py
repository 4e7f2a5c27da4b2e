"""What the frozen networks of a run add, by their published shapes."""

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


class Loaded(NamedTuple):
    """The frozen networks that a run loads and what they do for an image."""

    bytes: float
    flops: float
    names: tuple[str, ...]
    unknown: tuple[str, ...]
    """Networks whose size is not known here, and which are not counted."""


def frozen_networks(config: Config, image_tokens: int, text_tokens: int) -> Loaded:
    """Live ones; what has a complete cache in `data.cached` is neither loaded nor run."""
    text, autoencoder = config.conditioning.text.kind, config.conditioning.autoencoder.kind
    live: list[tuple[str, float]] = []
    if "text" not in config.data.cached and text != "hash":
        live.append((text, text_tokens))
    if "latents" not in config.data.cached and autoencoder != "pixels":
        live.append((autoencoder, config.data.resolution**2))
    if config.alignment.active and config.alignment.teacher.cache is None:
        live.append((config.alignment.teacher.kind, image_tokens))
    if config.objective.dino.weight:
        live.append((config.objective.dino.kind, image_tokens))
    known = [(name, units) for name, units in live if name in FROZEN]
    exact = ("dc_ae",)
    sizes = (FROZEN[name].parameters * (4 if name in exact else 2) for name, _ in known)
    return Loaded(
        float(sum(sizes)),
        sum(FROZEN[name].flops * units for name, units in known),
        tuple(name for name, _ in known),
        tuple(name for name, _ in live if name not in FROZEN),
    )
