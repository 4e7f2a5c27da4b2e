"""Opening of the data source that a configuration names; each kind is `ENTRY` of the module of its name."""

import json
from collections.abc import Iterator

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.sources.key_subset import KeptSource, keep_listed
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
    elif hasattr(source, "digest"):
        yield json.dumps([prefix, source.digest]).encode()
    elif isinstance(source, KeptSource) and hasattr(source.whole, "digest"):
        yield json.dumps([prefix, source.whole.digest, *source.kept]).encode()
    else:
        for i in range(len(source)):
            yield json.dumps([prefix + source.key(i), *source.captions(i)]).encode()


def open_source(config: Data) -> Source:
    """Open `data.source`; raises UserError where its pictures or captions are not as they should be."""
    if config.source == "mixture":
        return MixtureSource(config.mixture, [_open(part, config) for part in config.mixture])
    return _open(config, config)


def _open(part: Data | Part, config: Data) -> Source:
    source = registry.entry("data.sources", part.source)(part, config)
    return source if part.keys is None else keep_listed(source, part.keys)
