"""Trained model on disk, opened for sampling and evaluation."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.engine.checkpoint.model_weights import (
    checkpoint_config,
    choose_weights,
    describe_checkpoint,
    pinned_checkpoint,
    read_weights,
)
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.weight_formats import PRX_FILE, is_diffusers, load_weights
from millrace.engine.config import Config, Sampling
from millrace.engine.config.loading import Given, load_config, merge, nested, parse_config
from millrace.engine.config.sampling import SELF_ONLY
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.encoders.autoencoder import Autoencoder, open_autoencoder
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.losses.contrastive import MeanTarget, mean_target
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.conversion import expect_state
from millrace.engine.model.flops import sampling_flops
from millrace.engine.model.guidance_branches import describe
from millrace.engine.sampling.model_arguments import given_settings
from millrace.engine.sampling.sampler import Sampler, filled_denoiser
from millrace.engine.util.errors import UserError


class TrainedModel(NamedTuple):
    """Weights, and what they are."""

    weights: dict[str, Tensor]
    config: Config
    """With which they were trained, under the arguments of the command."""
    origin: str
    """For people: checkpoint, step, stage, EMA or not."""


@contextmanager
def pinned_model(arguments: argparse.Namespace) -> Iterator[None]:
    """In this block `arguments.checkpoint` is one checkpoint, if it was a run its newest, and it stays: a run
    that goes on meanwhile does not prune it."""
    run = run_of(arguments.checkpoint)
    if run is None:
        yield
        return
    with pinned_checkpoint(run) as arguments.checkpoint:
        yield


def model_config(arguments: argparse.Namespace) -> Config:
    """The configuration of `load_model`; reads no weights."""
    if _holds_weights_only(arguments.checkpoint):
        found = load_config(arguments.config) if arguments.config else Config()
    else:
        found = checkpoint_config(CheckpointReader(arguments.checkpoint, verify=False))
    return _under_arguments(found.model_dump(mode="json"), arguments)


def load_model(arguments: argparse.Namespace) -> TrainedModel:
    """What the arguments of `add_model_arguments` name; `arguments.checkpoint` is that of `pinned_model`."""
    if _holds_weights_only(arguments.checkpoint):
        if not arguments.config:
            raise UserError(
                f"{arguments.checkpoint} holds weights only; add --config FILE for towers and objective"
            )
        wanted = load_config(arguments.config)
        weights, model, routing, _ = load_weights(
            arguments.checkpoint, wanted.model if _is_state_dict(arguments.checkpoint) else None
        )
        # Such weights are of no SPRINT model, whatever the run was that the configuration is for.
        found = {"model": model.model_dump(mode="json"), "routing": routing.model_dump(mode="json")}
        config = _under_arguments(wanted.model_dump(mode="json") | found, arguments)
        return TrainedModel(
            weights, config, f"weights of {arguments.checkpoint}, settings of {arguments.config}"
        )
    reader = CheckpointReader(arguments.checkpoint)
    kind = choose_weights(reader, arguments.weights)
    values = checkpoint_config(reader).model_dump(mode="json")
    return TrainedModel(
        read_weights(reader, kind), _under_arguments(values, arguments), describe_checkpoint(reader, kind)
    )


def _under_arguments(values: dict[str, Any], arguments: argparse.Namespace) -> Config:
    """The configuration of `values` under what the command line says about sampling."""
    given = given_settings(arguments)
    if arguments.method not in (None, "self"):
        # What the run had set for its own method would be refused beside another one.
        values = merge(values, {"sampling": Sampling().model_dump(mode="json", include=set(SELF_ONLY))})
    if arguments.mean_target is not None:
        words = f"--mean-target {arguments.mean_target}"
        now = merge(values, nested(given))
        weight = now["sampling"]["contrastive"] or now["objective"]["contrastive_weight"]
        if not weight:
            raise UserError(
                "--mean-target takes back what objective.contrastive_weight does, which is 0 for this model; "
                "leave it out, or --set sampling.contrastive"
            )
        given.append(Given(words, "sampling.mean_target", str(arguments.mean_target)))
        given.append(Given(words, "sampling.contrastive", weight))
    return parse_config(values, arguments.config or str(arguments.checkpoint), given)


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
    autoencoder = open_trained_autoencoder(config, checkpoint, device)
    edge = config.model.patch_size * autoencoder.factor
    return Sampler(
        filled_denoiser(config, weights.items(), device),
        FlowMatching(config.objective, config.run.seed, edge),
        autoencoder,
        open_text_encoder(config.conditioning.text, config.model.context_dim, device, compute),
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


def training_mean_target(config: Config, checkpoint: Path, device: torch.device) -> MeanTarget:
    """Mean velocity target of the training pictures, in evaluation's crops; per channel if sizes differ."""
    source = open_source(config.data)
    autoencoder = open_trained_autoencoder(config, checkpoint, device)
    edge = autoencoder.factor * config.model.patch_size

    def latents() -> Iterator[Tensor]:
        for i in range(len(source)):
            view = evaluation_view(source.image(i), config.data, edge, source.key(i))
            yield autoencoder.encode(view[None].to(device))

    per = "position" if config.data.aspect == "square" else "channel"
    return mean_target(latents(), per, autoencoder.identity)


def describe_cost(sampler: Sampler, config: Config, pictures: Tensor) -> str:
    """One line for people: the guidance, and the FLOPs of a picture by the shapes of the model."""
    edge = sampler.autoencoder.factor * config.model.patch_size
    image_tokens = (pictures.shape[2] // edge) * (pictures.shape[3] // edge)
    text_tokens = sampler.caption_tokens / len(pictures)
    empty_tokens = len(sampler.text_encoder.encode([""]).embeddings)
    flops = sampling_flops(config, image_tokens, text_tokens, empty_tokens)
    alone = config.sampling.model_copy(update={"method": "none", "strong_drop": 0.0})
    unguided = sampling_flops(
        config.model_copy(update={"sampling": alone}), image_tokens, text_tokens, empty_tokens
    )
    return (
        f"sampling: {describe(config)}; {flops / 1e9:,.4f} GFLOP a picture, {flops / unguided:.3g} times "
        "those without guidance"
    )
