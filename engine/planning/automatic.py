"""Settings that are `auto`: chosen by the planner when a run starts, kept when it is resumed.

| setting                                              | chosen                                             |
|------------------------------------------------------|----------------------------------------------------|
| `data.micro_batch`                                   | the largest that fits and divides the global batch |
| `run.activation_checkpointing.policy`                | the fastest that fits                              |
| `deepspeed.zero_optimization`, or its `stage`        | the lowest that fits, unless a higher is faster    |
| its `overlap_comm`, `reduce_` and `allgather_bucket_size` | as where they are not set (`zero_settings.py`) |

What a configuration fixes constrains the rest. Every stage of a run is settled for itself. What was chosen is
written in place of `auto` where the run records its configuration, so a checkpoint holds numbers.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any, NamedTuple

import torch

from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import AUTO, Config
from millrace.engine.config.loading import Given, merge, nested, parse_config
from millrace.engine.config.stages import Stage, resolve_stages
from millrace.engine.distributed import process_group
from millrace.engine.distributed.zero_settings import automatic_keys
from millrace.engine.planning.cpu_device import this_machine
from millrace.engine.planning.devices import NEWER_ATTENTION, Device, gpu_like
from millrace.engine.planning.search import Option, Planner
from millrace.engine.util.errors import UserError
from millrace.kernels.attention.backends import has_newer_flash_attention

_ZERO = "deepspeed.zero_optimization."
_BY_HAND = (
    "or set data.micro_batch, run.activation_checkpointing.policy and deepspeed.zero_optimization by hand"
)

Settings = dict[str, Any]
"""Nested values of what was `auto` in a stage."""


class Settled(NamedTuple):
    """A configuration without `auto`, and lines that say why."""

    config: Config
    lines: list[str]


class Earlier(NamedTuple):
    """What a run was settled to before."""

    config: Config
    ranks: int


def automatic(config: Config) -> list[str]:
    """The settings of a stage's configuration that are `auto`."""
    found = ["data.micro_batch"] if config.data.micro_batch == AUTO else []
    if config.run.activation_checkpointing.policy == AUTO:
        found.append("run.activation_checkpointing.policy")
    return found + [_ZERO + key for key in automatic_keys(config)]


def settle_run(config: Config, device: torch.device, reader: CheckpointReader | None) -> Settled:
    """The configuration of a run as it trains on this job's devices. Collective.

    Rank 0 chooses for all, for the device with the least memory.

    Args:
        device: of this process.
        reader: the checkpoint that the run resumes from.

    Raises UserError, on every rank, where nothing fits.
    """
    if not any(automatic(stage.config) for stage in resolve_stages(config)):
        return Settled(config, [])
    gpus = process_group.gather_objects(_gpu_here(device)) if device.type == "cuda" else []
    found: Settled | str = ""
    if process_group.rank() == 0:
        ranks = process_group.world_size()
        try:
            earlier = _earlier(reader) if reader is not None else None
            make = cache(lambda: _gpu(*min(gpus, key=lambda gpu: gpu[1])) if gpus else this_machine(ranks))
            found = settle(config, ranks, make, earlier)
        except UserError as error:
            found = str(error)
    found = process_group.gather_objects(found)[0]
    if isinstance(found, str):
        raise UserError(found)
    return found


def _gpu_here(device: torch.device) -> tuple[str, float, bool]:
    """Name, memory in bytes, and whether attention newer than FlashAttention-2 is installed for it."""
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    return torch.cuda.get_device_name(device), memory, has_newer_flash_attention(device.index or 0)


def _gpu(name: str, memory: float, newer_attention: bool) -> Device:
    device = gpu_like(name, memory)
    return device.with_attention(NEWER_ATTENTION) if newer_attention else device


def _earlier(reader: CheckpointReader) -> Earlier | None:
    """None if the checkpoint is of a version whose configuration cannot be read."""
    try:
        return Earlier(parse_config(reader.meta["config"], str(reader.folder)), reader.world_size)
    except UserError:
        return None


