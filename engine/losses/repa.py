"""REPA and iREPA: alignment of the denoiser's features with those of a frozen vision network.

    REPA    (arXiv 2410.06940)  -mean over tokens of cos(projector(h), z)
    iREPA   (arXiv 2512.10794)  the same, with a 3x3 convolution as projector, and z normalised over space

h (T, C) is a block's output for the noisy tokens, z (T, D) the teacher's features of the clean picture, token
for token. Where the block lies inside a routed span, h has the route's rows alone and z is gathered to them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.engine.config import Alignment, Model
from millrace.engine.model.attention_taps import rotate
from millrace.engine.model.layout import Grid, Layout, rope_table
from millrace.engine.model.routing import RoutedSpan
from millrace.kernels.support.packed import is_uniform, rows_from_samples, samples_from_rows, widen

HEADS = 4
"""Of the attention projector, as in Photoroom/PRX."""
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
COSINE_EPS = 1e-8


class BlockRows(NamedTuple):
    """Which of the packed tokens a block sees."""

    index: Tensor | None
    """(K,) int64, or None for all."""
    cu_seqlens: Tensor
    """(B+1,) int32, starts of the samples among them."""
    max_seqlen: int
    """Upper bound of the rows of a sample."""

    def take(self, values: Tensor) -> Tensor:
        """Rows (K, ...) of values (T, ...)."""
        return values if self.index is None else values.index_select(0, self.index)

    def mean(self, values: Tensor) -> Tensor:
        """Mean (B,) over each sample's rows of values (K,)."""
        total = samples_from_rows(values, self.cu_seqlens, self.max_seqlen)
        return total / self.cu_seqlens.diff()

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (K, ...) as (B, max_seqlen, ...), and which of those rows are a sample's own.

        That is (B, max_seqlen) bool, or None if all are. The others repeat some row.
        """
        samples = len(self.cu_seqlens) - 1
        if is_uniform(len(values), samples, self.max_seqlen):
            return values.unflatten(0, (samples, self.max_seqlen)), None
        place = torch.arange(self.max_seqlen, device=values.device)
        own = place < self.cu_seqlens.diff()[:, None]
        at = (self.cu_seqlens[:-1, None] + place).clamp_max(len(values) - 1)
        return values.index_select(0, at.flatten()).unflatten(0, at.shape), own

    def packed(self, padded: Tensor, total: int) -> Tensor:
        """The `total` rows (K, ...) of `padded` (B, max_seqlen, ...), the inverse of `padded`."""
        if is_uniform(total, len(padded), self.max_seqlen):
            return padded.flatten(0, 1)
        place = torch.arange(total, device=padded.device)
        # Where each row lies in the padded tensor: it is moved by the padding of the samples before its own.
        first = torch.arange(len(padded), device=padded.device) * self.max_seqlen - self.cu_seqlens[:-1]
        return padded.flatten(0, 1).index_select(0, place + rows_from_samples(first, self.cu_seqlens, total))


def rows_of_block(block: int, layout: Layout, span: RoutedSpan | None) -> BlockRows:
    """The rows that block `block` (0-based) computes."""
    if span is None or span.route is None or not span.start <= block <= span.end:
        return BlockRows(None, layout.cu_seqlens, layout.max_seqlen)
    return BlockRows(*span.route)


class AlignmentHead(nn.Module):
    """The trained projector from the denoiser's features to the teacher's, in FP32.

        mlp         Linear(C -> W), SiLU, Linear(W -> W), SiLU, Linear(W -> D)
        conv        3x3 convolution, padded by 1, on each picture's grid of tokens
        attention   4-head attention among the tokens there are, with 2D RoPE, then Linear(C -> D)

    Args:
        config: of the alignment; its `kind` must not be none.
        model: the denoiser.
        teacher_dim: D.
    """

    def __init__(self, config: Alignment, model: Model, teacher_dim: int) -> None:
        super().__init__()
        self.block, self.kind = config.block, config.projector_kind
        if self.kind == "mlp":
            hidden = config.projector_width or teacher_dim
            self.projector: nn.Module = nn.Sequential(
                nn.Linear(model.width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, teacher_dim),
            )
        elif self.kind == "conv":
            self.projector = nn.Conv2d(model.width, teacher_dim, 3, padding=1)
        else:
            self.projector = AttentionProjector(model.width, teacher_dim)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Fill all parameters from `generator` (CPU) as PyTorch does: uniform in +-1 / sqrt(fan-in)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                for parameter in module.parameters():
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)

    def forward(self, features: Tensor, layout: Layout, span: RoutedSpan | None) -> Tensor:
        """Features (K, C) of the rows that the block sees -> (K, D)."""
        rows = rows_of_block(self.block, layout, span)
        if self.kind == "mlp":
            return self.projector(features)
        if self.kind == "attention":
            return self.projector(features, layout, rows)
        if rows.index is not None:
            raise ValueError(f"a convolution needs all tokens, but block {self.block} is inside the route")
        return _on_grids(self.projector, features, layout.grids)


class AttentionProjector(nn.Module):
    """Photoroom/PRX's replacement of the convolution where tokens are missing; no norm, no residual."""

    def __init__(self, width: int, teacher_dim: int) -> None:
        super().__init__()
        self.axes = (width // HEADS // 2,) * 2
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.output = nn.Linear(width, teacher_dim)
        self._made: tuple[int, torch.device] | None = None

    def forward(self, features: Tensor, layout: Layout, rows: BlockRows) -> Tensor:
        """(K, C) -> (K, D); a token attends to the tokens of its sample among `rows`."""
        cos, sin = (table[rows.take(layout.positions)][:, None] for table in self._tables(layout))
        q, k, v = (part(features).unflatten(1, (HEADS, -1)) for part in (self.q, self.k, self.v))
        q, k = (rotate(x, cos, sin).to(v.dtype) for x in (q, k))
        (q, own), (k, _), (v, _) = (rows.padded(x) for x in (q, k, v))
        mask = None if own is None else own[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.output(self.out(rows.packed(attended, len(features))))

    def _tables(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Cosines and sines (positions, width / heads / 2) with the rows of the layout's own table."""
        side = round(len(layout.cos) ** 0.5)
        made = (side, layout.cos.device)
        if self._made != made:
            self._made, self._table = made, rope_table(side, self.axes, ROPE_THETA, layout.cos.device)
        return self._table


def _on_grids(convolution: nn.Module, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Apply a convolution to tokens (T, C) laid out on their grids; pictures of one grid go together."""
    members: dict[Grid, list[int]] = {}
    for sample, grid in enumerate(grids):
        members.setdefault(grid, []).append(sample)
    if len(members) == 1:
        return _on_grid(convolution, features.unflatten(0, (len(grids), -1)), grids[0]).flatten(0, 1)
    parts = list(features.split([rows * columns for rows, columns in grids]))
    for grid, samples in members.items():
        done = _on_grid(convolution, torch.stack([parts[i] for i in samples]), grid)
        for i, part in zip(samples, done, strict=True):
            parts[i] = part
    return torch.cat(parts)


def _on_grid(convolution: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) -> (B, N, D)."""
    maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    return convolution(maps).permute(0, 2, 3, 1).flatten(1, 2)


def normalise_over_space(teacher: Tensor, layout: Layout, config: Alignment) -> Tensor:
    """iREPA's target: (z_n - g_n mean_m z_m) / (std + 1e-6) for the tokens z (T, D) of each picture.

    Mean and standard deviation (unbiased) run over all tokens of the picture, also of those that bypass.
    `constant`: g = config.spatial_gamma, the authors' code. `feature_mean`: g_n is the mean of token n over
    its features, and the deviation is that of what remains after the subtraction, as in Photoroom/PRX.
    """
    z = widen(teacher)
    gamma = z.mean(1, keepdim=True) if config.spatial_norm == "feature_mean" else config.spatial_gamma
    z = z - gamma * _over_picture(z, layout)
    deviation = z - _over_picture(z, layout)
    count = layout.cu_seqlens.diff().to(z.dtype)[:, None]
    variance = samples_from_rows(deviation.square(), layout.cu_seqlens, layout.max_seqlen)
    # A picture of one token has no spread; its deviation is 0 and stays so.
    std = (variance / (count - 1).clamp_min(1)).sqrt()
    return z / (rows_from_samples(std, layout.cu_seqlens, len(z), layout.max_seqlen) + NORM_EPS)


def _over_picture(values: Tensor, layout: Layout) -> Tensor:
    """Mean over each picture's tokens of values (T, D), repeated over them: (T, D)."""
    total = samples_from_rows(values, layout.cu_seqlens, layout.max_seqlen)
    mean = total / layout.cu_seqlens.diff()[:, None]
    return rows_from_samples(mean, layout.cu_seqlens, len(values), layout.max_seqlen)


def repa_loss(projected: Tensor, teacher: Tensor, rows: BlockRows) -> Tensor:
    """-mean cosine (B,) FP32 between projected (K, D) and those rows of teacher (T, D), per sample."""
    cosine = F.cosine_similarity(widen(projected), widen(rows.take(teacher)), dim=1, eps=COSINE_EPS)
    return -rows.mean(cosine)
