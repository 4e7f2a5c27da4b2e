"""The frozen networks of the published runs at their real size, with random weights made on the device.

What a network costs depends on its shape and not on what it has learnt, so nothing is downloaded. Shapes are
those in the engine's registries. A `path` in the configuration has precedence: the network in that folder is
opened as in training.
"""

import re
import zlib

import torch

from millrace.engine import config as settings
from millrace.engine.config import Alignment, TextTower
from millrace.engine.encoders import autoencoder as autoencoders
from millrace.engine.encoders import teacher as teachers
from millrace.engine.encoders import text_encoder as texts

CHARACTERS = 4
"""Of a token, about what a large English vocabulary has on average."""


class PieceTokenizer:
    """Stands in for a tokenizer: pieces of at most CHARACTERS letters of a word, an end token after them."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(
        self, captions: list[str], truncation: bool = False, max_length: int = 0
    ) -> dict[str, list[list[int]]]:
        """Token ids of each caption, at most `max_length` with `truncation`; the end token stays."""
        ids = []
        for caption in captions:
            pieces = re.findall(rf"\w{{1,{CHARACTERS}}}|[^\w\s]", caption)
            kept = pieces[: max_length - 1] if truncation else pieces
            ids.append([zlib.crc32(piece.encode()) % (self.vocabulary - 2) + 2 for piece in kept] + [1])
        return {"input_ids": ids}


def open_autoencoder(config: settings.Autoencoder, device: torch.device) -> autoencoders.Autoencoder:
    """As `engine.encoders.autoencoder.open_autoencoder`, without weights where there is no path."""
    known = autoencoders.autoencoder_entry(config.kind).network is not None
    if not known or config.path or config.form != "raw" or config.tuning.enabled:
        return autoencoders.open_autoencoder(config, device)
    return autoencoders.open_random(config, device)


def open_text_encoder(
    config: TextTower, dim: int, device: torch.device, dtype: torch.dtype
) -> texts.TextEncoder:
    """As `engine.encoders.text_encoder.open_text_encoder`, without weights where there is no path."""
    entry = texts.text_encoder_entry(config.kind)
    if entry.random is None or config.path:
        return texts.open_text_encoder(config, dim, device, dtype)
    return entry.random(config, PieceTokenizer, device, dtype)


def open_teacher(config: Alignment, device: torch.device, data: str) -> teachers.Teacher | None:
    """As `engine.encoders.teacher.teacher_of`, without weights where there is no path."""
    entry = teachers.vision_entry(config.teacher.kind)
    if not config.active or entry.large is None or config.teacher.path:
        return teachers.teacher_of(config, device, data)
    opened = entry.random_teacher(config.teacher, device, config.attention)
    opened.keep_features(data)
    return opened
