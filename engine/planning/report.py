"""Report of the planner: what `plan` and `train.py --plan` print."""

import json
import shlex

from millrace.engine.config import Config
from millrace.engine.config.loading import dict_from_overrides, merge
from millrace.engine.config.stages import resolve_stages
from millrace.engine.model.flops import dense_training_flops
from millrace.engine.model.routing import describe as describe_routing
from millrace.engine.planning.automatic import automatic
from millrace.engine.planning.cpu_device import this_machine
from millrace.engine.planning.devices import ASSUMED, GPUS, Device
from millrace.engine.planning.frozen_sizes import Loaded
from millrace.engine.planning.search import TIE, Option, Planner
from millrace.engine.planning.step_memory import Shape, gigabytes, saved_bytes
from millrace.engine.planning.step_time import HOST_BANDWIDTH, HOST_LINK, Step
from millrace.engine.util.errors import UserError

DEFAULT_DEVICE = "h200"


def plan(
    config: Config, gpus: int, device_name: str = DEFAULT_DEVICE, images_per_second: float | None = None
) -> list[str]:
    """The plan of a resolved configuration as lines, of every stage of the run.

    Args:
        gpus: devices of the job, one process on each.
        device_name: one of GPUS, or cpu: this machine.
        images_per_second: that the loader delivers to one process; None if it never starves.
    """
    device = GPUS[device_name] if device_name in GPUS else this_machine(gpus)
    lines: list[str] = []
    hours = 0.0
    stages = resolve_stages(config)
    taken: dict[int, list[str]] = {}
    frozen: list[Loaded] = []
    for stage in stages:
        if len(stages) > 1:
            lines += [f"== steps {stage.first} to {stage.last}{': ' + stage.name if stage.name else ''}"]
        planner = Planner(stage.config, gpus, device, images_per_second)
        best, found = planner.best()
        lines += describe(planner, best, found, stage.last - stage.first, alone=len(stages) == 1)
        lines += ["", *alternatives(planner, best, found, stage.last - stage.first), ""]
        hours += best.step.seconds * (stage.last - stage.first) / 3600
        taken[stage.first] = settings(best)
        frozen.append(planner.frozen)
    if len(stages) > 1:
        lines += [f"whole run: {hours / 24:.2f} days, {hours * gpus:,.0f} device hours"]
        parts = [merge(part, dict_from_overrides(taken[part["at"]])) for part in config.stages]
        lines += [_as_arguments([*taken[0], f"stages={json.dumps(parts)}"]), ""]
    return [*lines, *notes(frozen, device)]


def describe(
    planner: Planner, best: Option, found: list[Option], steps: int, alone: bool = True
) -> list[str]:
    """The setting to take, what it comes to, and why it was chosen; of a run of one stage `alone` also how to
    say it on the command line."""
    config, device, step, memory = planner.config, planner.device, best.step, best.memory
    batch = config.data.global_batch
    accumulation = batch // (best.micro_batch * planner.ranks)
    capacity = device.capacity
    hours = step.seconds * steps / 3600
    images = batch / step.seconds
    return [
        f"model: {_parameters(planner.shape)}; {planner.image_tokens} tokens of an image, "
        f"{planner.text_tokens} of a caption; {planner.flops / 1e12:.3g} TFLOP an image",
        _routing(planner),
        f"devices: {planner.ranks} x {device.name}",
        *_configured(planner, best),
        f"ZeRO stage: {best.stage}",
        f"micro-batch: {best.micro_batch}, {accumulation} of them on each device make data.global_batch "
        f"{batch}",
        f"activation checkpointing: {best.policy}",
        f"memory: {gigabytes(memory.peak)} GB of {gigabytes(capacity)} GB usable "
        f"({memory.peak / capacity:.0%}) on each device, highest in {memory.worst}; always held "
        f"{gigabytes(memory.held)} GB; at the peak {memory.table()}",
        *_host_state(planner, best),
        *_host_memory(planner),
        f"step: {step.seconds:.3g} s: {_terms(step)}, communication {step.exposed:.2g} that nothing hides "
        f"({step.exposed / step.seconds:.1%} of the step; {step.communication:.2g} in all)"
        + (f", waiting for the loader {step.starving:.2g}" if step.starving else ""),
        f"speed: {images:,.0f} images/s, {images / planner.ranks:.1f} on each device{_mfu(planner, images)}",
        f"duration: {hours / 24:.2f} days, {hours * planner.ranks:,.0f} device hours for {steps:,} steps, "
        f"{steps * batch:,} images",
        *([_as_arguments(settings(best))] if alone else []),
        *reasons(planner, best, found),
    ]


