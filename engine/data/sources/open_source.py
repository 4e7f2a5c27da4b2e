"""Opening of the data source that a configuration names; each kind is `ENTRY` of the module of its name."""

import json
from collections.abc import Hashable, Iterator

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.public_sets import require_published
from millrace.engine.data.sources.key_subset import KeptSource, Rest, keep_listed
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import Source
from millrace.engine.util import registry
from millrace.engine.util.files import sha256


def fingerprint(source: Source) -> str:
    """SHA-256 of all keys and captions in order, by which a resumed run knows whether its data changed.

    Of a mixture also the names, sizes and weights of its parts, on which its order depends. A source may have
    a `digest` of its own, as shards have, which stands for its samples without reading them.
    """
    return sha256(_description(source, ""))


def _description(source: Source, prefix: str) -> Iterator[bytes]:
    """What identifies `source`; `prefix` comes before its keys."""
    if isinstance(source, MixtureSource):
        yield source.description().encode()
        for part, inner in zip(source.parts, source.sources, strict=True):
            yield from _description(inner, f"{prefix}{part.name}/")
    elif isinstance(source, KeptSource) and isinstance(source.kept, Rest):
        yield json.dumps([prefix, "without", source.kept.left_out.tolist()]).encode()
        yield from _description(source.whole, prefix)
    elif hasattr(source, "digest"):
        yield json.dumps([prefix, source.digest]).encode()
    elif isinstance(source, KeptSource) and hasattr(source.whole, "digest"):
        yield json.dumps([prefix, source.whole.digest])[:-1].encode()  # a list that goes on with the places
        for first in range(0, len(source), _PLACES_AT_A_TIME):
            places = source.kept[first : first + _PLACES_AT_A_TIME].tolist()
            yield "".join(f", {place}" for place in places).encode()
        yield b"]"
    else:
        for i in range(len(source)):
            yield json.dumps([prefix + source.key(i), *source.captions(i)]).encode()


Opened = dict[tuple[Hashable, ...], Source]
"""Sources by the settings that they were opened with."""
_PLACES_AT_A_TIME = 1 << 16
_OF_STREAM = {
    *("mixture", "aspect", "bucket_run", "crop", "crop_scale", "flip", "upscale", "long_caption"),
    *("global_batch", "micro_batch", "loader", "cached", "workers", "prefetch", "max_bad_share"),
}
"""Settings of the data section that no source is opened with."""


def open_source(config: Data, opened: Opened | None = None) -> Source:
    """Open `data.source`; raises UserError where its pictures or captions are not as they should be.

    `opened` has what was opened already, and receives what is opened now: of several stages each source is
    opened once, unless they read it with different settings.
    """
    opened = {} if opened is None else opened
    if config.source == "mixture":
        return MixtureSource(config.mixture, [_open(part, config, opened) for part in config.mixture])
    return _open(config, config, opened)


def _open(part: Data | Part, config: Data, opened: Opened) -> Source:
    settings = part.source, part.path, part.columns, _of_source(config)
    if settings not in opened:
        require_published(part.path)
        opened[settings] = registry.entry("data.sources", part.source)(part, config)
    if part.keys is None:
        return opened[settings]
    listed = *settings, part.keys
    if listed not in opened:
        opened[listed] = keep_listed(opened[settings], part.keys)
    return opened[listed]


def _of_source(config: Data) -> str:
    """The settings of the data section that a source may read, besides those that a part has too."""
    of_part = {"source", "path", "columns", "keys"}
    return config.model_dump_json(exclude=_OF_STREAM | of_part)
