"""The source of pictures that a configuration names."""

import hashlib
import json

from millrace.engine.config import Data
from millrace.engine.data.builtin import BuiltinSource
from millrace.engine.data.digits import DigitsSource
from millrace.engine.data.folder import FolderSource
from millrace.engine.data.pictures import Source


def fingerprint(source: Source) -> str:
    """SHA-256 of all keys and captions in order, by which a resumed run knows whether its data changed."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(json.dumps([source.key(i), *source.captions(i)]).encode())
    return digest.hexdigest()


def open_source(config: Data) -> Source:
    """Open `data.source`; raises UserError where its pictures or captions are not as they should be."""
    if config.source == "builtin":
        return BuiltinSource()
    if config.source == "digits":
        return DigitsSource()
    return FolderSource(config.path)
