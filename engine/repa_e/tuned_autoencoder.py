"""Tuned autoencoder outside training: out of a run's checkpoint, and as a folder of diffusers."""

import shutil
from pathlib import Path

import torch
from torch import nn

from millrace.engine.checkpoint.model_weights import checkpoint_folder
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.train_state import TUNED_AUTOENCODER, holds_autoencoder
from millrace.engine.config import Config
from millrace.engine.encoders.autoencoder import Autoencoder, open_autoencoder
from millrace.engine.encoders.latent_statistics import save_statistics
from millrace.engine.util.errors import UserError

STATISTICS = f"{TUNED_AUTOENCODER}latents/"
_WEIGHTS = f"{TUNED_AUTOENCODER}autoencoder/master/"


def open_trained(config: Config, checkpoint: str | Path | None, device: torch.device) -> Autoencoder:
    """The autoencoder that a model was trained with: that of a run (its newest checkpoint) or checkpoint, or
    where there are only weights (None) the configuration's. Raises UserError if it cannot be had."""
    section = config.conditioning.autoencoder
    if checkpoint is None and section.tuning.enabled:
        raise UserError(
            "these weights come without the autoencoder that was tuned with them; write it with "
            "millrace export --autoencoder FOLDER, set conditioning.autoencoder.path to that folder and "
            "tuning.enabled to false"
        )
    autoencoder = open_autoencoder(section, device)
    if checkpoint is not None:
        restore(autoencoder, config, CheckpointReader(checkpoint_folder(checkpoint)))
    return autoencoder


def restore(latents: Autoencoder, config: Config, reader: CheckpointReader) -> None:
    """Give an autoencoder opened by `config` the weights and statistics of the checkpoint, in
    `conditioning.autoencoder.dtype`; nothing where the run did not tune it.

    Raises UserError if they are another autoencoder's.
    """
    if not holds_autoencoder(reader):
        return
    weights = {n.removeprefix(_WEIGHTS): reader.tensor(n) for n in reader.names() if n.startswith(_WEIGHTS)}
    network, section = getattr(latents, "network", nn.Module()), config.conditioning.autoencoder
    wanted = {name: parameter.shape for name, parameter in network.named_parameters()}
    if wanted != {name: weight.shape for name, weight in weights.items()}:
        raise UserError(
            f"{reader.folder}: the tuned autoencoder there is not {latents.identity}; set "
            "conditioning.autoencoder to that of the run"
        )
    network.load_state_dict(weights, strict=False)  # a network's buffers are not trained
    network.to(getattr(torch, section.dtype))
    device = next(network.parameters()).device
    mean, variance = (reader.tensor(f"{STATISTICS}{name}").to(device) for name in ("mean", "variance"))
    latents.scale = (variance + section.tuning.norm_eps).rsqrt()[:, None, None]
    latents.shift = mean[:, None, None]
    latents.identity += f", tuned until step {reader.step}"


def save_autoencoder(checkpoint: str | Path, config: Config, folder: Path) -> str:
    """Write the tuned autoencoder of a run or checkpoint as a folder of diffusers, in FP32, with the
    statistics of its latents beside it, which `open_autoencoder` reads; returns its identity.

    Raises UserError if the run did not tune it, or the folder cannot be written.
    """
    if not holds_autoencoder(CheckpointReader(checkpoint_folder(checkpoint))):
        raise UserError(
            f"{checkpoint} did not tune its autoencoder (conditioning.autoencoder.tuning off); use the one "
            "that it was trained with as it is"
        )
    latents = open_trained(_exact(config), checkpoint, torch.device("cpu"))
    network = latents.network
    if "latents_mean" in network.config:
        # Where diffusers has a place for statistics of channels; its scaling_factor stays as it was.
        mean, std = latents.shift.flatten().tolist(), (1 / latents.scale).flatten().tolist()
        network.register_to_config(latents_mean=mean, latents_std=std)
    try:
        network.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):  # which their library lets only the owner read
            shutil.copymode(folder / "config.json", path)
        save_statistics(folder, latents.scale, latents.shift)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    return latents.identity


def _exact(config: Config) -> Config:
    """The configuration with the autoencoder in FP32."""
    section = config.conditioning.autoencoder.model_copy(update={"dtype": "float32"})
    conditioning = config.conditioning.model_copy(update={"autoencoder": section})
    return config.model_copy(update={"conditioning": conditioning})
