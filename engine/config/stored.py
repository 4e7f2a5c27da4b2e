"""Stored configuration: that of a checkpoint, read by any version for sampling, evaluation and export.

What the weights mean (model, routing, objective, conditioning) is read as strictly as a file. Any other
setting that this version does not know, or does not accept, is passed over with a warning: a key that was
renamed in the optimizer's section keeps nobody from drawing pictures.
"""

import logging
from typing import Any

from pydantic import ValidationError

from millrace.engine.config import Config
from millrace.engine.config.loading import parse_config, validate

log = logging.getLogger(__name__)

MEANING = ("model", "routing", "objective", "conditioning")
"""Sections without which the weights are numbers."""
_WANTED = (*MEANING, "run", "data", "precision", "sampling", "evaluation")
"""Sections that sampling and evaluation read."""


def stored_config(values: dict[str, Any], origin: str) -> Config:
    """The configuration of plain `values`, as far as this version knows it; `origin` names it in messages.

    Raises UserError, with one line per problem, for what the weights mean.
    """
    kept, dropped = dict(values), []
    while True:
        try:
            config = validate(kept)
            break
        except ValidationError as error:
            places = [tuple(str(part) for part in problem["loc"][:2]) for problem in error.errors()]
        if any(place[:1] and place[0] in MEANING for place in places):
            return parse_config(values, origin)  # which raises
        if all(places):
            for place in places:
                kept = _without(kept, place)
        elif kept.keys() > set(_WANTED):  # sections do not agree with each other
            places = [(name,) for name in kept if name not in _WANTED]
            kept = {name: kept[name] for name in kept if name in _WANTED}
        else:
            return parse_config(values, origin)
        dropped += [".".join(place) for place in places if place]
    if dropped:
        log.warning(
            "%s: settings that this version does not take are passed over: %s", origin, ", ".join(dropped)
        )
    return config


def _without(values: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """`values` without the section or the key at `place`."""
    section, *key = place
    inner = values.get(section)
    if key and isinstance(inner, dict):
        return values | {section: {name: inner[name] for name in inner if name != key[0]}}
    return {name: values[name] for name in values if name != section}
