"""Feature networks of the metrics, each with the preprocessing that its metric is defined with.

    uint8 pictures (B, 3, h, w) ──resize, normalise──▶ network, FP32 ──▶ features (B, D)

| metric | network | pictures | features |
|---|---|---|---|
| fid | Inception-v3 of 2015-12-05 | 299 x 299, bilinear as TensorFlow 1, (x - 128) / 128 | pooled, 2048 |
| fid_prx | the same | their negatives, as PRX hands them over | the same |
| cmmd | CLIP ViT-L/14-336 | short edge 336, Pillow's bicubic, centre, CLIP's mean | image_embeds, length 1 |
| dino_mmd | DINOv2-L with registers | 518 x 518, bicubic, not antialiased | class token, length 1 |

These are the settings of Photoroom/PRX (`callbacks/feature_extractors.py`); 336 and 518 are the sizes that
the published weights were trained at, and a network of another size gets its own.
"""

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from millrace.engine.config.evaluation import FeaturePaths, MetricName
from millrace.engine.encoders.dino import IMAGENET_MEAN, IMAGENET_STD, load_dino
from millrace.engine.encoders.pretrained import import_class, load_network, weights_digest
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.evaluation.inception import (
    DIM,
    PUBLISHED,
    PUBLISHED_SHA256,
    load_inception,
    tiny_inception,
)
from millrace.engine.util.errors import UserError

CLIP = "openai/clip-vit-large-patch14-336"
CLIP_SIZE = 336
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_SIZE = 518
THREADS = 4
"""Of Pillow's resizing."""


class FeatureNetwork(ABC):
    """A frozen network and what it wants to see.

    Attributes:
        dim: features of a picture.
        identity: what its features depend on: class and weights.
        preprocessing: how pictures get to its size.
        source: where the weights came from, for people.
        published: whether they are those that the metric is named after, as far as can be told.
    """

    dim: int
    identity: str
    preprocessing: str
    source: str
    published: bool

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network, device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, dim) FP32 on the network's device of uint8 pictures (B, 3, h, w)."""
        with torch.autocast(self.device.type, enabled=False):
            return self._features(pictures).float()

    @abstractmethod
    def _features(self, pictures: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.network.to(device)
        self.device = device

    @staticmethod
    @abstractmethod
    def tiny(folder: Path) -> Path:
        """Save a small network of the same class with random weights, for `--smoke` and tests; returns
        `folder`. Its distances mean nothing."""


class InceptionFeatures(FeatureNetwork):
    """Features of FID."""

    def __init__(self, path: str | None, key: str, device: torch.device) -> None:
        if path is None:
            raise UserError(
                f"FID needs the weights of its Inception: set {key} to {PUBLISHED[0]} of torch-fidelity's "
                f"release v0.2.0 (sha256 {PUBLISHED_SHA256[:16]}...), or leave fid out of the metrics"
            )
        network, digest = load_inception(path, key, device)
        super().__init__(network, device)
        self.dim, self.source = network.dim, path
        self.identity = f"Inception-{network.dim}, file sha256 {digest[:16]}"
        self.published = digest == PUBLISHED_SHA256 and network.dim == DIM
        self.preprocessing = f"{network.size} x {network.size}, bilinear as TensorFlow 1"

    def _features(self, pictures: Tensor) -> Tensor:
        return self.network(pictures.to(self.device))

    @staticmethod
    def tiny(folder: Path) -> Path:
        return tiny_inception(folder)


class ClipFeatures(FeatureNetwork):
    """Image embeddings of CLIP."""

    def __init__(self, path: str | None, key: str, device: torch.device) -> None:
        loader = import_class("transformers", "CLIPVisionModelWithProjection", key).from_pretrained
        self.source = path or CLIP
        network = load_network(loader, self.source, key, device, dtype=torch.float32)
        super().__init__(network, device)
        self.size, self.dim = network.config.image_size, network.config.projection_dim
        self.identity = f"CLIP-{self.dim}, weights {weights_digest(network)}"
        self.published = self.size == CLIP_SIZE and self.dim == 768
        self.preprocessing = f"short edge {self.size}, Pillow's bicubic, centre crop"
        self._threads = ThreadPoolExecutor(THREADS, "clip")

    def _features(self, pictures: Tensor) -> Tensor:
        views = self._threads.map(self._view, pictures.permute(0, 2, 3, 1).cpu().numpy())
        x = torch.from_numpy(np.stack(list(views))).to(self.device).permute(0, 3, 1, 2).float() / 255
        return _unit(self.network(pixel_values=_standard(x, CLIP_MEAN, CLIP_STD)).image_embeds)

    def _view(self, picture: np.ndarray) -> np.ndarray:
        """(size, size, 3) uint8 of a picture (h, w, 3) uint8, as CLIP's own preprocessing."""
        image, size = Image.fromarray(picture), self.size
        short, long = sorted(image.size)
        other = int(size * long / short)
        width, height = (size, other) if image.width <= image.height else (other, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))

    @staticmethod
    def tiny(folder: Path) -> Path:
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


