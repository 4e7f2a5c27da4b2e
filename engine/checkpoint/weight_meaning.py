"""Meaning of weights: what they predict, on which latents, for which text. Kept with exported files, compared
where a run starts from weights: shapes alone do not tell a velocity from a picture, or one autoencoder of 16
channels from another."""

import json
from collections.abc import Iterable
from pathlib import Path

from millrace.engine.checkpoint.model_weights import checkpoint_config, checkpoint_folder
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.weight_formats import ORIGIN, PRX_FILE, is_diffusers, stored_metadata
from millrace.engine.config import Config
from millrace.engine.util.errors import UserError
from millrace.engine.util.hub import local_weights

_KEY = "millrace"
"""Of the metadata in the header of an exported file."""
_SETTINGS = {
    "prediction": "objective.prediction",
    "autoencoder": "conditioning.autoencoder.kind",
    "text encoder": "conditioning.text.kind",
}


def meaning_of(config: Config) -> dict[str, str]:
    """By name."""
    return {
        "prediction": config.objective.prediction,
        "autoencoder": config.conditioning.autoencoder.kind,
        "text encoder": config.conditioning.text.kind,
    }


def as_metadata(config: Config, origin: str) -> dict[str, str]:
    """For the header of a safetensors file; `origin` as `describe_checkpoint` has it."""
    return {_KEY: json.dumps(meaning_of(config)), ORIGIN: origin}


def stored_meaning(path: Path) -> dict[str, str]:
    """What is known of the weights at `path`, of any kind that `load_weights` reads; empty if nothing is."""
    for folder in (path, path / "transformer"):
        if is_diffusers(folder):
            return _of_files(folder.glob("*.safetensors"))
    for file in (path, path / PRX_FILE):
        if file.is_file():
            return _of_files([file])
    return meaning_of(checkpoint_config(CheckpointReader(checkpoint_folder(path), verify=False)))


def differing_meaning(path: str | Path, config: Config) -> list[str]:
    """A warning where the weights at `path` mean something else than those of a run of `config`."""
    found, wanted = stored_meaning(local_weights(path)), meaning_of(config)
    differing = [
        f"{name} {found[name]}, here {wanted[name]} ({_SETTINGS[name]})"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if not differing:
        return []
    return [f"warning: {path} means something else: {'; '.join(differing)}; training has to undo that"]


def _of_files(files: Iterable[Path]) -> dict[str, str]:
    files = list(files)
    try:
        return dict(json.loads(stored_metadata(files).get(_KEY, "{}")))
    except ValueError as error:
        raise UserError(f"{files[0]}: cannot be read: {error}") from None
