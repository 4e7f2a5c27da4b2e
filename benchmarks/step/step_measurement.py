"""Training steps of a configuration, timed: what `throughput.py` and its suite have in common."""

import argparse
import gc
import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from millrace.benchmarks.report import throughput_report as report
from millrace.benchmarks.step import waterfall
from millrace.benchmarks.step.throughput_inputs import FROZEN, Live, open_trainer
from millrace.engine.config import AUTO, Config
from millrace.engine.config.loading import load_config, merge, parse_config
from millrace.engine.config.smoke import smoke
from millrace.engine.config.stages import resolve_stages
from millrace.engine.distributed import process_group
from millrace.engine.planning.automatic import settle_run
from millrace.engine.util.data_sheets import peak_flops
from millrace.engine.util.errors import UserError

log = logging.getLogger("millrace.benchmarks.throughput")

Row = dict[str, Any]


class Measured(NamedTuple):
    """What is measured of a configuration."""

    name: str
    """Its file's, with the stage's where it has several."""
    config: Config


def resolve(
    path: str, arguments: argparse.Namespace, folder: Path, defaults: Sequence[str] = ()
) -> list[Measured]:
    """The stages of a configuration to measure, all or those of `arguments.stage`. Their runs write into
    `folder`, and nowhere else.

    Args:
        defaults: overrides that those of the command line win over.
    """
    overrides = [*arguments.overrides, f"run.output_dir={folder}"]
    config = load_config(path, [*defaults, *overrides])
    if arguments.smoke:
        config = smoke(config, overrides)
    stages, stem = resolve_stages(config), Path(path).stem
    wanted = arguments.stage or range(1, len(stages) + 1)
    if max(wanted) > len(stages):
        raise UserError(f"--stage {max(wanted)}: {stem} has {len(stages)}")
    found = []
    for number in wanted:
        stage = stages[number - 1]
        name = stem if len(stages) == 1 else f"{stem}, stage {number} {stage.name}".rstrip()
        found.append(Measured(name, _of_stage(stage.config, arguments, folder / str(number))))
    return found


def _of_stage(config: Config, arguments: argparse.Namespace, folder: Path) -> Config:
    """The configuration of a stage as that of a run of a few steps."""
    # One more than are run: the last step of a run prepares nothing for the next, and would look cheaper.
    steps = arguments.warmup + arguments.steps + 2 * bool(arguments.profile) + 1
    own = {
        "run": {"output_dir": str(folder), "steps": steps, "init_from": None},
        "logging": {"tensorboard": False, "wandb": False},
        "evaluation": {"every_steps": 0},
        "validation": {"every_steps": 0, "share": 0.0, "path": None},
    }
    config = parse_config(merge(config.model_dump(mode="json"), own), "benchmark")
    if config.data.micro_batch == AUTO:
        device = process_group.choose_device(config.run.device)
        process_group.initialize(device)
        config, lines = settle_run(config, device, None)
        if process_group.rank() == 0:
            print("\n".join(lines))
    return config if arguments.accumulate else of_one_micro_batch(config)


def of_one_micro_batch(config: Config, samples: int | None = None) -> Config:
    """The configuration with one micro-batch per process and step, of `samples` images if that is given."""
    samples = samples or config.data.micro_batch
    batch = samples * int(os.environ.get("WORLD_SIZE", "1"))
    values = {"data": {"micro_batch": samples, "global_batch": batch}}
    return parse_config(merge(config.model_dump(mode="json"), values), "benchmark")


def with_micro_batch(config: Config, samples: int) -> Config:
    """The configuration with other micro-batches; a step of several keeps its images."""
    if config.data.global_batch == config.data.micro_batch * int(os.environ.get("WORLD_SIZE", "1")):
        return of_one_micro_batch(config, samples)
    return parse_config(
        merge(config.model_dump(mode="json"), {"data": {"micro_batch": samples}}), "benchmark"
    )


def halving(config: Config, call: Callable[[Config], Row]) -> Row:
    """`call(config)`, with micro-batches of half the size as long as they do not fit the GPU."""
    while True:
        release()
        try:
            return call(config)
        except torch.OutOfMemoryError:
            samples = config.data.micro_batch // 2
            if samples < 1:
                raise
        # Outside of the handler, whose traceback holds on to the tensors of the attempt.
        config = with_micro_batch(config, samples)


