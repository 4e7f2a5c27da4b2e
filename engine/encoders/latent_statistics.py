"""Latent statistics of a tuned autoencoder, beside its weights: how its denoiser normalises latents."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from millrace.engine.encoders.pretrained import load
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

STATISTICS_FILE = "latent_statistics.safetensors"
"""Beside the weights of a tuned autoencoder: `scale` and `shift` (C,) FP32."""


def save_statistics(folder: Path, scale: Tensor, shift: Tensor) -> None:
    """Write how the denoiser of an autoencoder normalises its latents, scale * (z - shift), each (C, 1,
    1)."""
    tensors = {"scale": scale, "shift": shift}
    content = save({name: x.flatten().cpu().contiguous() for name, x in tensors.items()})
    write_atomically(folder / STATISTICS_FILE, content)


def load_statistics(
    folder: Path, channels: int, device: torch.device, key: str
) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), each (C, 1, 1) FP32, that `save_statistics` wrote in a folder; None if it has none.

    Raises UserError, naming setting `key`, if they cannot be read or are not of `channels` channels.
    """
    path = folder / STATISTICS_FILE
    if not path.is_file():
        return None
    found = load(load_file, str(path), key)
    if {name: tuple(x.shape) for name, x in found.items()} != dict.fromkeys(("scale", "shift"), (channels,)):
        raise UserError(
            f"{path}: not the statistics of {channels} channels; export the autoencoder again, see {key}"
        )
    scale, shift = (found[name].float().to(device)[:, None, None] for name in ("scale", "shift"))
    return scale, shift
