"""Where the time of one training step went, against the least that it could take.

One step of the trainer runs under torch.profiler; `step_timeline.py` gives each of its instants a category.

The roofline of a category is what `traffic.py`'s ledger says of its operators, at ceilings measured on the
same device just before: products take the longer of their arithmetic and their bytes, attention its
arithmetic at the rate of products, all else its bytes. To it come, for AdamW, 28 bytes a parameter and 4 for
the norm; for BF16 arithmetic on FP32 weights, 12 bytes a parameter and micro-batch for the casts of weights
and gradients; and the FLOPs of the frozen networks at the rate of products.
"""

import argparse
import functools
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, record_function

from millrace.benchmarks.kernels import timing
from millrace.benchmarks.models import traffic
from millrace.benchmarks.models.ledger import Entry
from millrace.benchmarks.report import profile_report, recording
from millrace.benchmarks.report.charts import draw_beside
from millrace.benchmarks.step import training_steps as steps
from millrace.benchmarks.step.step_timeline import (
    CATEGORIES,
    CONDITIONING,
    OPTIMIZER,
    STEP,
    account,
    attribute,
    events_of,
)
from millrace.benchmarks.step.throughput_inputs import Live
from millrace.engine.config import Config
from millrace.engine.distributed import process_group
from millrace.engine.distributed.zero_settings import zero_stage
from millrace.engine.planning.step_time import REFRESH
from millrace.kernels.support.registration import HAS_TRITON

Row = dict[str, Any]


@functools.cache
def ceilings(device: torch.device) -> Row:
    """What the device reaches in a large copy and a large product, measured once."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = timing.ceilings(timing.timer_for(device), device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def profile(trainer: Live, limits: Row) -> Row:
    """Run two steps of the trainer under the profiler and account for the second.

    Args:
        limits: of the device, as `ceilings` gives them.

    Returns:
        step_seconds; categories with seconds, share and roofline; the heaviest operators.
    """
    device = trainer.device
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with ExitStack() as stack:
        for owner, name, label in (
            (trainer, "next_batch", CONDITIONING),
            (trainer, "look_ahead", CONDITIONING),
            (trainer.optimizer_step, "apply", OPTIMIZER),
        ):
            stack.enter_context(mock.patch.object(owner, name, _labelled(label, getattr(owner, name))))
        recorded = stack.enter_context(torch.profiler.profile(activities=activities))
        for _ in range(2):
            with record_function(STEP):
                trainer.train_step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    length, spans = attribute(*events_of(recorded))
    return {"benchmark": "profile"} | account(length, spans) | _roofline_row(trainer, limits)


def _labelled(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return call(*args, **kwargs)

    return run


def _roofline_row(trainer: Live, limits: Row) -> Row:
    if not HAS_TRITON:
        return {"ceilings": limits, "roofline_seconds": None, "roofline_missing": "Triton is not installed"}
    lengths = [round(trainer.text_tokens / trainer.images)] * trainer.config.data.micro_batch
    found = roofline(
        trainer.config,
        limits,
        lengths,
        sum(p.numel() for p in trainer.model.parameters()),
        trainer.accumulate,
        sum(trainer.frozen_flops.values()),
    )
    return {"ceilings": limits, "roofline_seconds": found}


def roofline(
    config: Config, limits: Row, lengths: list[int], parameters: int, micro_batches: int, frozen_flops: float
) -> dict[str, float | None]:
    """Least seconds of a step on one process by category; None where no bound is known.

    Args:
        limits: copy_bytes_per_second, gemm_flops_per_second.
        lengths: text tokens of the samples of a micro-batch.
        parameters: of everything that is trained.
        micro_batches: of a step.
        frozen_flops: for one image.
    """
    copy, products = limits["copy_bytes_per_second"], limits["gemm_flops_per_second"]
    backend = "varlen" if config.model.attention_backend == "auto" else config.model.attention_backend
    counted = steps.with_values(config, {"model": {"attention_backend": backend}})
    least: dict[str, float | None] = dict.fromkeys(CATEGORIES, 0.0)
    times: Counter[str] = Counter()
    for entry in traffic.record(counted, "ours", lengths).entries:
        times[_category_of_entry(entry)] += micro_batches * _least(entry, copy, products)
    stage = zero_stage(config)
    if config.precision.compute == "bfloat16":
        # Working copies are made once and gradients widened; at stage 3 the weights are cast each time.
        again = 12 * micro_batches if stage == 3 else REFRESH * (1 + micro_batches)
        times["other operators"] += again * parameters / copy
    times["data and conditioning"] += micro_batches * len(lengths) * frozen_flops / products
    least |= dict(times)
    shards = process_group.world_size() if stage else 1
    least["optimizer"] = 32 * parameters / shards / copy if config.optimizer.kind == "adamw" else None
    least["communication"] = 0.0 if process_group.world_size() == 1 else None
    return least


def _category_of_entry(entry: Entry) -> str:
    if entry.cost.kind == "other":
        return "fused kernels" if entry.operator.startswith("millrace::") else "other operators"
    return "GEMM" if entry.cost.kind == "gemm" else "attention"


def _least(entry: Entry, copy: float, products: float) -> float:
    cost = entry.cost
    if cost.kind == "gemm":
        return max(cost.flops / products, cost.moved / copy)
    return cost.flops / products if cost.kind == "attention" else cost.moved / copy


def target(arguments: argparse.Namespace, output: Path | None, name: str) -> Path:
    """Where the profile of a case goes, without an ending: the folder of --profile, or beside the results."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
    if arguments.profile != ".":
        return Path(arguments.profile) / f"profile-{slug}"
    if output is not None:
        return output.with_name(f"{output.stem}-profile-{slug}")
    return Path("runs") / "profiles" / f"profile-{slug}"


def write(found: Row, path: Path) -> None:
    """Write a profile as JSON and SVG and print it."""
    if process_group.rank() != 0:
        return
    content = recording.environment() | found
    recording.write(path.with_suffix(".json"), content)
    print(
        f"one step of {found['config']}, {found['conditioning']}:",
        profile_report.table(found).text(),
        sep="\n",
    )
    print(draw_beside(profile_report.draw, content, path.with_suffix(".json")))
