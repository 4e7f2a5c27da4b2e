"""The points of `scaling.py` beside what `engine/planning` predicts of them, and the model far from them."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from millrace.benchmarks.report.recording import ROOT
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config, merge, parse_config
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.flops import attention_share, training_flops
from millrace.engine.planning.activations import Traced, trace
from millrace.engine.planning.automatic import without_auto
from millrace.engine.planning.devices import GPUS, Device, MeasuredNetwork
from millrace.engine.planning.step_memory import Memory, Shape, memory_of, shape_of
from millrace.engine.planning.step_time import Step, step_of, transfers
from millrace.engine.util.data_sheets import sheet_name

Row = dict[str, Any]

MEMORY_BOUND, TIME_BOUND = 0.10, 0.15
"""Largest relative errors that are accepted."""
CONFIGS = ROOT / "configs"
MODELLED = ("models/prx_7b", 16)
"""The configuration that is modelled far away, and images of a device's micro-batch."""
DEVICES = (8, 64, 1024)


def tokens_of(config: Config) -> tuple[int, int]:
    """Image and text tokens of a sample."""
    edge = config.data.resolution // (
        published_factor(config.conditioning.autoencoder) * config.model.patch_size
    )
    return edge * edge, config.conditioning.text.max_tokens


@cache
def _traced(values: str, stage: int) -> Traced:
    config = parse_config(json.loads(values), "scaling")
    image, text = tokens_of(config)
    return trace(config, config.data.micro_batch, math.isqrt(image), text, stage)


def evaluate(values: Row, stage: int, ranks: int, device: Device) -> tuple[Memory, Step, Shape]:
    """Memory and step of one micro-batch a process at a ZeRO stage, inputs given.

    Args:
        values: configuration of one process, as plain values.
    """
    zero = values["deepspeed"].get("zero_optimization", {}) | {"stage": stage}
    changes = {
        "data": {"global_batch": values["data"]["micro_batch"] * ranks},
        "deepspeed": {"zero_optimization": zero},
    }
    config = parse_config(merge(values, changes), "scaling")
    image, text = tokens_of(config)
    traced, shape = _traced(json.dumps(values), 3 if stage == 3 else 0), shape_of(config)
    memory = memory_of(config, stage, ranks, traced, shape, fused=device.fused_optimizer)
    return (
        memory,
        step_of(
            config,
            stage,
            ranks,
            device,
            traced,
            shape,
            training_flops(config, image, text),
            attention=attention_share(config, image, text),
        ),
        shape,
    )


def slowest(found: list[Row]) -> Row:
    """One machine out of what its processes saw: the lowest rates, the longest times."""
    return _of_machines(found, min, max)


def best(rounds: list[Row]) -> Row:
    """One machine out of what it reached in several rounds."""
    return _of_machines(rounds, max, min)


def _of_machines(found: list[Row], rate: Callable[..., float], time: Callable[..., float]) -> Row:
    kinds = found[0]["collectives"]
    return {
        "gemm_flops_per_second": rate(one["gemm_flops_per_second"] for one in found),
        "copy_bytes_per_second": rate(one["copy_bytes_per_second"] for one in found),
        "collectives": {
            kind: [
                [size, time(one["collectives"][kind][i][1] for one in found)]
                for i, (size, _) in enumerate(kinds[kind])
            ]
            for kind in kinds
        },
    }


def point(stage: int, processes: int, rounds: list[list[Row]]) -> Row:
    """One point out of what its processes saw in each round: of each step the slowest process, of the first
    round the largest memory."""
    first = rounds[0]
    return {
        "stage": stage,
        "processes": processes,
        "step_seconds": [[max(step) for step in _steps(found, "seconds")] for found in rounds],
        "processor_seconds": [[sum(step) for step in _steps(found, "processor_seconds")] for found in rounds],
        "peak_memory_bytes": max(one["memory"]["peak"] for one in first),
        "held_memory_bytes": max(one["memory"]["between_steps"] for one in first),
        "collectives": first[0]["traffic"],
        "skipped_steps": max(one["skipped"] for found in rounds for one in found),
    }


def _steps(found: list[Row], name: str) -> Iterable[tuple[float, ...]]:
    return zip(*(one[name] for one in found), strict=True)


def seconds_of(found: Row) -> float:
    """Time of a step: the median of the fastest round, because other work only ever adds time."""
    return min(statistics.median(steps) for steps in found["step_seconds"])


def device_of(content: Row, processes: int, slack: float = 1.0) -> Device:
    """The machine of a result as a device of the model, as one of so many processes sees it."""
    machine = content["machine"][str(processes)]
    cuda = content["device"] == "cuda"
    return Device(
        name=content["gpus"][0]["name"] if cuda else content["cpu"],
        product_flops=machine["gemm_flops_per_second"],
        copy_bandwidth=machine["copy_bytes_per_second"],
        memory=content["memory_bytes"] / processes,
        network=MeasuredNetwork(machine["collectives"]),
        slack=slack,
        fused_optimizer=cuda,
        overlaps=cuda,
        assumed=(),
    )


def fitted_slack(seconds: float, bare: Step) -> float:
    """Time over the roofline that explains a step of `seconds`, given the model's step with a slack of 1."""
    return max(0.0, (seconds - (bare.seconds - bare.compute)) / bare.compute)


