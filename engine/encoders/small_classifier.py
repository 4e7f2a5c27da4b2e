"""A convolutional classifier of small pictures that trains in seconds on one core.

It stands in for the large vision networks where none can be had: a teacher of the alignment, and the judge
of ablations on small data sets. Saved as a folder of `config.json` and `model.safetensors`.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

KIND = "classifier"
PATCH = 4
"""Edge in pixels of what one place of the feature map is about."""
_FORMAT = 1


class SmallClassifier(nn.Module):
    """Five 3x3 convolutions with group norm, two of which halve the picture, then a mean and a linear layer.

    Args:
        classes: number of logits.
        width: channels of the first stage; `dim`, of the features and of the embedding, is four times it.
    """

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.classes, self.width, self.dim = classes, width, 4 * width
        self.stages = nn.Sequential(
            _stage(3, width),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 2 * width),
            _stage(2 * width, 4 * width, stride=2),
            _stage(4 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, classes)

    def features(self, images: Tensor) -> Tensor:
        """Map (B, dim, h/4, w/4) of images (B, 3, h, w) in [-1, 1]; sides are rounded up."""
        return self.stages(images)

    def embedding(self, images: Tensor) -> Tensor:
        """(B, dim): the mean of the features over the picture."""
        return self.features(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.embedding(images))


def _stage(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    # No batch norm: a frozen network must not depend on which pictures come together.
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1),
        nn.GroupNorm(1, channels_out),
        nn.SiLU(),
    )


def save_classifier(classifier: SmallClassifier, folder: Path | str) -> Path:
    """Write `config.json` and `model.safetensors` to `folder`, which is made; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "kind": KIND,
        "format": _FORMAT,
        "classes": classifier.classes,
        "width": classifier.width,
    }
    write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    state = {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()}
    write_atomically(folder / "model.safetensors", save(state))
    return folder


def load_classifier(
    folder: Path | str,
    key: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SmallClassifier:
    """The saved classifier, frozen, in eval mode; `key` is the setting that names `folder`.

    Raises UserError if the folder does not hold one.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
        if settings.get("kind") != KIND or settings.get("format") != _FORMAT:
            raise ValueError(f"config.json is not that of a {KIND} of format {_FORMAT}")
        classifier = SmallClassifier(settings["classes"], settings["width"])
        classifier.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error)).strip(" .:")
        raise UserError(
            f"cannot load the classifier {str(folder)!r}: {reason}; set {key} to a folder written by "
            "save_classifier"
        ) from None
    return classifier.requires_grad_(False).eval().to(device, dtype)
