"""Matrices inside the denoiser's fused weights, for an optimizer that works on whole matrices (Muon).

Photoroom/PRX gives Muon every 2-D weight inside its blocks. Ours are the same weights, some of them stored
together, row after row:

    weight, rows x columns                as PRX has them            chunked
    blocks.N.qkv         3C x C           (1, 3C, C)                 (3, C, C)     query, key, value
    blocks.N.attn_out    C x C            (1, C, C)                  (1, C, C)
    blocks.N.gate_up     2F x C           (2, F, C)                  (2, F, C)     gate, up
    blocks.N.down        C x F            (1, C, F)                  (1, C, F)
    text_kv              depth 2C x C     (depth, 2C, C)             (2 depth, C, C)
    modulation           depth 6C x C     (depth, 6C, C)             (6 depth, C, C)

Every part is a range of whole rows, so a stack (N, m, n) is a view of the weight.
"""

import re
from typing import NamedTuple

from millrace.engine.config import Model


class Stack(NamedTuple):
    """N matrices of m rows and n columns, one after another in a weight of N m rows."""

    count: int
    rows: int
    columns: int


_FUSED = {"text_kv.weight": 2, "modulation.weight": 6}
"""Weights of all blocks in one, and how many C x C parts a block has there."""
_IN_BLOCK = {"qkv.weight": (1, 3), "attn_out.weight": (1, 1), "gate_up.weight": (2, 2), "down.weight": (1, 1)}
"""Weights of a block, and how many matrices they are: as PRX has them, chunked."""
_BLOCK = re.compile(r"blocks\.\d+\.")


def block_matrices(name: str, shape: tuple[int, ...], config: Model, chunked: bool = False) -> Stack | None:
    """The matrices of a parameter of the Denoiser; None for one that is no matrix of a block.

    Args:
        name: of the parameter.
        shape: of the parameter.
        config: of the denoiser.
        chunked: split query, key, value and the six parts of the modulation from each other.
    """
    block = _BLOCK.match(name)
    if name in _FUSED:
        count = config.depth * (_FUSED[name] if chunked else 1)
    elif block and name[block.end() :] in _IN_BLOCK:
        count = _IN_BLOCK[name[block.end() :]][chunked]
    else:
        return None
    rows, columns = shape
    return Stack(count, rows // count, columns)
