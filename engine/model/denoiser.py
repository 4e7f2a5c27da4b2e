"""The PRX denoiser on packed tokens: Photoroom's single-stream DiT with static text keys."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    BlockInputs,
    FinalLayer,
    VectorEmbedder,
    sinusoid,
)
from millrace.engine.model.layout import Grid, Layout, LayoutCache, patchify, unpatchify
from millrace.engine.model.resolution_tokens import ResolutionTokens
from millrace.engine.model.routing import POLICIES, RoutedSpan
from millrace.engine.model.sprint import Fusion
from millrace.kernels import gather_tokens, scatter_tokens


class DenoiserOutput(NamedTuple):
    """What one forward pass gives."""

    prediction: Tensor
    """(T, P) velocity or clean patches."""
    features: tuple[Tensor, ...]
    """(T, C) for each tapped block, (K, C) for one inside the routed span."""
    attention: tuple[tuple[Tensor, Tensor], ...]
    """Queries and keys (T or K, tapped heads, D) for each block whose attention is tapped."""


class _Taps:
    """Collects what a loss wants of the blocks on the way."""

    def __init__(self, blocks: Sequence[int], attention_blocks: Sequence[int], heads: int) -> None:
        self.blocks, self.attention_blocks, self.heads = blocks, attention_blocks, heads
        self._features: dict[int, Tensor] = {}
        self._attention: dict[int, tuple[Tensor, Tensor]] = {}

    def heads_of(self, block: int) -> int:
        """How many heads' queries and keys the block shall give."""
        return self.heads if block in self.attention_blocks else 0

    def take(self, block: int, result: Tensor | tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Keep what is wanted of a block's result; the rows that go on."""
        if block in self.attention_blocks:
            result, *queries_keys = result
            self._attention[block] = tuple(queries_keys)
        if block in self.blocks:
            self._features[block] = result
        return result

    def found(self) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, Tensor], ...]]:
        """Features, and queries and keys, in the order in which they were asked for."""
        features = tuple(self._features[i] for i in self.blocks)
        return features, tuple(self._attention[i] for i in self.attention_blocks)


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
        self.fusion = Fusion(width, self.routing) if POLICIES[self.routing.policy].fuses else None
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
    ) -> DenoiserOutput:
        """Predict.

        Args:
            tokens: (T, P) noisy patches.
            t: (B,), 0 is data and 1 noise.
            text: (S, E) packed text embeddings.
            layout: of this batch, from `self.layouts`.
            span: the route and the blocks it applies to; None for all tokens through all blocks.
            taps: blocks whose output is wanted too.
            attention_taps: blocks whose queries and keys are wanted too, of the first `tapped_heads` heads.
        """
        vector = self._condition(t, layout, tokens.dtype)
        inputs = self._block_inputs(vector, text, layout)
        wanted = _Taps(taps, attention_taps, tapped_heads)
        if span is None and self.fusion is not None:
            # SPRINT's fusion layer is part of the model: it runs where nothing is routed, too.
            span = RoutedSpan(None, self.routing.start, self.routing.last(self.config.depth))
        x, depth = self.img_in(tokens), self.config.depth
        if span is None:
            x = self._run_blocks(x, range(depth), inputs, wanted)
        else:
            x = self._run_blocks(x, range(span.start), inputs, wanted)
            x = self._run_span(x, span, inputs, layout, wanted)
            x = self._run_blocks(x, range(span.end + 1, depth), inputs, wanted)
        prediction = self.final_layer(x, vector, layout.cu_seqlens, layout.max_seqlen)
        return DenoiserOutput(prediction, *wanted.found())

    def _condition(self, t: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The vector (B, C) that modulates: time, and the picture's size where the model is told."""
        vector = self.time_in(sinusoid(t, TIME_FEATURES, TIME_SCALE).to(dtype))
        if self.resolution_in is not None:
            sizes = layout.sizes.flatten() * self.config.patch_size
            vector = vector + self.resolution_in(
                sinusoid(sizes, TIME_FEATURES // 2).to(dtype).view(len(t), -1)
            )
        return F.silu(vector)

    def _block_inputs(self, vector: Tensor, text: Tensor, layout: Layout) -> list[BlockInputs]:
        """What each block reads besides its tokens, over all rows of the batch."""
        config = self.config
        # One product for all blocks: the text is static, and so is the vector. Their inputs are read once.
        # All blocks' six vectors are taken apart at once, so backward puts their gradients together once.
        vectors = self.modulation(vector).unflatten(1, (config.depth * 6, config.width)).unbind(1)
        text, cu_seqlens_text, max_seqlen_text = (
            self.txt_in(text),
            layout.cu_seqlens_text,
            layout.max_seqlen_text,
        )
        if self.resolution_tokens is not None:
            text, cu_seqlens_text, max_seqlen_text = self.resolution_tokens(text, layout, config.patch_size)
        text_kv = self.text_kv(text).unflatten(1, (config.depth, 2, config.heads, config.head_dim)).unbind(1)
        rows = layout.positions, layout.cu_seqlens, layout.max_seqlen
        tables = layout.cos, layout.sin
        return [
            BlockInputs(*vectors[6 * i : 6 * i + 6], own, *tables, *rows, cu_seqlens_text, max_seqlen_text)
            for i, own in enumerate(text_kv)
        ]

    def _run_blocks(self, x: Tensor, blocks: range, inputs: list[BlockInputs], wanted: _Taps) -> Tensor:
        """x (T, C), or the rows (K, C) that `inputs` are about, through these blocks."""
        for i in blocks:
            x = wanted.take(i, self.run_block(i, self.blocks[i], wanted.heads_of(i), x, inputs[i]))
        return x

    def _run_span(
        self, dense: Tensor, span: RoutedSpan, inputs: list[BlockInputs], layout: Layout, wanted: _Taps
    ) -> Tensor:
        """dense (T, C): the route's rows through the span's blocks, then back among the others (T, C)."""
        if span.skip:
            # The route has no rows: nothing to run, and the fusion layer gets the mask token everywhere.
            return self.fusion(dense, dense[:0], span)
        x = dense
        if span.route is not None:
            index, cu_seqlens, max_seqlen = span.route
            x, positions = gather_tokens(dense, index), layout.positions[index]
            rows = {"positions": positions, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            inputs = [one._replace(**rows) for one in inputs]
        x = self._run_blocks(x, range(span.start, span.end + 1), inputs, wanted)
        if self.fusion is not None:
            return self.fusion(dense, x, span)
        # Rows that bypass stay where they are, unless a tap promises them as they were before.
        return scatter_tokens(dense, x, span.route.index, inplace=span.start - 1 not in wanted.blocks)

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
        prediction = self(packed, t, text[text_mask], layout).prediction
        return unpatchify(prediction.unflatten(0, (samples, -1)), grid, patch)


def _call(_index: int, block: Block, tapped_heads: int, x: Tensor, inputs: BlockInputs) -> Any:
    return block(x, inputs, tapped_heads)


def _checkpointed(
    config: ActivationCheckpointing,
    reentrant: bool,
    index: int,
    block: Block,
    tapped_heads: int,
    x: Tensor,
    inputs: BlockInputs,
) -> Any:
    if index % config.every or not torch.is_grad_enabled():
        return block(x, inputs, tapped_heads)

    # The inputs one by one: reentrant checkpointing sees only tensors that are arguments themselves.
    def run(x: Tensor, *inputs: Any) -> Any:
        return block(x, BlockInputs(*inputs), tapped_heads)

    if config.policy == "selective":
        return checkpoint(
            run, x, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
        )
    # A block draws no random numbers, so there is no generator to restore.
    return checkpoint(run, x, *inputs, use_reentrant=reentrant, preserve_rng_state=False)


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
