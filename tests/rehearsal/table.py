"""The shipped configurations, rehearsed, against what is compiled ahead of time."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from millrace.engine.config import Config
from millrace.engine.config.loading import load_config, shipped_configs
from millrace.engine.config.stages import resolve_stages
from millrace.engine.planning.automatic import settle
from millrace.engine.planning.devices import GPUS
from millrace.kernels.support.compilation import Specialisation, launches, specialisations
from tests.rehearsal.step import ARCHITECTURE, Rehearsed, rehearse

MATTERS = {
    "model": True,
    "routing": True,
    "objective": True,
    "alignment": True,
    "precision": True,
    "data": {"resolution", "aspect", "micro_batch"},
}
"""What the operators of a step and their arguments depend on, besides which frozen networks there are."""


DEVICES = 8
"""H200 that a configuration with settings of `auto` is rehearsed for."""


class Row(NamedTuple):
    """A stage of a configuration."""

    name: str
    same_as: str
    """The row before it that asks for the same; else empty."""
    rehearsed: Rehearsed
    missing: frozenset[Specialisation]
    """What no file of `millrace.kernels` declares; kernels of other packages are theirs to declare."""


class Table:
    """Rehearses stages; what would ask for the same is rehearsed once.

    A frozen network runs in its published shape where it comes first, and is stood in for elsewhere.
    """

    def __init__(self) -> None:
        self.declared = declared()
        self._seen: dict[str, Row] = {}
        self._whole: set[str] = set()

    def row(self, name: str, config: Config) -> Row:
        """The row of a stage."""
        config = settle(config, DEVICES, lambda: GPUS["h200"]).config
        kinds = {config.conditioning.text.kind, config.conditioning.autoencoder.kind}
        key = config.model_dump_json(include=MATTERS)
        if key in self._seen and kinds <= self._whole:
            return self._seen[key]._replace(name=name, same_as=self._seen[key].name)
        rehearsed = rehearse(config, kinds - self._whole)
        self._whole |= kinds
        own = {one for one in rehearsed.specialisations if not one.file.startswith("liger_kernel.")}
        row = Row(name, "", rehearsed, frozenset(own - self.declared))
        self._seen.setdefault(key, row)
        return row


def declared() -> frozenset[Specialisation]:
    """What the gate of ahead-of-time compilation covers."""
    return frozenset(one for _, launch in launches() for one in specialisations(launch, ARCHITECTURE))


def stages(names: Sequence[str] = ()) -> Iterator[tuple[str, Config]]:
    """Each stage of the shipped configurations, or of those named."""
    for name in names or shipped_configs():
        found = resolve_stages(load_config(name))
        for stage in found:
            yield f"{name}: {stage.name}" if len(found) > 1 and stage.name else name, stage.config


def explain(one: Specialisation, known: frozenset[Specialisation]) -> str:
    """What is not declared, as the difference from what is declared nearest to it."""

    def parts(of: Specialisation) -> dict[str, Any]:
        return {name: value for name, *value in (*of.arguments, *of.options)}

    asked = parts(one)
    same = [parts(other) for other in known if other[:2] == one[:2]]
    if not same:
        return f"{one.file}: {one.kernel}: not declared at all"
    gaps = [
        {name: (value, other.get(name)) for name, value in asked.items() if value != other.get(name)}
        for other in same
    ]
    gap = min(gaps, key=len)
    told = ", ".join(
        f"{name} {_told(mine)}, declared {_told(theirs)}" for name, (mine, theirs) in gap.items()
    )
    return f"{one.file}: {one.kernel}: {told}"


def _told(about: Sequence[Any] | None) -> str:
    return (
        "nothing"
        if about is None
        else " ".join("none" if part in (None, "") else str(part) for part in about)
    )
