"""The source of pictures that a configuration names."""

import hashlib
import json

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.builtin import BuiltinSource
from millrace.engine.data.digits import DigitsSource
from millrace.engine.data.folder import FolderSource
from millrace.engine.data.keys import keep_listed
from millrace.engine.data.mds import open_mds
from millrace.engine.data.mixture import MixtureSource
from millrace.engine.data.pictures import Source


def fingerprint(source: Source) -> str:
    """SHA-256 of all keys and captions in order, by which a resumed run knows whether its data changed.

    Of a mixture also the names, sizes and weights of its parts, on which its order depends.
    """
    digest = hashlib.sha256()
    if isinstance(source, MixtureSource):
        digest.update(source.description().encode())
    for i in range(len(source)):
        digest.update(json.dumps([source.key(i), *source.captions(i)]).encode())
    return digest.hexdigest()


def open_source(config: Data) -> Source:
    """Open `data.source`; raises UserError where its pictures or captions are not as they should be."""
    if config.source == "mixture":
        return MixtureSource(config.mixture, [_open(part, config) for part in config.mixture])
    return _open(config, config)


def _open(part: Data | Part, config: Data) -> Source:
    source = _whole(part, config)
    return source if part.keys is None else keep_listed(source, part.keys)


def _whole(part: Data | Part, config: Data) -> Source:
    if part.source == "builtin":
        return BuiltinSource()
    if part.source == "digits":
        return DigitsSource()
    if part.source == "mds":
        return open_mds(part.path, part.columns, config.resolution)
    return FolderSource(part.path)
