"""The section of docs/planning.md about settings of `auto`: what they become on other devices."""

from functools import cache

from millrace.benchmarks.report.marked_section import with_section
from millrace.benchmarks.report.recording import Result
from millrace.benchmarks.report.tables import Table
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config
from millrace.engine.config.stages import resolve_stages
from millrace.engine.planning.devices import GPUS
from millrace.engine.planning.search import Option, Planner
from millrace.engine.util.errors import UserError

CONFIGS = ("latent_256", "jit_1024", "jit_1024_tread", "speedrun_24h")
DEVICES = ("rtx4090", "h100", "h200")
PROCESSES = (1, 8, 32)


def page(_results: list[Result], before: str) -> str:
    """The page `before`, with what stands between its marks made anew. Raises UserError without the marks."""
    return with_section(before, section(), "planning.md")


def section() -> str:
    """The table, from the planner alone."""
    names = [f"{GPUS[name].name}, {GPUS[name].memory / 1e9:.0f} GB" for name in DEVICES]
    lines = [
        [name, str(ranks), *(_cell(row[device]) for device in DEVICES)]
        for (name, ranks), row in chosen().items()
    ]
    return Table(["configuration", "devices", *names], lines).markdown()


@cache
def chosen() -> dict[tuple[str, int], dict[str, Option | None]]:
    """What is taken by (configuration or its stage, devices) and device; None where nothing fits."""
    found: dict[tuple[str, int], dict[str, Option | None]] = {}
    for name in CONFIGS:
        stages = resolve_stages(load_config(name))
        for ranks in PROCESSES:
            for stage in stages:
                title = f"{name}, {stage.config.data.resolution} px" if len(stages) > 1 else name
                found[title, ranks] = {device: _option(stage.config, ranks, device) for device in DEVICES}
    return found


def _option(config: Config, ranks: int, device: str) -> Option | None:
    planner = Planner(config, ranks, GPUS[device])
    try:
        return planner.best(planner.automatic())[0]
    except UserError:
        return None


def _cell(option: Option | None) -> str:
    if option is None:
        return "nothing fits"
    policy = "" if option.policy == "none" else f", {option.policy}"
    return f"{option.micro_batch}, ZeRO {option.stage}{policy}: {option.memory.peak / 1e9:.1f} GB"
