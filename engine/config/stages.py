"""Stages of a run: what holds from which step on.

    "stages": [
        {"name": "burn-in", "at": 0, "alignment": {"kind": "repa"}},
        {"name": "1024 px", "at": 100000, "alignment": {"kind": "none"}, "data": {"resolution": 1024}},
        {"name": "sft", "at": 120000, "data": {"path": "datasets/alchemist"}, "schedule": {"warmup": 500}}
    ]

Every stage is laid over the one before it, so a value holds until a later stage changes it. Before the first
`at` the configuration itself holds. At a boundary the trainer saves a checkpoint and is built again from it,
exactly as if the run had been stopped and resumed there: that is why a run that is interrupted anywhere ends
in the same bits, and why whatever a stage no longer needs (a teacher, a projector) leaves memory.

What counts from where: the learning rate's schedule starts anew in a stage that sets `schedule`, and lasts
until the next that does. Epochs are counted from the stage that last set where the data come from.
"""

from typing import Any, NamedTuple

from millrace.engine.config import AUTO, Config
from millrace.engine.config.loading import differences, merge, parse_config
from millrace.engine.util.errors import UserError

_OWN = ("name", "at")
_FIXED = (
    *("run.steps", "run.seed", "run.output_dir", "run.device", "run.init_from", "source", "stages"),
    *("validation.share", "validation.seed"),  # a picture that one stage holds out, all do
)
"""Settings of the run as a whole."""
_TUNED = "conditioning.autoencoder."
"""Settings that an autoencoder which is tuned, or was, does not survive a change of."""
_FREE_OF_MODEL = ("attention_backend", "geglu_backend")
"""Settings of the model that its weights do not depend on."""
_DATA_SET = ("source", "path", "mixture", "keys")
"""Settings in `data` that make another data set of it."""


class Stage(NamedTuple):
    """A part of a run under one configuration."""

    number: int
    """Place in the run, from 0."""
    name: str
    config: Config
    """With nothing left to resolve: `stages` is empty and alignment has no end inside."""
    first: int
    """Steps done before."""
    last: int
    """Steps done after."""
    data_step: int = 0
    """Steps done when training on this data set began."""
    data_sample: int = 0
    """Samples seen when training on this data set began."""
    schedule_step: int = 0
    """Steps done when this learning rate schedule began."""
    schedule_end: int = 0
    """Steps done when it ends."""


def resolve_stages(config: Config) -> list[Stage]:
    """The stages of a run in order; one, the configuration itself, where none are given.

    Raises UserError, one line, for a stage that is not well formed or whose configuration is not valid.
    """
    base = config.model_dump(mode="json") | {"stages": []}
    parts: list[tuple[int, str, dict[str, Any]]] = [(0, "", {})]
    before = -1
    for i, given in enumerate(config.stages):
        at = given.get("at")
        where = f"stages[{i}]"
        if type(at) is not int or at < 0:
            raise UserError(f"{where}: at is {at!r}; it is the number of steps done before the stage begins")
        if at <= before:
            raise UserError(f"{where}: at is {at}, but the stage before it begins at {before}")
        if at >= config.run.steps:
            raise UserError(f"{where}: at is {at}, but the run ends after run.steps {config.run.steps}")
        name = given.get("name", f"stage {i + 1}")
        if not isinstance(name, str):
            raise UserError(f"{where}: name is {name!r}; it is a text")
        overrides = {key: value for key, value in given.items() if key not in _OWN}
        if at == 0:
            parts = []
        before = at
        parts.append((at, name, overrides))
    return _with_origins(_configured(base, parts), config.run.steps)