class DinoFeatures(FeatureNetwork):
    """Class tokens of DINOv2."""

    def __init__(self, path: str | None, key: str, device: torch.device) -> None:
        published = vision_entry("dinov2").large.source
        dino = load_dino("dinov2", path, key, device, torch.float32, published)
        super().__init__(dino.network, device)
        config: Any = dino.network.config
        self.size, self.dim, self.source = config.image_size, dino.dim, path or published
        self.identity = f"{config.model_type}-{self.dim}, weights {weights_digest(dino.network)}"
        self.published = (self.size, self.dim, config.model_type) == (518, 1024, "dinov2_with_registers")
        self.preprocessing = f"{self.size} x {self.size}, bicubic without antialiasing"

    def _features(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self.device).float() / 255
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", align_corners=False)
        tokens = self.network(_standard(x, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
        return _unit(tokens[:, 0])

    @staticmethod
    def tiny(folder: Path) -> Path:
        return vision_entry("dinov2").tiny(folder)


class NegatedInceptionFeatures(InceptionFeatures):
    """Features of PRX's FID: its callback hands bytes to a metric that takes them for shares of one and
    multiplies by 255, which in bytes is 256 - x (0 stays 0)."""

    def __init__(self, path: str | None, key: str, device: torch.device) -> None:
        super().__init__(path, key, device)
        self.preprocessing = f"bytes times 255 modulo 256, as PRX; {self.preprocessing}"

    def _features(self, pictures: Tensor) -> Tensor:
        return super()._features(pictures * 255)


NETWORKS: dict[str, type[InceptionFeatures] | type[ClipFeatures] | type[DinoFeatures]] = {
    "fid": InceptionFeatures,
    "fid_prx": NegatedInceptionFeatures,
    "cmmd": ClipFeatures,
    "dino_mmd": DinoFeatures,
}


def open_network(metric: MetricName, path: str | None, key: str, device: torch.device) -> FeatureNetwork:
    """The network of a metric.

    Args:
        path: file, folder or hub id; None for the published one, which only CLIP and DINOv2 have on the hub.
        key: the setting to name in errors.
        device: of the weights.

    Raises UserError if the weights cannot be had or are another network's.
    """
    return NETWORKS[metric](path, key, device)


def tiny_networks(folder: Path) -> Path:
    """Save small networks of all metrics in `folder`, where `tiny_features` finds them; returns it."""
    for metric, path in tiny_features(folder).items():
        NETWORKS[metric].tiny(Path(path))
    return folder


def tiny_features(folder: Path | str) -> dict[str, str]:
    """Paths, by their key in `evaluation.features`, of the networks in `folder`."""
    return {name: str(Path(folder) / name) for name in FeaturePaths.model_fields}


def _standard(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return (x - shift) / scale


def _unit(features: Tensor) -> Tensor:
    return features / (features.norm(dim=-1, keepdim=True) + 1e-12)
