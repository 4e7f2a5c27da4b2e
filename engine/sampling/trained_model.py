"""Trained model on disk, opened for sampling and evaluation."""

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from millrace.engine.checkpoint.model_weights import (
    checkpoint_folder,
    checkpoint_state,
)
from millrace.engine.checkpoint.weight_formats import PRX_FILE, is_diffusers, load_weights
from millrace.engine.config import Config, Sampling
from millrace.engine.config.loading import (
    dict_from_overrides,
    load_config,
    merge,
    parse_config,
)
from millrace.engine.config.sampling import SELF_ONLY
from millrace.engine.encoders.autoencoder import Autoencoder, open_autoencoder
from millrace.engine.encoders.text_encoder import open_text_tower
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.conversion import expect_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.errors import UserError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model, and how it is sampled."""
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="run folder, checkpoint folder, or diffusers folder"
    )
    parser.add_argument("--config", help="configuration for a folder that holds none (diffusers weights)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "ema2", "model"),
        default="auto",
        help="auto: EMA if there is one",
    )
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--guidance", type=float, help="scale of the guidance; 1 is off")
    parser.add_argument(
        "--method",
        choices=get_args(Sampling.model_fields["method"].annotation),
        help="what the guidance leads away from (docs/guidance.md)",
    )
    parser.add_argument("--solver", choices=("euler", "heun"))
    parser.add_argument(
        "--mean-target",
        type=Path,
        metavar="FILE",
        help="take back the shift of contrastive flow matching, with the weight of the training",
    )


def load_model(arguments: argparse.Namespace) -> tuple[dict[str, Tensor], Config]:
    """Weights, and the configuration that they were trained with under the arguments of
    `add_model_arguments`."""
    names = ("steps", "guidance", "solver", "method")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    changes = merge(dict_from_overrides(arguments.overrides), {"sampling": given})
    if arguments.method not in (None, "self"):
        # What the run had set for its own method would be refused beside another one.
        changes = merge({"sampling": Sampling().model_dump(mode="json", include=set(SELF_ONLY))}, changes)
    if _holds_weights_only(arguments.checkpoint):
        if not arguments.config:
            raise UserError(
                f"{arguments.checkpoint} holds weights only; add --config FILE for towers and objective"
            )
        wanted = load_config(arguments.config)
        weights, model, routing = load_weights(
            arguments.checkpoint, wanted.model if _is_state_dict(arguments.checkpoint) else None
        )
        # Such weights are of no SPRINT model, whatever the run was that the configuration is for.
        found = {"model": model.model_dump(mode="json"), "routing": routing.model_dump(mode="json")}
        values = wanted.model_dump(mode="json") | found
        return weights, _with_mean_target(merge(values, changes), arguments)
    weights, config = checkpoint_state(checkpoint_folder(arguments.checkpoint), arguments.weights)
    values = config.model_dump(mode="json")
    return weights, _with_mean_target(merge(values, changes), arguments)


def _with_mean_target(values: dict[str, Any], arguments: argparse.Namespace) -> Config:
    """The configuration of `values`, with --mean-target and the weight that goes with it."""
    if arguments.mean_target is not None:
        sampling = values["sampling"]
        sampling["mean_target"] = str(arguments.mean_target)
        sampling["contrastive"] = sampling["contrastive"] or values["objective"]["contrastive_weight"]
        if not sampling["contrastive"]:
            raise UserError(
                "--mean-target takes back what objective.contrastive_weight does, which is 0 for this model; "
                "leave it out, or --set sampling.contrastive"
            )
    return parse_config(values, arguments.config or str(arguments.checkpoint))


def open_trained_autoencoder(config: Config, checkpoint: Path, device: torch.device) -> Autoencoder:
    """The autoencoder that the model of `checkpoint` was trained with. Raises UserError."""
    if not config.conditioning.autoencoder.tuning.enabled:
        return open_autoencoder(config.conditioning.autoencoder, device)
    from millrace.engine.repa_e.tuned_autoencoder import open_trained

    return open_trained(config, run_of(checkpoint), device)


def open_sampler(
    weights: dict[str, Tensor], config: Config, checkpoint: Path, device: torch.device
) -> Sampler:
    """A sampler with `weights` and the frozen networks of the configuration; of a run that tuned its
    autoencoder, with that of `checkpoint`."""
    compute = getattr(torch, config.precision.compute)
    expect_state(weights, config.model, config.routing, f"weights of {checkpoint}")
    denoiser = Denoiser(config.model, config.routing)
    denoiser.load_state_dict(weights)
    autoencoder = open_trained_autoencoder(config, checkpoint, device)
    edge = config.model.patch_size * autoencoder.factor
    return Sampler(
        denoiser.to(device).eval().requires_grad_(False),
        FlowMatching(config.objective, config.run.seed, edge),
        autoencoder,
        open_text_tower(config.conditioning.text, config.model.context_dim, device, compute),
        device,
        compute,
    )


def _is_state_dict(path: Path) -> bool:
    """Whether `path` is PRX's form, which does not say what model it is."""
    return path.is_file() or (path / PRX_FILE).is_file()


def _holds_weights_only(path: Path) -> bool:
    """Whether `path` is exported weights (diffusers or PRX), not a run or one of its checkpoints."""
    return _is_state_dict(path) or any(map(is_diffusers, (path, path / "transformer")))


def run_of(path: Path) -> Path | None:
    """`path` if it is a run or one of its checkpoints, None if it is weights alone."""
    return None if _holds_weights_only(path) else path
