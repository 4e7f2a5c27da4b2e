"""Start-up text: what a run prints before its first step (stage, model, data, job, precision)."""

import torch

from millrace.engine.config import Config, guidance_warnings
from millrace.engine.config.stages import Stage, describe_stage
from millrace.engine.data.sources.pictures import Source
from millrace.engine.distributed import deepspeed_engine, process_group
from millrace.engine.distributed.precision_audit import AuditRow
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.model.routing import describe
from millrace.engine.util.errors import UserError
from millrace.kernels.attention.rope_attention import describe_choice
from millrace.kernels.ops.geglu import liger_obstacle


def introduction(
    stages: list[Stage],
    stage: Stage,
    named_shapes: list[tuple[str, tuple[int, ...]]],
    source: Source,
    prepare: BatchEncoder,
    rows: list[AuditRow],
) -> list[str]:
    """Lines for people: the stage, what was built, from what, and what is stored in which dtype.

    Args:
        stages: of the run; `stage` is the one that begins or goes on.
        named_shapes: of all parameters, heads and adapters included.
        rows: of the precision audit.

    Raises UserError for a `model.geglu_backend` that cannot run on this device.
    """
    config = stage.config
    parameters = sum(torch.Size(shape).numel() for _, shape in named_shapes)
    lines = [describe_stage(stages, stage)] if len(stages) > 1 else []
    samples = config.sampling.every_steps > 0 or config.evaluation.every_steps > 0
    return [
        *lines,
        f"model: {parameters:,} parameters, width {config.model.width}, depth {config.model.depth}",
        f"data: {len(source)} pictures ({config.data.source}); "
        f"text: {prepare.text_encoder.identity}; pictures as {prepare.autoencoder.identity}",
        f"job: {process_group.world_size()} process(es) on {prepare.device.type}, "
        f"ZeRO {deepspeed_engine.zero_stage(config)}, {deepspeed_engine.accumulation_steps(config)} x "
        f"{config.data.micro_batch} samples per process and step",
        describe(config),
        f"attention: {_attention(config, prepare.device)}",
        *_geglu(config, prepare.device),
        *_of_text_encoder(prepare.text_encoder.kernels),
        *(guidance_warnings(config.sampling, config.routing, config.objective) if samples else []),
        "precision audit:",
        *(f"  {what:<32} {dtypes}" for what, dtypes in rows),
    ]


def _attention(config: Config, device: torch.device) -> str:
    """The backend that the blocks use."""
    if config.model.attention_backend != "auto":
        return config.model.attention_backend
    return describe_choice(device, getattr(torch, config.precision.compute), config.model.head_dim)


def _geglu(config: Config, device: torch.device) -> list[str]:
    """A line about the backend of the MLP's activation, where one was asked for."""
    wanted = config.model.geglu_backend
    if wanted == "auto":
        return []
    obstacle = liger_obstacle(device) if wanted == "liger" else None
    if obstacle is not None:
        raise UserError(
            f"model.geglu_backend liger: {obstacle}; pip install 'liger-kernel>=0.8.5' (the extra `encoders` "
            "has it) on a machine with CUDA, or set it to auto"
        )
    return [f"geglu: {wanted}"]


def _of_text_encoder(kernels: str) -> list[str]:
    """A line about the kernels of the text encoder, where it has a network that is loaded."""
    return [f"text encoder's kernels: {kernels}"] if kernels else []