def _parameters(shape: Shape) -> str:
    """Elements of the model, and which of them are trained where not all are."""
    line = f"{shape.parameters + shape.frozen:,} parameters"
    if not shape.frozen:
        return line
    return f"{line}, {shape.parameters:,} of them trained ({shape.factors:,} of an adapter)"


def _routing(planner: Planner) -> str:
    line = describe_routing(planner.config)
    if planner.config.routing.policy == "none":
        return line
    dense = dense_training_flops(planner.config, planner.image_tokens, planner.text_tokens)
    share = planner.flops / dense
    return f"{line}; {share:.1%} of the dense FLOPs, so steps are up to {1 / share:.2f} times as fast"


def _configured(planner: Planner, best: Option) -> list[str]:
    """The configuration as it is, `auto` as a run resolves it, where it makes a run on so many devices."""
    try:
        options = list(planner.automatic())
    except UserError as error:
        return [f"as configured: {error}"]
    fitting = [option for option in options if option.fits]
    option = planner.best(fitting)[0] if fitting else min(options, key=lambda o: o.memory.peak)
    if option == best and automatic(planner.config):
        return ["as configured: auto takes this"]
    fits = "" if option.fits else ", does not fit"
    return [
        f"as configured: ZeRO {option.stage}, micro-batch {option.micro_batch}, checkpointing "
        f"{option.policy}: {gigabytes(option.memory.peak)} GB{fits}, {option.step.seconds:.3g} s a step"
    ]


def _host_state(planner: Planner, best: Option) -> list[str]:
    if not planner.shape.host_state:
        return []
    size = planner.shape.host_state / (planner.ranks if best.stage else 1)
    return [
        f"optimizer on the host: {gigabytes(size)} GB of its memory for each process, assumed to reach "
        f"{HOST_BANDWIDTH / 1e9:g} GB/s there and {HOST_LINK / 1e9:g} GB/s on the way"
    ]


def _host_memory(planner: Planner) -> list[str]:
    if planner.config.checkpoint.blocking:
        return []
    size = saved_bytes(planner.config, planner.ranks, planner.shape)
    return [
        f"host memory: {gigabytes(size)} GB for each process, of which checkpoints are written "
        "(checkpoint.blocking=true needs none)"
    ]


def _terms(step: Step) -> str:
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in step.terms.items() if seconds)


def _mfu(planner: Planner, images: float) -> str:
    peak = planner.device.peak_flops
    return f", MFU {planner.flops * images / planner.ranks / peak:.1%}" if peak else ""


def settings(best: Option) -> list[str]:
    """The overrides that make a stage take the option."""
    return [
        f"data.micro_batch={best.micro_batch}",
        f"run.activation_checkpointing.policy={best.policy}",
        f"deepspeed.zero_optimization.stage={best.stage}",
    ]


def _as_arguments(overrides: list[str]) -> str:
    return "settings: " + " ".join(f"--set {shlex.quote(item)}" for item in overrides)


