"""Classifier accuracy and diversity of sampled digits: a judge of small labelled pictures.

The judge is a `SmallClassifier` trained on the training pictures, in seconds on one core. Where another one
is the teacher of an alignment, that one must not judge: train the two from different seeds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.engine.encoders.small_classifier import SmallClassifier
from millrace.engine.evaluation.frechet import frechet_distance, moments
from millrace.engine.util.errors import UserError

CHUNK = 256
"""Pictures judged at once."""


class Quality(NamedTuple):
    """How generated pictures do before a judge."""

    accuracy: float
    """Share of pictures that the judge reads as their caption's class."""
    frechet: float
    """Frechet distance of the judge's embeddings to those of real pictures, lower is better."""


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    seed: int,
    width: int = 16,
    steps: int = 300,
    batch: int = 64,
    lr: float = 5e-3,
    shift: int = 2,
) -> SmallClassifier:
    """Train a classifier of images (N, 3, h, w) in [-1, 1] with labels (N,) int64; frozen, in eval mode.

    AdamW with a cosine schedule; every batch is moved by up to `shift` pixels either way, so that the place
    of a stroke says nothing. Same arguments, same weights; the caller's random state is left as it was.
    """
    _require_pairs(images, labels)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = SmallClassifier(classes, width).to(images.device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            chosen = torch.randint(len(images), (batch,)).to(images.device)
            down, right = torch.randint(-shift, shift + 1, (2,)).tolist()
            pictures = images[chosen].roll((down, right), (2, 3))
            loss = F.cross_entropy(classifier(pictures), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 3, h, w) whose largest logit is that of their label (N,)."""
    _require_pairs(images, labels)
    read = torch.cat([classifier(part).argmax(1) for part in images.split(CHUNK)])
    return (read == labels).double().mean().item()


@torch.no_grad()
def embeddings(classifier: SmallClassifier, images: Tensor) -> Tensor:
    """(N, dim) of images (N, 3, h, w)."""
    return torch.cat([classifier.embedding(part) for part in images.split(CHUNK)])


def quality(classifier: SmallClassifier, generated: Tensor, labels: Tensor, real: Tensor) -> Quality:
    """Judge generated pictures (N, 3, h, w), of captions with labels (N,), beside real ones (M, 3, h, w).

    All are in [-1, 1]; what a model puts outside is clipped, as in a file. Raises UserError for pictures that
    are not finite.
    """
    generated = generated.clamp(-1, 1)
    distance = frechet_distance(
        moments(embeddings(classifier, generated)), moments(embeddings(classifier, real))
    )
    return Quality(accuracy(classifier, generated, labels), distance)


def _require_pairs(images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{len(images)} pictures with {len(labels)} labels; give each picture one")
