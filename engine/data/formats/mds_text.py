"""Text latents in MDS shards: rows of the text encoder that PRX stores beside the captions they are of.

    caption                                            the caption, in a column of any name
    latent_caption_t5gemma2b-256-bf16           (n, E) its rows
    attention_mask_caption_t5gemma2b-256-bf16   (L,) or (1, L): which of the tower's L positions hold text

The end of the name is the tower: network, L = max_tokens, arithmetic. n is L, or the number of positions that
hold text. Source: Photoroom/PRX, prx/dataset/dataset.py and prx/dataset/mds_patches/encoding_patch.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.engine.data.formats.mds_shards import DamagedSample, Library, Shard
from millrace.engine.util.errors import UserError

NETWORKS = {"t5gemma": "t5gemma2b", "qwen3vl": "qwen3vl-2b"}
"""PRX's names of the text encoders, by `conditioning.text.kind`."""
_ARITHMETIC = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_BF16 = "bf16"
"""PRX's own encoding: uint32 number of dimensions, int32 shape, the numbers."""


class Tower(NamedTuple):
    """The text encoder whose rows are wanted."""

    kind: str
    """As `conditioning.text.kind`."""
    max_tokens: int
    dim: int
    """E, features of a row."""
    dtype: torch.dtype
    """Of its arithmetic."""

    @property
    def name(self) -> str:
        """As PRX names it: `t5gemma2b-256-bf16`."""
        network = NETWORKS.get(self.kind, self.kind)
        return f"{network}-{self.max_tokens}-{_ARITHMETIC.get(self.dtype, str(self.dtype))}"


class LatentColumns(NamedTuple):
    """Places of the columns of one caption's rows."""

    latent: int
    mask: int


def has_latents(shard: Shard) -> bool:
    """Whether a shard has rows of any tower of one of its captions."""
    return any(_towers(shard, caption) for caption in (shard.long, shard.short))


def latent_columns(shard: Shard, caption: int, tower: Tower) -> LatentColumns:
    """Where the rows of the caption in column `caption` are. Raises UserError without rows of this tower."""
    names, column = shard.reader.column_names, shard.reader.column_names[caption]
    found = []
    for role in ("latent", "attention_mask"):
        name = f"{role}_{column}_{tower.name}"
        if name not in names:
            there = ", ".join(_towers(shard, caption)) or "none"
            raise UserError(
                f"{shard.path}: has no column {name}, which data.cached text needs (it has latents of "
                f"{column} by: {there}); set conditioning.text to such a tower, data.columns to a caption "
                "that has latents, or take text out of data.cached"
            )
        place = names.index(name)
        encoding = shard.reader.column_encodings[place]
        if encoding != _BF16 and not encoding.startswith("ndarray"):
            raise UserError(
                f"{shard.path}: column {name} is stored as {encoding!r}, not as bf16 or ndarray; take text "
                "out of data.cached"
            )
        found.append(place)
    return LatentColumns(*found)


def text_rows(
    library: Library, shard: Shard, stored: list[bytes], columns: LatentColumns, tower: Tower
) -> Tensor:
    """(n, E) rows of the positions that hold text, in the dtype that is stored. Raises DamagedSample."""
    name = shard.reader.column_names[columns.latent]
    rows, mask = (_array(library, shard, stored, place) for place in columns)
    valid = mask.flatten().bool()
    if len(valid) != tower.max_tokens:
        raise DamagedSample(f"its {name} is of {len(valid)} positions, not {tower.max_tokens}")
    if rows.ndim != 2 or rows.shape[1] != tower.dim:
        raise DamagedSample(f"its {name} has the shape {tuple(rows.shape)}, not (n, {tower.dim})")
    count = int(valid.sum())
    if len(rows) == len(valid):
        rows = rows[valid]
    elif len(rows) != count:
        raise DamagedSample(f"its {name} has {len(rows)} rows for {count} positions that hold text")
    if not count:
        raise DamagedSample(f"its {name} is empty")
    if not bool(rows.isfinite().all()):
        raise DamagedSample(f"its {name} has numbers that are not finite")
    return rows


def _towers(shard: Shard, caption: int) -> list[str]:
    """Towers whose rows of a caption are stored."""
    prefix = f"latent_{shard.reader.column_names[caption]}_"
    return [name.removeprefix(prefix) for name in shard.reader.column_names if name.startswith(prefix)]


def _array(library: Library, shard: Shard, stored: list[bytes], place: int) -> Tensor:
    data, encoding = stored[place], shard.reader.column_encodings[place]
    try:
        if encoding != _BF16:
            return torch.from_numpy(np.array(library.decode(encoding, data)))
        dimensions = int(np.frombuffer(data, np.uint32, 1)[0])
        shape = np.frombuffer(data, np.int32, dimensions, 4).tolist()
        numbers = np.frombuffer(data, np.int16, offset=4 + 4 * dimensions).copy()
        return torch.from_numpy(numbers).view(torch.bfloat16).reshape(shape)
    except Exception as error:  # what is stored is another's, and numpy raises much
        name = shard.reader.column_names[place]
        raise DamagedSample(f"its {name} is damaged: {' '.join(str(error).split())[:100]}") from error