def values_at(values: dict[str, Any], step: int) -> tuple[dict[str, Any], str]:
    """Plain values of the stage that trained step number `step`, from 1, and its name, "" without stages.

    Nothing is checked: a later version may have written them.
    """
    found, name = values | {"stages": []}, ""
    for i, part in enumerate(values.get("stages") or []):
        if part["at"] < step:
            found = merge(found, {key: value for key, value in part.items() if key not in _OWN})
            name = part.get("name", f"stage {i + 1}")
    return found, name


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage that trains the step after `step` steps; the last one at the end of the run."""
    return next((stage for stage in stages if stage.first <= step < stage.last), stages[-1])


def _configured(
    base: dict[str, Any], parts: list[tuple[int, str, dict[str, Any]]]
) -> list[tuple[int, str, Config, dict[str, Any]]]:
    """(first step, name, configuration, what it overrides) of each stage; the end of an alignment is one."""
    found: list[tuple[int, str, Config, dict[str, Any]]] = []
    values = base
    for i, (first, name, overrides) in enumerate(parts):
        values = merge(values, overrides)
        config = parse_config(values, f"stage {name!r}" if name else "configuration")
        if found:
            _require_same_run(found[0][2], config, name)
        until = config.alignment.until
        if until is not None and first >= until:
            config, until = _without_alignment(config), None
        end = parts[i + 1][0] if i + 1 < len(parts) else config.run.steps
        if until is None or until >= end:
            found.append((first, name, config, overrides))
            continue
        found.append((first, name or "aligned", config, overrides))
        ended = f"{name}, no longer aligned" if name else "no longer aligned"
        found.append((until, ended, _without_alignment(config), {}))
    return found


def _with_origins(found: list[tuple[int, str, Config, dict[str, Any]]], steps: int) -> list[Stage]:
    ends = [first for first, *_ in found[1:]] + [steps]
    renews = [i == 0 or "schedule" in overrides for i, (*_, overrides) in enumerate(found)]
    stages: list[Stage] = []
    samples = 0
    for i, (first, name, config, overrides) in enumerate(found):
        new_data = not stages or any(key in overrides.get("data", {}) for key in _DATA_SET)
        new_data = new_data or _run_of(config) != _run_of(stages[-1].config)
        if not new_data and config.data.follows_steps:
            # Such data find the step of a sample by division, so all steps since must have had as many.
            seen, steps_since = samples - stages[-1].data_sample, first - stages[-1].data_step
            new_data = seen != steps_since * config.data.global_batch
        began = max(j for j in range(i + 1) if renews[j])
        stage = Stage(
            number=i,
            name=name,
            config=config,
            first=first,
            last=ends[i],
            data_step=first if new_data else stages[-1].data_step,
            data_sample=samples if new_data else stages[-1].data_sample,
            schedule_step=found[began][0],
            schedule_end=next((found[j][0] for j in range(i + 1, len(found)) if renews[j]), steps),
        )
        seen, micro = samples - stage.data_sample, config.data.micro_batch
        if config.data.aspect == "bucket" and micro != AUTO and seen % micro:
            raise UserError(
                f"stage {name!r} begins after {seen} samples, which micro-batches of {micro} do not divide: "
                "they would hold two buckets; set its data.micro_batch to a divisor"
            )
        stages.append(stage)
        samples += (stage.last - first) * config.data.global_batch
    return stages


def _run_of(config: Config) -> int:
    """Samples in a row that come from one bucket, which make another order of the same data set."""
    return config.data.bucket_run if config.data.aspect == "bucket" else 1


def _without_alignment(config: Config) -> Config:
    off = {"kind": "none", "until": None, "attention": {"weight": 0.0}}
    return parse_config(merge(config.model_dump(mode="json"), {"alignment": off}), "alignment.until")


def _require_same_run(first: Config, later: Config, name: str) -> None:
    """A stage may change how the model is trained, not what the run or the model is."""
    old, new = first.model_dump(mode="json"), later.model_dump(mode="json")
    for key in differences(old, new):
        section, _, field = key.partition(".")
        tuned = key.startswith(_TUNED) and any(
            x.conditioning.autoencoder.tuning.enabled for x in (first, later)
        )
        if (
            tuned
            or key in _FIXED
            or section == "adapter"
            or (section == "model" and field not in _FREE_OF_MODEL)
        ):
            raise UserError(f"stage {name!r} changes {key}, which holds for the whole run; remove it there")
    if (first.routing.policy == "sprint") != (later.routing.policy == "sprint"):
        raise UserError(
            f"stage {name!r} changes routing.policy from {first.routing.policy} to {later.routing.policy}, "
            "but sprint's fusion layer is part of the model; set routing.drop to 0 to train on all tokens"
        )
    for key in ("mask_token", "fuse_order", "start", "end"):
        if first.routing.policy == "sprint" and getattr(first.routing, key) != getattr(later.routing, key):
            raise UserError(
                f"stage {name!r} changes routing.{key}, which a model of sprint is built with; remove it"
            )


def describe_stage(stages: list[Stage], stage: Stage) -> str:
    """One line for people: where in the run the stage lies, and what it changes."""
    line = f"stage {stage.number + 1} of {len(stages)}"
    line += f" ({stage.name})" if stage.name else ""
    line += f": steps {stage.first + 1} to {stage.last}"
    if stage.number:
        old, new = (stages[n].config.model_dump(mode="json") for n in (stage.number - 1, stage.number))
        line += f"; changed: {', '.join(differences(old, new)) or 'nothing'}"
    return line
