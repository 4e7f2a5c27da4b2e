"""Small networks of the classes that metrics use, with random weights, saved as the published ones are.

They let all the code around a metric run on a CPU (`--smoke`, tests). Their distances mean nothing.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from millrace.engine.encoders.pretrained import import_class
from millrace.engine.encoders.tiny_networks import tiny_dino
from millrace.engine.evaluation.inception import (
    PUBLISHED,
    SMALLEST,
    Inception,
)

_FOLDERS = {"fid": "inception", "cmmd": "clip", "dino_mmd": "dinov2"}


def tiny_inception(folder: Path) -> Path:
    """Save an Inception of an eighth of the channels, for pictures of 75 pixels, in `folder`; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Inception(1 / 8, SMALLEST)
        for name, parameter in network.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict() | {"size": torch.tensor(SMALLEST)}
    save_file(state, folder / f"{Path(PUBLISHED[0]).stem}.safetensors")
    return folder


def tiny_clip(folder: Path) -> Path:
    """Save a small vision tower of CLIP with its projection in `folder`; returns it."""
    config = import_class("transformers", "CLIPVisionConfig", "a tiny CLIP")(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = import_class("transformers", "CLIPVisionModelWithProjection", "a tiny CLIP")(config)
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                # Wider than the usual 0.02, so that features of different pictures differ.
                parameter.data.normal_(std=0.2)
    network.save_pretrained(folder)
    return folder


def tiny_networks(folder: Path) -> Path:
    """Save all three in `folder`, where `tiny_features` finds them; returns it."""
    paths = tiny_features(folder)
    tiny_inception(Path(paths["fid"]))
    tiny_clip(Path(paths["cmmd"]))
    tiny_dino("dinov2", Path(paths["dino_mmd"]))
    return folder


def tiny_features(folder: Path | str) -> dict[str, str]:
    """Paths by metric of the networks in `folder`."""
    return {name: str(Path(folder) / kind) for name, kind in _FOLDERS.items()}
