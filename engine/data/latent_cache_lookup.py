"""Which cached rows and posteriors a picture of a source has.

A source may be shards, chosen pictures of shards, or a mixture in which some parts are; a picture whose part
has no cache has None here, and the frozen networks do its work.
"""

import numpy as np
from torch import Tensor

from millrace.engine.data.latent_cache import (
    Cache,
    CachedText,
    Kind,
    LatentCache,
    TextCache,
)
from millrace.engine.data.sources.key_subset import KeptSource
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import (
    Source,
    WhichCaption,
)
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.util.errors import UserError


class Caches:
    """The caches of all shards in a source. Any thread may read.

    Args:
        source: of the training stream.
        kinds: those to use, as `data.cached`.
        verify: compare the checksum of each file when it is first touched.

    In a mixture a part without a cache is left to the networks. Raises UserError where no part has one, and
    for caches that do not fit their shards.
    """

    def __init__(self, source: Source, kinds: tuple[Kind, ...], verify: bool = False) -> None:
        self._source = source
        self._text: dict[int, TextCache] = {}
        self._latents: dict[int, LatentCache] = {}
        held = list(_leaves(source))
        folders = {id(leaf): leaf for leaf in held if isinstance(leaf, ShardsSource)}
        self._complete: dict[str, bool] = {}
        for kind in kinds:
            caches = self._text if kind == "text" else self._latents
            made = TextCache if kind == "text" else LatentCache
            for key, leaf in folders.items():
                if kind in leaf.manifest.caches or len(held) == 1:
                    caches[key] = made(leaf.root, leaf.manifest, verify)
            if not caches:
                roots = ", ".join(str(leaf.root) for leaf in folders.values()) or "no shards"
                raise UserError(
                    f"data.cached has {kind}, but no part of the data has such a cache ({roots}); make it "
                    f"with prepare.py --cache {kind}, or take {kind} out of data.cached"
                )
            self._complete[kind] = all(id(leaf) in caches for leaf in held)

    def of(self, kind: Kind) -> list[Cache]:
        """The caches of one kind."""
        return list((self._text if kind == "text" else self._latents).values())

    def complete(self, kind: Kind) -> bool:
        """Whether every picture lies in a part that has this kind."""
        return self._complete.get(kind, False)

    def text(self, picture: int, which: WhichCaption) -> CachedText | None:
        """Rows of a caption of a picture, or of the empty caption."""
        leaf, index = _find(self._source, picture)
        cache = self._text.get(id(leaf))
        if cache is None:
            return None
        return cache.empty if which == "empty" else cache.rows(leaf.place(index), which)

    def moments(self, picture: int) -> Tensor | None:
        """What the autoencoder made of a picture, (2 or 1, C, h, w)."""
        leaf, index = _find(self._source, picture)
        cache = self._latents.get(id(leaf))
        return None if cache is None else cache.moments(leaf.place(index))


def _leaves(source: Source) -> list[Source]:
    if isinstance(source, MixtureSource):
        return [leaf for part in source.sources for leaf in _leaves(part)]
    return _leaves(source.whole) if isinstance(source, KeptSource) else [source]


def _find(source: Source, index: int) -> tuple[Source, int]:
    """The source of the files, and the index in it, of picture `index`."""
    while True:
        if isinstance(source, MixtureSource):
            part = int(np.searchsorted(source.offsets, index, side="right")) - 1
            source, index = source.sources[part], index - int(source.offsets[part])
        elif isinstance(source, KeptSource):
            source, index = source.whole, source.kept[index]
        else:
            return source, index
