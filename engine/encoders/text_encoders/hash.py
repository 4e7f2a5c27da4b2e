"""Hash text encoder, without weights: every word has a fixed random vector.

It knows no language. It is there so that everything runs anywhere, and it still tells captions apart: a
model can learn which words go with which pictures. Word order is invisible to it, as the denoiser's
text keys carry no position.
"""

import hashlib
import re
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from millrace.engine.config import TextTower
from millrace.engine.encoders.text_encoder import TextEncoder, TextEncoderEntry, clean_text
from millrace.kernels.support.packed import to_device

# Runs of letters, runs of digits, and every other visible character by itself.
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")

END_TOKEN = "</s>"
"""Last token of every caption, so that the empty one has a row; no caption yields it by itself."""

# Vectors kept on the host, 75 MB at 2304 features.
_CACHED_TOKENS = 8192


def tokenize(caption: str) -> list[str]:
    """Words, numbers and punctuation marks of a cleaned caption, and the end token."""
    return [*_TOKEN.findall(caption), END_TOKEN]


def token_vector(token: str, dim: int) -> np.ndarray:
    """(dim,) float32 ~ N(0, 1): NumPy's Philox stream whose 128-bit key is the BLAKE2b digest of the token's
    UTF-8 bytes, read little-endian. The same in every process and on every machine."""
    key = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(dim, dtype=np.float32)


class HashTextEncoder(TextEncoder):
    """One row a token, a function of the token alone. No weights, no knowledge of language."""

    clean = staticmethod(clean_text)

    def __init__(self, dim: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dim, f"hash (no weights), dim {dim}", device, dtype)
        self.max_tokens = max_tokens
        self._vector = lru_cache(_CACHED_TOKENS)(lambda token: token_vector(token, dim))

    def _rows(self, captions: list[str]) -> list[tuple[Tensor, bool]]:
        whole = [tokenize(caption) for caption in captions]
        kept = [
            [*tokens[: self.max_tokens - 1], END_TOKEN] if len(tokens) > self.max_tokens else tokens
            for tokens in whole
        ]
        # One copy of each distinct vector crosses to the device; the rows are gathered there.
        slot = {
            token: i for i, token in enumerate(dict.fromkeys(token for tokens in kept for token in tokens))
        }
        table = torch.from_numpy(np.stack([self._vector(token) for token in slot])).to(self.dtype)
        index = torch.tensor([slot[token] for tokens in kept for token in tokens])
        rows = to_device(table, self.device)[to_device(index, self.device)]
        split = rows.split([len(tokens) for tokens in kept])
        return [(part, len(tokens) > self.max_tokens) for part, tokens in zip(split, whole, strict=True)]


def _open(config: TextTower, dim: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    return HashTextEncoder(dim, config.max_tokens, device, dtype)


ENTRY = TextEncoderEntry(_open)
