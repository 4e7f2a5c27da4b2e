"""DeepSpeed configuration, made from ours, and its engine."""

import difflib
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from millrace.engine.config import Config
from millrace.engine.distributed.process_group import world_size
from millrace.engine.distributed.zero_settings import zero_section, zero_stage
from millrace.engine.util.errors import UserError

# Keys that follow from our configuration, and where they are set there.
OWNED = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch and data.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision",
    "communication_data_type": "precision.reduce",
    "zero_allow_untested_optimizer": "optimizer.kind",
    "steps_per_print": "logging.every_steps",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "csv_monitor": "logging",
    "checkpoint": "checkpoint",
    "activation_checkpointing": "run.activation_checkpointing",
    "compile": "run.compile",
}

# Keys that DeepSpeed 0.19 reads and that we pass on. It ignores unknown ones without a word, so we do not.
PASSED = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "timers",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
)

_LINEAR = (
    "torch.nn.Linear",
    "millrace.engine.model.adapters.AdaptedLinear",
    "millrace.engine.model.fp8.Fp8Linear",
    "millrace.engine.model.working_weights.WorkingLinear",
)
"""Linear layers by the names that DeepSpeed imports; it asks for the very class."""


def accumulation_steps(config: Config, ranks: int | None = None) -> int:
    """Micro-batches of one optimizer step on each of `ranks` processes, by default the job's."""
    data, ranks = config.data, ranks or world_size()
    if data.global_batch % (data.micro_batch * ranks):
        raise UserError(
            f"data.global_batch {data.global_batch} is not a multiple of data.micro_batch {data.micro_batch} "
            f"x {ranks} process(es); change one of them"
        )
    return data.global_batch // (data.micro_batch * ranks)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. UserError where the user's section conflicts with ours.

    BF16 arithmetic is `torch_autocast`, never the `bf16` block: that one rounds the weights themselves.
    """
    for key in config.deepspeed:
        if key in OWNED:
            raise UserError(
                f"deepspeed.{key} conflicts with the engine, which sets it from {OWNED[key]}; remove it there"
            )
        if key not in PASSED:
            raise UserError(f"deepspeed.{key} is not a key that DeepSpeed reads; {_hint(key)}")
    stage, precision = zero_stage(config), config.precision
    if precision.master == "bfloat16" and stage != 0:
        raise UserError(
            f"precision.master bfloat16 is an experiment for ZeRO stage 0; stage {stage} keeps FP32 masters. "
            "Set deepspeed.zero_optimization.stage to 0"
        )
    if stage == 3 and (config.adapter.active or config.optimizer.frozen):
        key = "adapter.kind" if config.adapter.active else "optimizer.frozen"
        raise UserError(
            f"{key} leaves little to shard, and ZeRO stage 3 would take the frozen weights apart; set "
            "deepspeed.zero_optimization.stage to 2"
        )
    if stage == 3 and config.run.activation_checkpointing.policy == "selective":
        raise UserError(
            "run.activation_checkpointing.policy selective does not work at ZeRO stage 3, which frees "
            "weights between forward and backward; use full, or stage 2"
        )
    if config.run.activation_checkpointing.policy == "selective" and config.run.compile:
        raise UserError(
            "run.activation_checkpointing.policy selective does not see into compiled blocks (run.compile) "
            "and would recompute everything; use full, or switch one of the two off"
        )
    backend = precision.fp8.chosen
    if stage == 3 and backend in ("torchao", "transformer_engine"):
        raise UserError(
            f"precision.fp8.backend {backend} keeps whole weights from forward to backward, which ZeRO stage "
            "3 frees; take torch, or stage 2"
        )
    for key, instead in (
        ("offload_optimizer", "remove it and set optimizer.kind to adamw_offload"),
        ("offload_param", "remove it"),
    ):
        if key in config.deepspeed.get("zero_optimization", {}):
            raise UserError(f"deepspeed.zero_optimization.{key} is not supported by this engine; {instead}")
    if precision.reduce == "bfloat16" and precision.compute != "bfloat16":
        raise UserError("precision.reduce bfloat16 needs precision.compute bfloat16")
    values: dict[str, Any] = {
        # DeepSpeed's throughput timer makes the host wait for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **config.deepspeed,
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config),
        "gradient_clipping": 0.0,  # our optimizers clip (`optimizer_step.py`)
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if precision.compute == "bfloat16":
        # The list names the modules whose gradients ZeRO reduces in BF16; empty keeps the reduction FP32.
        low = list(_LINEAR) if precision.reduce == "bfloat16" else []
        values["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": low}
        if precision.reduce == "bfloat16":
            values["communication_data_type"] = "bf16"
    return values


def _hint(key: str) -> str:
    """What a key that nobody reads may have been meant to be."""
    near = difflib.get_close_matches(key, (*PASSED, *OWNED), n=1, cutoff=0.5)
    if not near:
        return f"it takes: {', '.join(PASSED)}"
    if near[0] in OWNED:
        return f"{near[0]!r} follows from {OWNED[near[0]]}, set it there"
    return f"did you mean {near[0]!r}?"


def initialize_engine(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Wrap model and optimizer: (DeepSpeed engine, DeepSpeed's optimizer, which at stage 0 is ours)."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    try:
        engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=with_buckets(config, model)
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"deepspeed.zero_optimization.{where}: {problem['msg']}") from error
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(f"deepspeed: {' '.join(str(error).split())}") from error
    return engine, wrapped


def with_buckets(config: Config, model: nn.Module) -> dict[str, Any]:
    """`deepspeed_config` with all of `zero_optimization` that depends on the model and the processes."""
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    section = zero_section(config, zero_stage(config), world_size(), elements)
    return deepspeed_config(config) | {"zero_optimization": section}
