"""Adapter files: a run's LoRA or DoRA as peft reads it over diffusers' PRXTransformer2DModel.

adapter_config.json          rank, alpha, layers, and the base that the run began with
adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (rank, K), .lora_B.weight (N, rank),
                             .lora_magnitude_vector (N,) of DoRA

model = PRXTransformer2DModel.from_pretrained(base)
model = peft.PeftModel.from_pretrained(model, folder)
"""

import argparse
import json
from typing import Any

import torch

from millrace.engine.checkpoint.model_weights import (
    checkpoint_config,
    choose_weights,
    describe_checkpoint,
    read_parameters,
)
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.weight_formats import new_folder
from millrace.engine.config import Adapter
from millrace.engine.model.adapters import DOWN, MAGNITUDE, UP, is_factor
from millrace.engine.model.conversion import adapter_state
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import atomic_file, write_atomically
from millrace.engine.util.safetensors_file import write_safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PEFT = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}


def export_adapter(reader: CheckpointReader, arguments: argparse.Namespace) -> str:
    """Write the adapter of a checkpoint into a new folder; returns a line for people.

    Args:
        arguments: of the command: `output`, `weights`, `dtype`, and `format`, which can be diffusers' alone.

    Raises UserError where the run has no adapter, trained more than it, or began with random weights.
    """
    if not arguments.output or arguments.format != "diffusers":
        raise UserError("--adapter writes peft's files for diffusers' model; it goes with --output alone")
    config = checkpoint_config(reader)
    adapter, base = config.adapter, config.run.init_from
    if not adapter.active:
        raise UserError(f"{reader.folder} has no adapter (adapter.kind none); leave --adapter out")
    if adapter.unfrozen:
        raise UserError(
            f"{reader.folder} trained {', '.join(adapter.unfrozen)} besides its adapter (adapter.unfrozen), "
            "which peft's files have no place for; leave --adapter out, and the weights come merged"
        )
    if base is None:
        raise UserError(
            f"{reader.folder} began with random weights (run.init_from), so its adapter fits no other model; "
            "leave --adapter out, and the weights come merged"
        )
    weights, dtype = choose_weights(reader, arguments.weights), getattr(torch, arguments.dtype)
    found = read_parameters(reader, weights)
    layers = adapter_state({name: found[name] for name in found if is_factor(name)}, config.model)
    tensors = {
        f"base_model.model.{layer}.{_PEFT[kind]}": tensor.to(dtype).contiguous()
        for layer, parts in layers.items()
        for kind, tensor in parts.items()
    }
    folder = new_folder(arguments.output)
    try:
        with atomic_file(folder / TENSORS) as file:
            write_safetensors(file, tensors, {"format": "pt"})
        write_atomically(
            folder / CONFIG, json.dumps(_peft_config(adapter, list(layers), base), indent=2) + "\n"
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    origin = describe_checkpoint(reader, weights)
    return f"{folder}: {adapter.kind} of {origin}, in {arguments.dtype}, for peft over {base}"


def _peft_config(adapter: Adapter, layers: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.rank if adapter.alpha is None else adapter.alpha,
        "use_dora": adapter.kind == "dora",
        "target_modules": layers,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
