"""The source of pictures that a configuration names."""

from millrace.engine.config import Data
from millrace.engine.data.builtin import BuiltinSource
from millrace.engine.data.folder import FolderSource
from millrace.engine.data.pictures import Source


def open_source(config: Data) -> Source:
    """Open `data.source`; raises UserError where its pictures or captions are not as they should be."""
    if config.source == "builtin":
        return BuiltinSource()
    return FolderSource(config.path)
