"""The PRX denoiser on packed tokens: Photoroom's single-stream DiT with static text keys."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operator that selective checkpointing keeps
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import millrace.kernels.ops.fp8_linear  # noqa: F401 - registers an operator that is named here
from millrace.engine.config import ActivationCheckpointing, Model, Routing
from millrace.engine.model.blocks import (
    TIME_FEATURES,
    TIME_SCALE,
    Block,
    FinalLayer,
    VectorEmbedder,
    sinusoid,
)
from millrace.engine.model.layout import (
    Grid,
    Layout,
    LayoutCache,
    patchify,
    unpatchify,
)
from millrace.engine.model.resolution_tokens import ResolutionTokens
from millrace.engine.model.routing import RoutedSpan
from millrace.engine.model.sprint import Fusion
from millrace.kernels import gather_tokens, scatter_tokens


class Denoiser(nn.Module):
    """Predicts velocity or clean patches of noisy patches, given time and text.

        tokens (T, P) ──img_in──▶ x (T, C) ──block 0 .. depth-1──▶ x ──final_layer──▶ prediction (T, P)
        t (B,) ──time_in──▶ vector (B, C) ──modulation, one GEMM for all blocks──▶ (B, depth, 6, C)
        text (S, E) ──txt_in──▶ (S, C) ──text_kv, one GEMM for all blocks──▶ (S, depth, 2, H, D)

    Within a routed span only the route's rows run. A model of SPRINT has a fusion layer after its span, which
    it needs in sampling too; otherwise the model does not depend on the routing.

    Args:
        config: the network.
        routing: of its training.
    """

    def __init__(self, config: Model, routing: Routing | None = None) -> None:
        super().__init__()
        self.config, self.routing = config, routing or Routing()
        width, features = config.width, config.in_channels * config.patch_size**2
        if config.bottleneck:
            self.img_in = nn.Sequential(
                nn.Linear(features, config.bottleneck), nn.Linear(config.bottleneck, width)
            )
        else:
            self.img_in = nn.Linear(features, width)
        self.txt_in = nn.Linear(config.context_dim, width)
        self.time_in = VectorEmbedder(width)
        self.resolution_in = VectorEmbedder(width) if config.resolution_embedding else None
        self.resolution_tokens = ResolutionTokens(width) if config.resolution_tokens else None
        self.modulation = nn.Linear(width, config.depth * 6 * width)
        self.text_kv = nn.Linear(width, config.depth * 2 * width, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, features)
        self.fusion = Fusion(width, self.routing) if self.routing.policy == "sprint" else None
        self.layouts = LayoutCache(config.axes, config.rope_theta)
        self.run_block = _call

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all parameters from `seed`: zeros in modulation and final layer, PyTorch's default elsewhere.

        PRX's initialisation. Fused projections draw with the fan-in of their parts, which is the same.
        """
        generator = torch.Generator().manual_seed(seed)
        zero = {self.modulation, self.final_layer.modulation, self.final_layer.linear}
        for module in self.modules():
            if isinstance(module, Block):
                for norm in (module.query_norm, module.key_norm, module.text_key_norm):
                    norm.fill_(1.0)
            elif isinstance(module, nn.Linear):
                bound = 0.0 if module in zero else module.in_features**-0.5
                for parameter in module.parameters():
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)
            elif isinstance(module, Fusion):
                module.init_weights(generator)

    def checkpoint_activations(self, config: ActivationCheckpointing, reentrant: bool = False) -> None:
        """Recompute in backward what the policy drops. ZeRO-3, which frees weights, needs `reentrant`."""
        if config.policy != "none":
            self.run_block = functools.partial(_checkpointed, config, reentrant)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        text: Tensor,
        layout: Layout,
        span: RoutedSpan | None = None,
        taps: Sequence[int] = (),
        attention_taps: Sequence[int] = (),
        tapped_heads: int = 0,
    ) -> tuple[Any, ...]:
        """Predict.

        Args:
            tokens: (T, P) noisy patches.
            t: (B,), 0 is data and 1 noise.
            text: (S, E) packed text embeddings.
            layout: of this batch, from `self.layouts`.
            span: the route and the blocks it applies to; None for all tokens through all blocks.
            taps: blocks whose output is wanted too.
            attention_taps: blocks whose queries and keys are wanted too, of the first `tapped_heads` heads.

        Returns:
            prediction (T, P), then one (T, C) per tap, then a pair of (T, tapped_heads, D) per attention tap;
            K rows for a block inside the routed span.
        """
        config = self.config
        vector = self.time_in(sinusoid(t, TIME_FEATURES, TIME_SCALE).to(tokens.dtype))
        if self.resolution_in is not None:
            sizes = layout.sizes.flatten() * config.patch_size
            vector = vector + self.resolution_in(
                sinusoid(sizes, TIME_FEATURES // 2).to(tokens.dtype).view(len(t), -1)
            )
        vector = F.silu(vector)
        modulation = self.modulation(vector).unflatten(1, (config.depth, 6, config.width)).unbind(1)
        text, text_where = self.txt_in(text), (layout.cu_seqlens_text, layout.max_seqlen_text)
        if self.resolution_tokens is not None:
            text, *text_where = self.resolution_tokens(text, layout, config.patch_size)
        cu_seqlens_text, max_seqlen_text = text_where
        text = self.text_kv(text)
        text_kv = text.unflatten(1, (config.depth, 2, config.heads, config.head_dim)).unbind(1)

        if span is None and self.fusion is not None:
            span = RoutedSpan(None, self.routing.start, self.routing.last(config.depth))
        x = dense = self.img_in(tokens)
        everywhere = where = (layout.positions, layout.cu_seqlens, layout.max_seqlen)
        tapped: dict[int, Tensor] = {}
        attention: dict[int, tuple[Tensor, Tensor]] = {}
        for i, block in enumerate(self.blocks):
            if span is not None and span.skip and span.start <= i <= span.end:
                # The route has no rows: nothing to run, and the fusion layer gets the mask token everywhere.
                x = self.fusion(x, x[:0], span) if i == span.start else x
                continue
            if span is not None and i == span.start:
                dense = x
                if span.route is not None:
                    index, *lengths = span.route
                    x, where = gather_tokens(dense, index), (layout.positions[index], *lengths)
            positions, cu_seqlens, max_seqlen = where
            x = self.run_block(
                i,
                block,
                x,
                modulation[i],
                text_kv[i],
                layout.cos,
                layout.sin,
                positions,
                cu_seqlens,
                cu_seqlens_text,
                max_seqlen,
                max_seqlen_text,
                *((tapped_heads,) if i in attention_taps else ()),
            )
            if i in attention_taps:
                x, *queries_keys = x
                attention[i] = tuple(queries_keys)
            if i in taps:
                tapped[i] = x
            if span is not None and i == span.end:
                if self.fusion is not None:
                    x = self.fusion(dense, x, span)
                else:
                    # Rows that bypass stay where they are, unless a tap promises them as they were before.
                    inplace = span.start - 1 not in taps
                    x = scatter_tokens(dense, x, span.route.index, inplace=inplace)
                where = everywhere
        prediction = self.final_layer(x, vector, layout.cu_seqlens, layout.max_seqlen)
        return (prediction, *(tapped[i] for i in taps), *(attention[i] for i in attention_taps))

    def predict(self, images: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Dense form: images (B, C, H, W), t (B,), text (B, S, E), text_mask (B, S) bool -> (B, C, H, W).

        Padding may lie anywhere in the text; a sample without any valid token attends to its image alone.
        """
        patch = self.config.patch_size
        samples, _, height, width = images.shape
        if height % patch or width % patch:
            raise ValueError(f"images are {height} x {width}, expected multiples of patch_size {patch}")
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        lengths = text_mask.sum(1)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
        grid: Grid = (height // patch, width // patch)
        layout = self.layouts.layout([grid] * samples, offsets, int(lengths.max()))
        packed = patchify(images, patch).flatten(0, 1)
        (prediction,) = self(packed, t, text[text_mask], layout)
        return unpatchify(prediction.unflatten(0, (samples, -1)), grid, patch)


def _call(_index: int, block: Block, *args: Tensor) -> Tensor:
    return block(*args)


def _checkpointed(
    config: ActivationCheckpointing, reentrant: bool, index: int, block: Block, *args: Tensor
) -> Tensor:
    if index % config.every or not torch.is_grad_enabled():
        return block(*args)
    if config.policy == "selective":
        return checkpoint(
            block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
        )
    # A block draws no random numbers, so there is no generator to restore.
    return checkpoint(block, *args, use_reentrant=reentrant, preserve_rng_state=False)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.millrace.fp8_product.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.millrace.rope_attention_fused.default,
}


def _keep_products():  # noqa: ANN202
    """Selective checkpointing: keep the results of matrix products and attention, recompute the rest."""

    def policy(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:  # noqa: ANN001, ANN002, ANN003
        return CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
