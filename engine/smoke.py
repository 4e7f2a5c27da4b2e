"""`--smoke`: any configuration made small enough to run all its code on a CPU in under a minute.

Kept: prediction type, routing, kinds of towers (tiny ones with random weights of the real classes), solver,
ZeRO stage, precision. Shrunk: every dimension. Not run: `torch.compile`, which takes longer than the rest.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from millrace.engine.conditioning.autoencoder import PUBLISHED_FACTOR
from millrace.engine.config import Config
from millrace.engine.config_file import dict_from_overrides, merge, parse_config

SUFFIX = "-smoke"
"""Added to the run's folder, so that trying a configuration never touches its runs."""
_GRID = 8
"""Tokens along the edge of a smoke picture; structured routes need a multiple of 4."""


def smoke(config: Config, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The small version of `config`; `overrides` (`a.b=c`) have the last word."""
    model, conditioning = config.model, config.conditioning
    patch = min(model.patch_size, 4)
    output = config.run.output_dir + SUFFIX
    depth = min(model.depth, 6)
    small: dict[str, Any] = {
        "run": {"output_dir": output, "steps": 4, "device": "cpu", "compile": False, "init_from": None},
        "model": {
            "width": 64,
            "heads": 2,
            "depth": depth,
            "patch_size": patch,
            "rope_axes": None,
            "bottleneck": 16 if model.bottleneck else None,
            "context_dim": 32,
        },
        "routing": {"start": max(min(config.routing.start, depth - 4), 0), "end": None},
        "conditioning": {"text": {"max_tokens": 64}},
        "data": {
            "source": "builtin",
            "path": None,
            "resolution": PUBLISHED_FACTOR[conditioning.autoencoder.kind] * patch * _GRID,
            "upscale": True,
            "global_batch": 4,
            "micro_batch": 2,
            "workers": 1,
        },
        "schedule": {"warmup": 2},
        "ema": {"every": 1, "start": 0},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "logging": {"every_steps": 2, "wandb": False},
        "sampling": {"every_steps": 4, "prompts": [], "count": 2, "steps": 2},
    }
    values = merge(merge(config.model_dump(mode="json"), small), dict_from_overrides(overrides))
    shrunk = parse_config(values, "--smoke")
    return parse_config(merge(values, {"conditioning": _tiny_towers(shrunk)}), "--smoke")


def _tiny_towers(config: Config) -> dict[str, Any]:
    """Paths of small random instances of the configured towers, made under the output folder."""
    text, autoencoder = config.conditioning.text, config.conditioning.autoencoder
    paths: dict[str, Any] = {}
    folder = Path(config.run.output_dir) / "towers"
    if text.kind != "hash":
        from millrace.engine.conditioning.tiny import tiny_text_tower

        dim = config.model.context_dim
        path = _made(folder / f"{text.kind}-{dim}", lambda new: tiny_text_tower(text.kind, dim, new))
        paths["text"] = {"path": path}
    if autoencoder.kind != "pixels":
        from millrace.engine.conditioning.tiny import tiny_autoencoder

        path = _made(folder / autoencoder.kind, lambda new: tiny_autoencoder(autoencoder.kind, new))
        paths["autoencoder"] = {"path": path}
    return paths


def _made(folder: Path, make: Callable[[Path], Path]) -> str:
    """`folder`, filled by `make` unless it is there already; several processes may come here at once."""
    if not folder.exists():
        mine = folder.with_name(f"{folder.name}.{os.getpid()}")
        make(mine)
        try:
            mine.rename(folder)
        except OSError:
            shutil.rmtree(mine)  # another process was first, with the same weights
    return str(folder)
