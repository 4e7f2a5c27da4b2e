"""A folder of pictures and captions to time `live` inputs with: what decoding and encoding cost, no content.

The built-in pictures, enlarged to JPEG files of EDGE pixels, each several times with another crop. The words
of their captions fill between a quarter and three quarters of the longest caption allowed, as in
`traffic.py`.
"""

from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from millrace.benchmarks.step import frozen_networks
from millrace.engine.data.sources.builtin import BuiltinSource

EDGE = 1024
"""Of a file; that of the pictures in the post's data set."""
QUALITY = 92
COUNT = 64


def write(folder: Path, max_tokens: int, count: int = COUNT, edge: int = EDGE) -> Path:
    """Fill `folder` with `count` pictures of `edge` x `edge` pixels and a caption each; returns it."""
    folder.mkdir(parents=True)
    source = BuiltinSource()
    words = " ".join(source.captions(i).long for i in range(len(source))).split()
    lengths = np.linspace(max_tokens / 4, 3 * max_tokens / 4, count).round().astype(int).tolist()
    for i, length in enumerate(lengths):
        picture = source.image(i % len(source)).convert("RGB")
        margin = 2 * (i // len(source))  # the same picture again is cropped a little closer
        box = (margin, margin, picture.width - margin, picture.height - margin)
        large = picture.resize((edge, edge), Image.Resampling.BICUBIC, box=box)
        large.save(folder / f"{i:04}.jpg", quality=QUALITY)
        (folder / f"{i:04}.txt").write_text(caption(words, i, length))
    return folder


def caption(words: list[str], first: int, tokens: int) -> str:
    """Words from number `first` on, as many as make `tokens` pieces of the stand-in tokenizer."""
    tokenizer = frozen_networks.PieceTokenizer(100)
    chosen: list[str] = []
    used = 1
    for word in islice(cycle(words), first, None):
        used += len(tokenizer([word])["input_ids"][0]) - 1
        if used > tokens and chosen:
            return " ".join(chosen)
        chosen.append(word)
    raise AssertionError("unreachable: the words go round")
