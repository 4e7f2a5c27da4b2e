"""Resolution as two more text tokens, the "token" form of Photoroom/PRX's resolution-aware conditioning."""

import torch
from torch import Tensor, nn

from millrace.engine.model.blocks import TIME_FEATURES, VectorEmbedder, sinusoid
from millrace.engine.model.layout import Layout
from millrace.kernels.support.packed import sample_of_row

COUNT = 2
"""Tokens that a sample gets: one of its height, one of its width."""
FEATURES = TIME_FEATURES // 2
"""Sinusoidal features of an edge."""


class ResolutionTokens(nn.Module):
    """Embeds height and width in latent positions, each by a network of its own, beside the embedded text.

    PRX puts the tokens in front. Text keys carry no position, so where they stand makes no difference; here
    they follow the sample's text.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.height = VectorEmbedder(width, FEATURES)
        self.width = VectorEmbedder(width, FEATURES)

    def forward(self, text: Tensor, layout: Layout, patch: int) -> tuple[Tensor, Tensor, int]:
        """Text (S, C) -> text (S + 2B, C), its offsets (B+1,) int32, and most rows of a sample."""
        samples, device = len(layout.sizes), text.device
        edges = sinusoid((layout.sizes * patch).flatten(), FEATURES).to(text.dtype).unflatten(0, (samples, 2))
        tokens = torch.stack((self.height(edges[:, 0]), self.width(edges[:, 1])), dim=1)
        offsets = layout.cu_seqlens_text
        longer = offsets + COUNT * torch.arange(samples + 1, dtype=offsets.dtype, device=device)
        rows = len(text) + COUNT * samples
        own = sample_of_row(longer, rows)
        place = torch.arange(rows, device=device) - longer[own]
        beyond = place - offsets.diff()[own]
        source = torch.where(beyond < 0, offsets[own] + place, len(text) + COUNT * own + beyond)
        joined = torch.cat((text, tokens.flatten(0, 1).to(text.dtype))).index_select(0, source)
        return joined, longer, layout.max_seqlen_text + COUNT
