"""Held-out split: the pictures that training never sees, by a hash of their keys.

    key ──digest (`shard_index.py`)──▶ hash of (validation.seed, digest) < share ──▶ held out

It depends on nothing but the key: not on order, epoch, processes, shards, parts of a mixture or stages. (Keys
of MDS shards are places in them, so there it does depend on the layout.) Memory holds the places of the
held-out pictures alone; of a large data set one process of a machine looks for them.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from millrace.engine.config import Validation
from millrace.engine.config.data import Data, Part
from millrace.engine.data.formats.joined_index import MAPPED_ROWS
from millrace.engine.data.sources.key_subset import KeptSource, Rest
from millrace.engine.data.sources.mixture import MixtureSource
from millrace.engine.data.sources.pictures import Source, key_digests
from millrace.engine.util import registry
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import sha256
from millrace.engine.util.node_cache import cached_file
from millrace.engine.util.randomness import Purpose, hash_keys

log = logging.getLogger(__name__)

_HASHES = 1 << 64


class HeldOut(NamedTuple):
    """Pictures that are not trained on."""

    source: Source
    hashes: np.ndarray
    """(n,) uint64 of the key of each."""


class Split(NamedTuple):
    """A data set in two."""

    whole: Source
    train: Source
    held_out: HeldOut | None
    """None where nothing is."""


class _Places(NamedTuple):
    """What of one source is held out."""

    places: np.ndarray
    """(n,) int64, growing."""
    hashes: np.ndarray
    """(n,) uint64."""


def split(source: Source, validation: Validation, data: Data) -> Split:
    """`source` in two as `validation` says; where it holds out nothing, training has the very `source`.

    Raises UserError where the share holds out nothing, or leaves nothing of `source` or of one of its parts,
    and for a `validation.path` that cannot be opened.
    """
    if validation.path is not None:
        return Split(source, source, _of_its_own(validation, data))
    if not validation.share:
        return Split(source, source, None)
    if not isinstance(source, MixtureSource):
        found = _held_places(source, validation)
        _require_some(len(found.places), len(source), validation)
        held = HeldOut(KeptSource(source, found.places), found.hashes)
        return Split(source, _without(source, found, validation, "the data"), held)
    parts = [_held_places(part, validation) for part in source.sources]
    _require_some(sum(len(part.places) for part in parts), len(source), validation)
    named = list(zip(source.parts, source.sources, parts, strict=True))
    train = [_without(inner, found, validation, f"part {part.name!r}") for part, inner, found in named]
    held = [KeptSource(inner, found.places) for _, inner, found in named]
    hashes = np.concatenate([part.hashes for part in parts])
    return Split(
        source, MixtureSource(source.parts, train), HeldOut(MixtureSource(source.parts, held), hashes)
    )


def _of_its_own(validation: Validation, data: Data) -> HeldOut:
    """The data set of `validation.path`."""
    part = Part(name="validation", source=validation.source, path=validation.path)
    source = registry.entry("data.sources", part.source)(part, data)
    return HeldOut(source, np.concatenate([_hashes(digests, validation) for digests in key_digests(source)]))


def _hashes(digests: np.ndarray, validation: Validation) -> np.ndarray:
    """(n,) uint64 of keys with `digests` (n, 2)."""
    return hash_keys(validation.seed, digests[:, 0], Purpose.HELD_OUT)


def _held_places(source: Source, validation: Validation) -> _Places:
    """Of a large source made once a machine, and read by its other processes."""
    if len(source) >= MAPPED_ROWS and hasattr(source, "digest"):
        settings = f"{source.digest} {validation.seed} {validation.share!r}"

        def make(file: object) -> None:
            found = _look(source, validation)
            file.write(found.places.tobytes() + found.hashes.tobytes())

        try:
            path = cached_file(f"{sha256(settings.encode())}.held", None, make)
            places, hashes = np.frombuffer(Path(path).read_bytes(), np.int64).reshape(2, -1)
            return _Places(places, hashes.view(np.uint64))
        except OSError as error:
            log.warning(
                "held-out pictures cannot be kept for all processes of this machine: %s; each looks for them",
                error,
            )
    return _look(source, validation)


def _look(source: Source, validation: Validation) -> _Places:
    """One pass over the digests of all keys."""
    below, start = np.uint64(int(validation.share * _HASHES)), 0
    places, kept = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for digests in key_digests(source):
        hashes = _hashes(digests, validation)
        found = np.flatnonzero(hashes < below)
        places.append(start + found)
        kept.append(hashes[found])
        start += len(digests)
    return _Places(np.concatenate(places), np.concatenate(kept))


def _without(source: Source, found: _Places, validation: Validation, what: str) -> Source:
    """What is left of `source` for training."""
    if not len(found.places):
        return source
    if len(found.places) == len(source):
        raise UserError(
            f"validation.share {validation.share:g} leaves nothing to train on of {what} ({len(source)} "
            "pictures); lower it"
        )
    return KeptSource(source, Rest(len(source), found.places))


def _require_some(found: int, count: int, validation: Validation) -> None:
    if not found:
        raise UserError(
            f"validation.share {validation.share:g} holds out none of {count} pictures; raise it, or set "
            "validation.path to a data set of its own"
        )
