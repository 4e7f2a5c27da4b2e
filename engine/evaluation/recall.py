"""Recall: the nearest training picture of a generated one; does a caption bring back its own picture?"""

from typing import NamedTuple

import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.sampling.sampler import Sampler


def nearest_picture(generated: Tensor, references: Tensor) -> Tensor:
    """Index (M,) of the reference (N, 3, h, w) with the least mean squared difference of pixels to each
    generated picture (M, 3, h, w)."""
    return torch.cdist(generated.flatten(1).double(), references.flatten(1).double()).argmin(1)


def recall(generated: Tensor, references: Tensor, own: Tensor) -> float:
    """Share of generated pictures whose nearest reference is `own` (M,), the one their caption describes."""
    return (nearest_picture(generated, references) == own.to(generated.device)).double().mean().item()


class TrainingRecall(NamedTuple):
    """Samples of every training caption."""

    pictures: Tensor
    """(M, 3, h, w) in [-1, 1]."""
    own: Tensor
    """(M, 3, h, w), the training picture that each caption describes."""
    prompts: list[str]
    line: str
    """For people: the share that is nearest to its own training picture."""


def training_recall(sampler: Sampler, config: Config, seed: int) -> TrainingRecall:
    """Sample every long and short training caption, and look for the nearest training picture of each."""
    source = open_source(config.data)
    square = config.data.model_copy(update={"aspect": "square"})
    edge = sampler.autoencoder.factor * config.model.patch_size
    views = torch.stack(
        [evaluation_view(source.image(i), square, edge, source.key(i)) for i in range(len(source))]
    )
    prompts, own = [], []
    for i in range(len(source)):
        for caption in dict.fromkeys(source.captions(i)):
            prompts.append(caption)
            own.append(i)
    size = (config.data.resolution, config.data.resolution)
    pictures = sampler(prompts, size, config.sampling, seed)
    share = recall(pictures, views, torch.tensor(own))
    line = (
        f"recall: {share:.1%} of {len(prompts)} training captions gave a picture whose nearest training "
        f"picture (of {len(source)}) is their own"
    )
    return TrainingRecall(pictures, views[own], prompts, line)
