"""GELU_tanh(gate) * up, the GeGLU activation (Shazeer, arXiv 2002.05202) on one fused projection.

GELU is the tanh approximation 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).
"""

import torch.nn.functional as F
from torch import Tensor


def geglu(gate_up: Tensor) -> Tensor:
    """(T, 2F), gate in the first half of the columns and up in the second, to (T, F) of the same dtype."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected (T, 2F)")
    gate, up = gate_up.chunk(2, dim=1)
    return F.gelu(gate, approximate="tanh") * up
