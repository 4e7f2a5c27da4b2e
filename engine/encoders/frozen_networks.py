"""The frozen networks of a run: loaded, or only known where caches stand for them.

A cache is used only if it was made by the very network that the configuration names. Where every picture has
cached rows, the text encoder is not loaded; where every one has a cached posterior, neither is the
autoencoder. Both still load when something else needs them: captions of sample grids, and decoding their
pictures.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from millrace.engine.config import Config
from millrace.engine.data import Source
from millrace.engine.data.formats.mds_text import Tower
from millrace.engine.data.latent_cache import Cache, Caches, remake
from millrace.engine.encoders.autoencoder import Autoencoder, Constants, autoencoder_entry, open_later
from millrace.engine.encoders.identity import Identity, autoencoder_identity, differing, text_identity
from millrace.engine.encoders.pretrained import name_of
from millrace.engine.encoders.text_encoder import LaterTextEncoder, TextEncoder, text_encoder_entry
from millrace.engine.util.errors import UserError


def open_caches(source: Source, config: Config) -> Caches | None:
    """The caches that `data.cached` names; None if it names none.

    Raises UserError if there are none, if they were made by other networks than the configuration's, or if
    the run needs the pictures whose latents are cached.
    """
    data, conditioning = config.data, config.conditioning
    if not data.cached:
        return None
    if "latents" in data.cached:
        _refuse_pictures(config)
    dtype, text = getattr(torch, config.precision.compute), conditioning.text
    tower = Tower(text.kind, text.max_tokens, config.model.context_dim, dtype)
    caches = Caches(source, data.cached, data.verify, tower)
    for cache in caches.of("text"):
        _require(cache, text_identity(text, config.model.context_dim, dtype))
    for cache in caches.of("latents"):
        _require(cache, autoencoder_identity(conditioning.autoencoder))
    return caches


_NOT_CONSTANTS = ("padding",)


class Frozen(NamedTuple):
    """What training gets its inputs from, besides the data."""

    autoencoder: Autoencoder
    text_encoder: TextEncoder
    caches: Caches | None
    lines: list[str]
    """For people, about the caches."""


def open_frozen(
    config: Config,
    source: Source,
    device: torch.device,
    open_autoencoder: Callable[..., Autoencoder],
    open_text_encoder: Callable[..., TextEncoder],
) -> Frozen:
    """The networks of `config.conditioning`, not loaded where the caches of `source` have all that training
    needs of them; the two functions load them. Raises UserError as `open_caches` and they do."""
    caches = open_caches(source, config)
    section, dim = config.conditioning, config.model.context_dim
    dtype = getattr(torch, config.precision.compute)

    def open_text() -> TextEncoder:
        return open_text_encoder(section.text, dim, device, dtype)

    if caches is not None and caches.complete("latents"):
        cache = caches.of("latents")[0]
        revision = cache.record.network.get("revision")
        autoencoder = open_later(section.autoencoder, device, _constants(cache, device), revision)
    else:
        autoencoder = open_autoencoder(section.autoencoder, device)
    if autoencoder.channels != config.model.in_channels:
        raise UserError(
            f"model.in_channels is {config.model.in_channels}, but {autoencoder.identity} has "
            f"{autoencoder.channels} channels; set it to {autoencoder.channels}"
        )
    source_of_text = text_encoder_entry(section.text.kind).source_of(section.text)
    if caches is not None and caches.complete("text") and source_of_text is not None:
        revision = caches.of("text")[0].record.network.get("revision")
        name = name_of(section.text.kind, source_of_text, revision)
        tower: TextEncoder = LaterTextEncoder(open_text, dim, name, device, dtype)
    else:
        tower = open_text()
    return Frozen(autoencoder, tower, caches, _describe(caches, config))


def _describe(caches: Caches | None, config: Config) -> list[str]:
    lines = []
    for kind in config.data.cached if caches is not None else ():
        found = caches.of(kind)
        if kind == "text" and caches.mds:
            where = ", ".join(str(source.root) for source in caches.mds)
            lines.append(f"cached text (MDS columns): {where}; the empty caption goes through the network")
        if not found:
            continue
        stored = ", ".join(dict.fromkeys(cache.record.dtype for cache in found))
        where = ", ".join(str(cache.root) for cache in found)
        rest = "" if caches.complete(kind) else "; other parts go through the network"
        lines.append(f"cached {kind} ({stored}): {where}{rest}")
    return lines


def constants_tensors(constants: Constants) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a cache of latents stores of an autoencoder: tensors, and numbers as text."""
    tensors, numbers = {}, {}
    for name, value in vars(constants).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None:
            numbers[name] = repr(value)
    return tensors, numbers


def _constants(cache: Cache, device: torch.device) -> Constants:
    found = {name: tensor.to(device) for name, tensor in cache.common.items() if name not in _NOT_CONSTANTS}
    for name in ("channels", "factor", "scale", "shift"):
        if name in cache.metadata:
            whole = name in ("channels", "factor")
            found[name] = int(cache.metadata[name]) if whole else float(cache.metadata[name])
    try:
        return Constants(**found)
    except TypeError:
        raise UserError(
            f"{cache.root / cache.record.common.file}: not what millrace cache writes; {remake('latents')}"
        ) from None


def _require(cache: Cache, wanted: Identity) -> None:
    problems = differing(cache.record.network, wanted)
    if problems:
        raise UserError(
            f"{cache.root}: its {cache.kind} cache was made by another network than conditioning names: "
            f"{'; '.join(problems)}; {remake(cache.kind)}, or take {cache.kind} out of data.cached"
        )


def _refuse_pictures(config: Config) -> None:
    """With cached latents no picture is decoded; name the setting that wants to look at one."""
    section = config.conditioning.autoencoder
    entry = autoencoder_entry(section.kind)
    reasons = {
        f"conditioning.autoencoder.kind {section.kind} has no latents": entry.network is None,
        "conditioning.autoencoder.tuning changes the autoencoder": section.tuning.enabled,
        "alignment shows the pictures to its teacher": config.alignment.active,
        "objective has perceptual terms, which look at the pictures": config.objective.perceptual,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"data.cached has latents, but {reason}; take latents out of data.cached")