def reasons(planner: Planner, best: Option, compared: list[Option]) -> list[str]:
    """Why each of the three settings was chosen, from what was `compared`, the fastest first."""
    found = []
    first = compared[0]
    if first != best:
        found.append(
            f"why not the fastest: ZeRO {first.stage} with checkpointing {first.policy} is "
            f"{best.step.seconds / first.step.seconds - 1:.1%} faster, within the {TIE:.0%} that the model "
            f"cannot tell; there the first of the stages {', '.join(map(str, planner.simplest))} is taken, "
            "then the least recomputation"
        )
    lower = [planner_option(planner, stage, best) for stage in range(best.stage)]
    too_large = [o.stage for o in lower if o is not None and not o.fits]
    slower = [o for o in lower if o is not None and o.fits and o.step.seconds > best.step.seconds]
    words = []
    if too_large:
        words.append(f"{_stages(too_large)} would not fit with these settings")
    if slower:
        quick = min(slower, key=lambda o: o.step.seconds)
        more = quick.step.seconds / best.step.seconds - 1
        words.append(f"{_stages([o.stage for o in slower])} would take {more:.1%} longer or more")
    if not best.stage:
        words.append("everything fits, and no other stage is faster by more than the model can tell")
    if not words and any(o is not None and o.fits for o in lower):
        words.append("stage 0 is as fast to the model, but reduces nothing beside the backward pass")
    found.append(f"why ZeRO {best.stage}: {'; '.join(words) or 'no lower stage goes with the configuration'}")
    each = planner.config.data.global_batch // planner.ranks
    limit = (
        "all that a device has of the global batch" if best.micro_batch == each else "the largest that fits"
    )
    found.append(f"why micro-batch {best.micro_batch}: {limit}; weights and gradients move least often")
    if best.policy == "none":
        why = "all activations fit, nothing is computed twice"
    else:
        kept = planner.option(best.stage, best.micro_batch, "none")
        why = f"without it {gigabytes(kept.memory.peak)} GB at this micro-batch"
        if kept.fits:
            why = "with a larger micro-batch the step is faster than without it"
    found.append(f"why checkpointing {best.policy}: {why}")
    return found


def planner_option(planner: Planner, stage: int, best: Option) -> Option | None:
    """The best option's settings at another stage, or None where the engine does not take them."""
    if not planner.allowed(stage, best.policy):
        return None
    return planner.option(stage, best.micro_batch, best.policy)


def _stages(stages: list[int]) -> str:
    return f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(map(str, stages))}"


def alternatives(planner: Planner, best: Option, found: list[Option], steps: int) -> list[str]:
    """A table of what was compared, for so many steps, the fastest first."""
    head = ["ZeRO", "micro-batch", "checkpointing", "memory GB", "fits", "step s", "images/s"]
    head += ["communication", "days", ""]
    lines = [head]
    for option in found:
        step = option.step
        lines.append(
            [
                str(option.stage),
                str(option.micro_batch),
                option.policy,
                gigabytes(option.memory.peak),
                "yes" if option.fits else "no",
                f"{step.seconds:.3g}",
                f"{planner.config.data.global_batch / step.seconds:,.0f}",
                f"{step.exposed / step.seconds:.1%}",
                f"{step.seconds * steps / 86400:.2f}",
                "<- taken" if option == best else "",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def notes(frozen: list[Loaded], device: Device) -> list[str]:
    """What the figures rest on; `frozen` has the frozen networks of each stage."""
    found = [
        "A model, no measurement: formulas in engine/planning, checked in docs/performance.md. Uncounted: "
        "saving, drawing and judging samples (but for the weights that draw them), operators' own workspace, "
        "alignment heads, a tuned autoencoder's activations. 1 GB is 1e9 bytes.",
    ]
    if device.assumed:
        assumed = ", ".join(f"{name} {ASSUMED[name]:g}" for name in device.assumed)
        found.append(f"Assumed, not measured: {assumed}.")
    if unknown := dict.fromkeys(kind for loaded in frozen for kind in loaded.unknown):
        found.append(f"Not counted, size unknown: {', '.join(unknown)}.")
    if assumed := dict.fromkeys(name for loaded in frozen for name in loaded.assumed):
        found.append(f"Counted as the published network, no config.json to read: {', '.join(assumed)}.")
    return found