def release() -> None:
    """Give back what the last case held, and the code compiled for it: compiled variants of one function
    are limited in number, and what is beyond runs uncompiled without a word."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_steps(
    trainer: Live, warmup: int, steps: int, then: Callable[[Live], None] | None = None
) -> list[float]:
    """Seconds of each of `steps` training steps after `warmup` others, from one idle device to the next.

    `then` is called with the trainer before it is closed.
    """
    seconds = []
    gc.collect()
    gc.freeze()
    try:
        with trainer.stop_requests as requests:
            for i in range(warmup + steps):
                if i == warmup:
                    trainer.count_from_here()
                    if trainer.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(trainer.device)
                wait_for(trainer.device)
                started = time.perf_counter()
                trainer.train_step()
                request = requests.poll()
                wait_for(trainer.device)
                if i >= warmup:
                    seconds.append(time.perf_counter() - started)
                if request.stop:
                    raise KeyboardInterrupt
        if then is not None:
            then(trainer)
    finally:
        gc.unfreeze()
        trainer.sample_log.close()
        trainer.stream.close()
        trainer.run_log.close()
    return seconds


def wait_for(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_and_peak(device: torch.device) -> tuple[int, str, float | None]:
    """Peak memory of this process, what that is, and the FLOP/s of the device if they are known."""
    if device.type == "cuda":
        memory, kind = torch.cuda.max_memory_allocated(device), "allocated on the GPU in the measured steps"
        return memory, kind, peak_flops(torch.cuda.get_device_name(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident since its start", None


def measure(path: str, what: Measured, conditioning: str, arguments: argparse.Namespace) -> Row:
    """Train a few steps and return the row, the same on every process."""
    return halving(
        what.config, lambda fitting: _measure(path, Measured(what.name, fitting), conditioning, arguments)
    )


def _measure(path: str, what: Measured, conditioning: str, arguments: argparse.Namespace) -> Row:
    config = what.config
    ceilings = (
        waterfall.ceilings(process_group.choose_device(config.run.device)) if arguments.profile else None
    )
    log.info("%s, %s: %d steps after %d", what.name, conditioning, arguments.steps, arguments.warmup)
    trainer = open_trainer(config, conditioning, arguments.text_tokens)
    trainer.count_frozen()
    config, device, devices = trainer.config, trainer.device, process_group.world_size()
    found: Row = {}

    def after(trainer: Live) -> None:
        found["memory"], found["counts"] = memory_and_peak(device), trainer.counts
        if ceilings:
            found["profile"] = waterfall.profile(trainer, ceilings)

    mine = time_steps(trainer, arguments.warmup, arguments.steps, after)
    memory, kind, peak = found["memory"]
    gathered = process_group.gather_objects((mine, memory, found["counts"], trainer.frozen_flops))
    times, memories, counts, frozen = zip(*gathered, strict=True)
    flops, images, image_tokens, text_tokens = (sum(count) for count in zip(*counts, strict=True))
    step_seconds = [max(step) for step in zip(*times, strict=True)]
    frozen_flops = {name: sum(one[name] for one in frozen) / devices for name in FROZEN}
    # Random latents say nothing of a row whose autoencoder is what the post measured.
    latents = conditioning == "cached" and config.conditioning.autoencoder.kind not in ("flux1", "pixels")
    published = None if arguments.smoke or latents else report.published_row(path, arguments.overrides)
    resolved = config.model_dump(mode="json")
    del resolved["run"]["output_dir"]
    row = {
        "config": what.name,
        "overrides": arguments.overrides,
        "smoke": arguments.smoke,
        "conditioning": conditioning,
        "includes": trainer.includes,
        "loader": None if conditioning == "cached" else trainer.stream.loader,
        "device": device.type,
        "devices": devices,
        "micro_batch": config.data.micro_batch,
        "global_batch": config.data.global_batch,
        "image_tokens": image_tokens / images,
        "text_tokens": text_tokens / images,
        **report.summarise(
            step_seconds, config.data.global_batch, devices, flops / images, peak, published, frozen_flops
        ),
        "peak_memory_bytes": max(memories),
        "peak_memory_kind": f"of one process, {kind}",
        "skipped_steps": trainer.skipped,
        "warmup_steps": arguments.warmup,
        "step_seconds": step_seconds,
        "resolved": resolved,
    }
    if "profile" in found:
        names = ("config", "conditioning", "device", "devices", "micro_batch", "global_batch", "smoke")
        row["profile"] = {name: row[name] for name in names} | found["profile"]
        row["profile"]["unprofiled_step_seconds_median"] = row["step_seconds_median"]
    return row
