"""Meaning of weights: what they predict, on which latents, for which text. Kept with exported files, compared
where a run starts from weights: shapes alone do not tell a velocity from a picture, or one autoencoder of 16
channels from another."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from millrace.engine.checkpoint.model_weights import checkpoint_config, checkpoint_folder
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.weight_formats import PRX_FILE, is_diffusers
from millrace.engine.config import Config
from millrace.engine.util.errors import UserError

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


def as_metadata(config: Config) -> dict[str, str]:
    """For the header of a safetensors file."""
    return {_KEY: json.dumps(meaning_of(config))}


def stored_meaning(path: Path) -> dict[str, str]:
    """What is known of the weights at `path`, of any kind that `load_weights` reads; empty if nothing is."""
    for folder in (path, path / "transformer"):
        if is_diffusers(folder):
            return _of_files(sorted(folder.glob("*.safetensors")))
    for file in (path, path / PRX_FILE):
        if file.is_file():
            return _of_files([file])
    return meaning_of(checkpoint_config(CheckpointReader(checkpoint_folder(path), verify=False)))


def differing_meaning(path: str | Path, config: Config) -> list[str]:
    """A warning where the weights at `path` mean something else than those of a run of `config`."""
    found, wanted = stored_meaning(Path(path)), meaning_of(config)
    differing = [
        f"{name} {found[name]}, here {wanted[name]} ({_SETTINGS[name]})"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if not differing:
        return []
    return [f"warning: {path} means something else: {'; '.join(differing)}; training has to undo that"]


def _of_files(files: list[Path]) -> dict[str, str]:
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    text = (opened.metadata() or {}).get(_KEY, "{}")
                return dict(json.loads(text))
            except (OSError, SafetensorError, ValueError) as error:
                raise UserError(f"{file}: cannot be read: {error}") from None
    return {}