def settle(
    config: Config, ranks: int, device: Callable[[], Device], earlier: Earlier | None = None
) -> Settled:
    """The configuration with a number for every `auto`, for `ranks` devices.

    What the checkpoint was settled to is kept if it still fits: micro-batch and recomputation, and with as
    many processes as before ZeRO's settings. Otherwise all is chosen anew, and a line says why.
    """
    lines: list[str] = []
    stages = resolve_stages(config)
    before = {} if earlier is None else {stage.first: stage for stage in resolve_stages(earlier.config)}

    def choose(stage: Stage) -> Settings:
        keys = automatic(stage.config)
        if not keys:
            return {}
        where = f"auto ({stage.name or f'stage {stage.number + 1}'}): " if len(stages) > 1 else "auto: "
        if stage.first in before:
            same_ranks = earlier is not None and earlier.ranks == ranks
            kept = _values(before[stage.first].config, [k for k in keys if same_ranks or _ZERO not in k])
            try:
                planner, best, found = _best(_with(stage.config, kept), ranks, device())
                anew = "" if same_ranks else f", ZeRO anew for {ranks} process(es)"
                lines.append(f"{where}as in the checkpoint{anew}: {_told(planner, best)}")
                return _settings(planner, best, keys)
            except UserError as error:
                lines.append(f"{where}chosen anew, the checkpoint's settings do not go here: {error}")
        try:
            planner, best, found = _best(stage.config, ranks, device())
        except UserError as error:
            hint = f", {_BY_HAND}" if str(error).startswith("no setting fits") else ""
            raise UserError(f"{error}{hint}") from None
        others = [option for option in found if option.fits and option != best]
        lines.append(f"{where}{_told(planner, best)}")
        if others:
            lines[-1] += f"; next best {_named(planner, others[0])}: {_speed(planner, others[0])}"
        return _settings(planner, best, keys)

    return Settled(_laid(config, stages, choose), lines)


def settled_as(config: Config, earlier: Config) -> Config:
    """The configuration with the values of another run's record in place of `auto`."""
    before = {stage.first: stage.config for stage in resolve_stages(earlier)}

    def choose(stage: Stage) -> Settings:
        known = before.get(stage.first)
        return {} if known is None else nested(_values(known, automatic(stage.config)))

    return _laid(config, resolve_stages(config), choose)


def without_auto(config: Config) -> Config:
    """The configuration with a section's defaults in place of `auto`: what looks at a step of it, and has no
    device to choose for."""
    plain = _values(Config(), ["data.micro_batch", "run.activation_checkpointing.policy", _ZERO + "stage"])

    def choose(stage: Stage) -> Settings:
        keys = automatic(stage.config)
        return nested(given for given in plain if given.key in keys)

    return _laid(config, resolve_stages(config), choose)


def _laid(config: Config, stages: list[Stage], choose: Callable[[Stage], Settings]) -> Config:
    """The configuration with what is chosen for each stage written into it."""
    chosen = cache(lambda first: choose(next(stage for stage in stages if stage.first == first)))
    values = merge(config.model_dump(mode="json"), chosen(0))
    values["stages"] = [merge(part, chosen(part["at"])) for part in config.stages]
    return parse_config(values, "auto")


def _best(config: Config, ranks: int, device: Device) -> tuple[Planner, Option, list[Option]]:
    planner = Planner(config, ranks, device)
    return planner, *planner.best(planner.automatic())


def _values(config: Config, keys: list[str]) -> list[Given]:
    """Those of the settings that the configuration has, and fixes."""
    values = config.model_dump(mode="json")
    found = [Given("", key, reduce(_entry, key.split("."), values)) for key in keys]
    return [given for given in found if given.value not in (None, AUTO)]


def _entry(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else None


def _with(config: Config, given: list[Given]) -> Config:
    return parse_config(config.model_dump(mode="json"), "the checkpoint's settings", given)


def _settings(planner: Planner, option: Option, keys: list[str]) -> Settings:
    config = planner.with_settings(option.stage, option.micro_batch, option.policy)
    return nested(_values(config, keys))


def _named(planner: Planner, option: Option) -> str:
    config = planner.with_settings(option.stage, option.micro_batch, option.policy)
    beside = " with overlap" if option.stage and config.deepspeed["zero_optimization"]["overlap_comm"] else ""
    policy = "no" if option.policy == "none" else option.policy
    return f"micro-batch {option.micro_batch}, ZeRO {option.stage}{beside}, {policy} checkpointing"


def _told(planner: Planner, option: Option) -> str:
    device = planner.device
    return (
        f"{_named(planner, option)}: {option.memory.peak / 1e9:.3g} of {device.memory / 1e9:.3g} GB, "
        f"{_speed(planner, option)} a device by the planner on {planner.ranks} x {device.name}"
    )


def _speed(planner: Planner, option: Option) -> str:
    return f"{planner.config.data.global_batch / option.step.seconds / planner.ranks:.3g} images/s"
