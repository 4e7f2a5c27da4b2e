"""What a run says of itself before its first step."""

import torch

from millrace.engine.config import Config, guidance_warnings
from millrace.engine.data.pictures import Source
from millrace.engine.model.routing import describe
from millrace.engine.preparation import Preparation
from millrace.engine.runtime import distributed, zero
from millrace.engine.runtime.precision import DTYPES, AuditRow
from millrace.engine.stages import Stage, describe_stage
from millrace.kernels.rope_attention import describe_choice


def introduction(
    stages: list[Stage],
    stage: Stage,
    named_shapes: list[tuple[str, tuple[int, ...]]],
    source: Source,
    prepare: Preparation,
    rows: list[AuditRow],
) -> list[str]:
    """Lines for people: the stage, what was built, from what, and what is stored in which dtype.

    Args:
        stages: of the run; `stage` is the one that begins or goes on.
        named_shapes: of everything that is trained.
        rows: of the precision audit.
    """
    config = stage.config
    parameters = sum(torch.Size(shape).numel() for _, shape in named_shapes)
    lines = [describe_stage(stages, stage)] if len(stages) > 1 else []
    samples = config.sampling.every_steps > 0 or config.evaluation.every_steps > 0
    return [
        *lines,
        f"model: {parameters:,} parameters, width {config.model.width}, depth {config.model.depth}",
        f"data: {len(source)} pictures ({config.data.source}); "
        f"text: {prepare.text_tower.identity}; pictures as {prepare.autoencoder.identity}",
        f"job: {distributed.world_size()} process(es) on {prepare.device.type}, "
        f"ZeRO {zero.zero_stage(config)}, {zero.accumulation_steps(config)} x {config.data.micro_batch} "
        "samples per process and step",
        describe(config),
        f"attention: {_attention(config, prepare.device)}",
        *(guidance_warnings(config.sampling, config.routing, config.objective) if samples else []),
        "precision audit:",
        *(f"  {what:<32} {dtypes}" for what, dtypes in rows),
    ]


def _attention(config: Config, device: torch.device) -> str:
    """The backend that the blocks use."""
    if config.model.attention_backend != "auto":
        return config.model.attention_backend
    return describe_choice(device, DTYPES[config.precision.compute])