def point_section(stage: int) -> Row:
    """`zero_optimization` of a measured point: only stage 3 reduces beside the backward pass, as on a machine
    without streams."""
    return {"stage": stage, "overlap_comm": stage == 3}


def predict(content: Row) -> list[Row]:
    """A row for each point: measured, predicted, and the relative errors of the prediction."""
    values, rows = content["config"], []
    base = next(p for p in content["points"] if (p["stage"], p["processes"]) == (0, 1))
    bare = evaluate(values, 0, 1, device_of(content, 1))[1]
    slack = fitted_slack(seconds_of(base), bare)
    for found in content["points"]:
        stage, ranks = found["stage"], found["processes"]
        point = merge(values, {"deepspeed": {"zero_optimization": point_section(stage)}})
        memory, step, shape = evaluate(point, stage, ranks, device_of(content, ranks, slack))
        seconds = seconds_of(found)
        config = parse_config(values, "scaling")
        expected = transfers(config, stage, ranks, shape, 1)
        rows.append(
            {
                "stage": stage,
                "processes": ranks,
                "calibration": found is base,
                "slack": slack,
                "seconds": seconds,
                "predicted_seconds": step.seconds,
                "seconds_error": step.seconds / seconds - 1,
                "predicted_parts": step.terms | {"communication": step.exposed},
                "memory": found["peak_memory_bytes"],
                "predicted_memory": memory.peak,
                "memory_error": memory.peak / found["peak_memory_bytes"] - 1,
                "predicted_phase": memory.worst,
                "communication": sum(one["bytes"] for one in found["collectives"].values()) * (ranks > 1),
                "predicted_communication": sum(one.size for one in expected),
            }
        )
    return rows


def accepted(rows: Iterable[Row]) -> bool:
    """Whether every row is within the bounds."""
    return all(
        abs(row["memory_error"]) <= MEMORY_BOUND and abs(row["seconds_error"]) <= TIME_BOUND for row in rows
    )


def gpu_points(folder: Path) -> list[Row]:
    """Every training step measured on a GPU that the results hold, beside the model's; none of trial runs.

    Steps with inputs from memory; the model takes the data sheet's device and its assumed slack, and the
    slack that would have been right is given.
    """
    points = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("benchmark") not in ("throughput", "suite") or result.get("smoke"):
            continue
        for row in result.get("rows", result.get("cases", [])):
            device = GPUS.get(_gpu_key(result))
            usable = (
                row.get("device") == "cuda" and row.get("conditioning") == "cached" and not row.get("smoke")
            )
            if device is None or not usable or "resolved" not in row or not row.get("step_seconds_median"):
                continue
            points.append(_gpu_point(row, device, path.name) | {"gpu": _gpu_key(result)})
    return points


def _gpu_key(result: Row) -> str:
    name = result["gpus"][0]["name"] if result.get("gpus") else ""
    return sheet_name(name) or ""


def _gpu_point(row: Row, device: Device, file: str) -> Row:
    values, ranks = row["resolved"], row["devices"]
    values = merge(values, {"data": {"global_batch": row["micro_batch"], "micro_batch": row["micro_batch"]}})
    values["alignment"] = {"kind": "none"}
    stage = values["deepspeed"].get("zero_optimization", {}).get("stage", 0)
    memory, step, _ = evaluate(values, stage, ranks, device)
    bare = evaluate(values, stage, ranks, device.calibrated(1.0))[1]
    seconds = row["step_seconds_median"]
    return {
        "file": file,
        "config": row["config"],
        "overrides": row["overrides"],
        "device": device.name,
        "devices": ranks,
        "stage": stage,
        "seconds": seconds,
        "predicted_seconds": step.seconds,
        "seconds_error": step.seconds / seconds - 1,
        "memory": row["peak_memory_bytes"],
        "predicted_memory": memory.peak,
        "memory_error": memory.peak / row["peak_memory_bytes"] - 1,
        "slack": fitted_slack(seconds, bare),
    }


def calibration(points: list[Row]) -> dict[str, float]:
    """The slack that would have been right, by name of the GPU: the median of its points."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in points:
        found[row["gpu"]].append(row["slack"])
    return {name: round(statistics.median(slacks), 3) for name, slacks in sorted(found.items())}


def modelled() -> list[Row]:
    """`MODELLED` on H200, every ZeRO stage, the same batch on each."""
    device = GPUS["h200"]
    name, micro_batch = MODELLED
    rows = []
    values = without_auto(load_config(str(CONFIGS / f"{name}.json"))).model_dump(mode="json")
    batch = {"data": {"micro_batch": micro_batch, "global_batch": micro_batch}}
    values = merge(values, batch | {"sampling": {"every_steps": 0}, "validation": {"every_steps": 0}})
    for stage in range(4):
        for ranks in DEVICES:
            memory, step, _ = evaluate(values, stage, ranks, device)
            images = micro_batch * ranks / step.seconds
            rows.append(
                {
                    "config": name,
                    "device": device.name,
                    "slack": device.slack,
                    "assumed": list(device.assumed),
                    "stage": stage,
                    "devices": ranks,
                    "micro_batch": micro_batch,
                    "seconds": step.seconds,
                    "images_per_second": images,
                    "images_per_second_per_device": images / ranks,
                    "memory": memory.peak,
                    "fits": memory.peak <= device.memory * device.usable,
                    "communication_seconds": step.communication,
                    "communication_share": step.exposed / step.seconds,
                    "sent_bytes": step.sent,
                }
            )
    return rows
