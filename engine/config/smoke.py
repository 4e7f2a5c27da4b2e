"""`--smoke`: any configuration made small enough to run all its code on a CPU in under a minute.

Kept: prediction type, routing, alignment, kinds of towers (tiny ones with random weights of the real
classes), optimizer, solver, ZeRO stage, precision, and the stages, two steps each. Shrunk: every dimension.
Not run: `torch.compile`, which takes longer than the rest, and transformer_engine, which needs a GPU: its FP8
products are done by torch's.
"""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from millrace.engine.config import AutoencoderTuning, Config, Data, Fp8, Objective, Validation
from millrace.engine.config.loading import dict_from_overrides, merge, parse_config
from millrace.engine.config.stages import Stage, resolve_stages

SUFFIX = "-smoke"
"""Added to the run's folder, so that trying a configuration never touches its runs."""
_GRID = 8
"""Tokens along the edge of a smoke picture; structured routes need a multiple of 4."""
_STAGE_STEPS = 2
_HELD_OUT = 0.5
"""Of the 22 pictures, of which some are held out at any seed that is likely."""


def smoke(config: Config, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The small version of `config`; `overrides` (`a.b=c`) have the last word."""
    stages, last_word = resolve_stages(config), dict_from_overrides(overrides)
    steps = max(4, _STAGE_STEPS * len(stages))
    parts = []
    for stage in stages:
        larger = min(max(round(stage.config.data.resolution / stages[0].config.data.resolution), 1), 2)
        values = merge(
            merge(stage.config.model_dump(mode="json"), _small(stage.config, steps, larger)), last_word
        )
        shrunk = parse_config(values, "--smoke")
        parts.append(merge(values, _tiny_networks(shrunk)))
    whole = parts[0] | {"stages": [_stage(stage, parts) for stage in stages[1:]]}
    return parse_config(whole, "--smoke")


def _stage(stage: Stage, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a small stage overrides: all that is not as in the one before, and what it begins anew."""
    now = parts[stage.number]
    changed = _changes(parts[stage.number - 1], now)
    if stage.schedule_step == stage.first:
        changed["schedule"] = now["schedule"]
    if stage.data_step == stage.first:
        changed["data"] = now["data"]
    return {"name": stage.name, "at": _STAGE_STEPS * stage.number, **changed}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The part of nested `new` that differs from `old`."""
    changed: dict[str, Any] = {}
    for key, value in new.items():
        if value == old.get(key):
            continue
        nested = isinstance(value, dict) and isinstance(old.get(key), dict)
        changed[key] = _changes(old[key], value) if nested else value
    return changed


def _small(config: Config, steps: int, larger: int) -> dict[str, Any]:
    """What replaces the settings of one stage; `larger` multiplies the edge of its pictures."""
    from millrace.engine.encoders.autoencoder import published_factor

    model, conditioning = config.model, config.conditioning
    patch, depth = min(model.patch_size, 4), min(model.depth, 6)
    return {
        "run": {
            "output_dir": config.run.output_dir + SUFFIX,
            "steps": steps,
            "device": "cpu",
            "compile": False,
            "init_from": None,
        },
        "model": {
            "width": 64,
            "heads": 2,
            "depth": depth,
            "patch_size": patch,
            "rope_axes": None,
            "bottleneck": 16 if model.bottleneck else None,
            "context_dim": 32,
            "geglu_backend": _without_gpu(model.geglu_backend),
        },
        "routing": {"start": max(min(config.routing.start, depth - 4), 0), "end": None},
        "alignment": {
            "block": min(config.alignment.block, depth // 2),
            "attention": {"blocks": [depth - 2, depth - 1], "teacher_layers": [0, 1], "heads": 2},
        },
        "conditioning": {
            "text": {"max_tokens": 64, "kernels": _without_gpu(conditioning.text.kernels)},
            "autoencoder": {"tuning": _small_tuning(conditioning.autoencoder.tuning)},
        },
        "objective": _small_judges(config.objective),
        "data": {
            **_small_source(config.data),
            "resolution": published_factor(conditioning.autoencoder) * patch * _GRID * larger,
            "upscale": True,
            "global_batch": 4,
            "micro_batch": 2,
            "workers": 1,
        },
        "schedule": {"warmup": 2},
        "precision": {"fp8": _fp8_without_gpu(config.precision.fp8)},
        "ema": {"every": 1, "start": 0},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "logging": {"every_steps": 2, "wandb": False, "mlflow": None},
        "sampling": {"every_steps": steps, "prompts": [], "count": 2, "steps": 2},
        "evaluation": {
            "every_steps": steps if config.evaluation.every_steps else 0,
            "reference": None,
            "samples": 4,
            "reference_samples": 4,
        },
        "validation": _small_validation(config.validation, steps),
    }


def _without_gpu(kernels: str) -> str:
    """Whose kernels: liger-kernel's need CUDA."""
    return "auto" if kernels == "liger" else kernels


def _fp8_without_gpu(fp8: Fp8) -> dict[str, Any]:
    return {"backend": "torch", "recipe": "tensorwise"} if fp8.backend == "transformer_engine" else {}


def _small_tuning(tuning: AutoencoderTuning) -> dict[str, Any]:
    """A discriminator that is small, new, and learns in the run."""
    start = min(tuning.gan_start, 1)
    return {"discriminator_width": 8, "discriminator_path": None, "gan_start": start, "norm_samples": 8}


def _small_source(data: Data) -> dict[str, Any]:
    """The pictures that come with this project, in place of each folder."""
    own = {"path": None, "keys": None}
    shards = {"aspect": "mixed" if data.aspect == "bucket" else data.aspect, "cached": [], "loader": "auto"}
    if data.source == "mixture":
        parts = [part.model_dump(mode="json") for part in data.mixture]
        return {"mixture": [part | own | {"source": "builtin"} for part in parts], **own, **shards}
    return {"source": "builtin", **own, **shards}


def _small_validation(validation: Validation, steps: int) -> dict[str, Any]:
    """A share of the pictures that come with this project, in place of a folder."""
    held = validation.share or validation.path is not None
    return {
        "every_steps": steps if validation.every_steps else 0,
        "share": _HELD_OUT if held else 0.0,
        "path": None,
        "samples": 4,
        "times": 2,
    }


def _small_judges(objective: Objective) -> dict[str, Any]:
    """Sizes at which the networks that look at predicted pictures see something of small ones."""
    judges: dict[str, Any] = {}
    if objective.lpips.weight:
        judges["lpips"] = {"resize": max(objective.lpips.resize, 0.75)}
    if objective.dino.weight:
        from millrace.engine.encoders.teacher import vision_entry

        judges["dino"] = {"size": 2 * vision_entry(objective.dino.kind).patch}
    return judges


def _tiny_networks(config: Config) -> dict[str, Any]:
    """Paths of small random instances of the configured frozen networks, made under the output folder."""
    from millrace.engine.encoders.autoencoder import autoencoder_entry
    from millrace.engine.encoders.lpips import tiny_lpips
    from millrace.engine.encoders.teacher import vision_entry
    from millrace.engine.encoders.text_encoder import text_encoder_entry
    from millrace.engine.evaluation.features import tiny_features, tiny_networks

    folder, dim = Path(config.run.output_dir) / "towers", config.model.context_dim
    conditioning: dict[str, Any] = {}
    kind = config.conditioning.text.kind
    text = text_encoder_entry(kind)
    if text.source is not None:
        path = made_once(folder / f"{kind}-{dim}", lambda new: text.tiny(dim, new))
        conditioning["text"] = {"path": path}
    kind = config.conditioning.autoencoder.kind
    autoencoder = autoencoder_entry(kind)
    if autoencoder.network is not None:
        conditioning["autoencoder"] = {"path": made_once(folder / kind, autoencoder.tiny)}
    teacher: dict[str, Any] = {}
    if config.alignment.active:
        kind = config.alignment.teacher.kind
        teacher = {"path": made_once(folder / kind, vision_entry(kind).tiny), "cache": None}
    objective, tuning = config.objective, config.conditioning.autoencoder.tuning
    judges: dict[str, Any] = {}
    if objective.lpips.weight or (tuning.enabled and tuning.perceptual_weight):
        judges["lpips"] = {"path": made_once(folder / "lpips", tiny_lpips)}
    if objective.dino.weight:
        kind = objective.dino.kind
        judges["dino"] = {"path": made_once(folder / kind, vision_entry(kind).tiny)}
    evaluation: dict[str, Any] = {}
    if config.evaluation.every_steps:
        path = made_once(folder / "metrics", tiny_networks)
        cache = str(Path(config.run.output_dir) / "reference-statistics")
        evaluation = {"features": tiny_features(path), "cache": cache}
    return {
        "conditioning": conditioning,
        "objective": judges,
        "evaluation": evaluation,
        "alignment": {"teacher": teacher},
    }


def made_once(folder: Path, make: Callable[[Path], Path]) -> str:
    """`folder`, filled by `make` unless it is there already; of several processes that come here at once, one
    makes it and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished).rename(folder)
    return str(folder)
