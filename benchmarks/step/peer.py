"""diffusers' PRXTransformer2DModel, routed as Photoroom/PRX routes it: what our engine is compared with.

Embedders, blocks and final layer are diffusers' modules. This file holds the loop over the blocks and the
token routing, by the operations of Photoroom/PRX's `algorithm/tread.py` and `algorithm/sprint.py`:

    draw      uniform scores (B, N) -> topk of those that leave -> boolean mask -> masked_select of the others
    enter     gather tokens and the RoPE table of every sample; TREAD gathers the leaving tokens as well
    TREAD     zeros (B, N, C) <- scatter what ran <- scatter what bypassed
    SPRINT    mask token, expanded and cloned <- scatter what ran; Linear(concat[dense, that])

Two choices favour the peer: its scatters are in place, and its attention mask is not materialised (diffusers
passes (B, 1, 1, keys), where Photoroom/PRX expands it to all heads and queries).
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import PRXTransformer2DModel

Method = Literal["none", "tread", "sprint"]


class Peer(nn.Module):
    """A dense (B, N, C) denoiser.

    Args:
        model: the network; its parameters are not copied.
        method: what happens between blocks `start` and `end`.
        start, end: first and last routed block, inclusive.
        drop: share of a sample's tokens that do not run through them.
    """

    def __init__(
        self,
        model: "PRXTransformer2DModel",
        method: Method = "none",
        start: int = 0,
        end: int = 0,
        drop: float = 0.5,
    ) -> None:
        super().__init__()
        self.model, self.method, self.start, self.end, self.drop = model, method, start, end, drop
        if method == "sprint":
            width = model.hidden_size
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.fuse = nn.Linear(2 * width, width)

    def forward(
        self, images: Tensor, t: Tensor, text: Tensor, mask: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Predict.

        Args:
            images: (B, channels, height, width), noisy.
            t: (B,), 0 is data and 1 noise.
            text: (B, S, E), padded.
            mask: (B, S) bool, False where padded.
            kept: (B, K) int64, ascending positions of the tokens that run through the routed blocks;
                drawn where it is None.

        Returns:
            (B, channels, height, width).
        """
        from diffusers.models.transformers.transformer_prx import get_image_ids, img2seq, seq2img

        model = self.model
        samples, _, height, width = images.shape
        text = model.txt_in(text)
        x = model.img_in(img2seq(images, model.patch_size))
        rope = model.pe_embedder(get_image_ids(samples, height, width, model.patch_size, images.device))
        vector = model._compute_timestep_embedding(t, dtype=x.dtype)
        if model.resolution_embedder is not None:
            edges = (
                torch.full((samples,), edge, device=x.device, dtype=torch.float32) for edge in (height, width)
            )
            vector = vector + model.resolution_embedder(*edges, dtype=vector.dtype)

        here = rope
        for i, block in enumerate(model.blocks):
            if self.method != "none" and i == self.start:
                kept, left = self._draw(x) if kept is None else (kept, _others(kept, x.shape[1]))
                dense, x = x, _take(x, kept)
                bypassing = _take(dense, left) if self.method == "tread" else None
                at = kept[:, None, :, None, None, None].expand(-1, -1, -1, *rope.shape[3:])
                here = rope.gather(2, at)
            x = block(
                hidden_states=x,
                encoder_hidden_states=text,
                temb=vector,
                image_rotary_emb=here,
                attention_mask=mask,
            )
            if self.method != "none" and i == self.end:
                if self.method == "tread":
                    full = torch.zeros_like(dense)
                    x = full.scatter_(1, _columns(kept, x), x).scatter_(1, _columns(left, x), bypassing)
                else:
                    full = self.mask_token.to(x.dtype).expand_as(dense).clone()
                    x = self.fuse(torch.cat((dense, full.scatter_(1, _columns(kept, x), x)), dim=-1))
                here = rope
        return seq2img(model.final_layer(x, vector), model.patch_size, images.shape)

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, K) that run, ascending, and (B, N-K) that do not, for tokens x (B, N, C)."""
        samples, tokens, _ = x.shape
        leaving = min(max(round(tokens * self.drop), 1), tokens - 1)
        scores = torch.rand(samples, tokens, device=x.device)
        left = scores.topk(leaving, dim=1, largest=False).indices
        stays = torch.ones(samples, tokens, dtype=torch.bool, device=x.device).scatter_(1, left, False)
        return _select(stays), left


def _select(mask: Tensor) -> Tensor:
    """Ascending positions of the True entries of (B, N); every row has the same number of them."""
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return positions.masked_select(mask).view(len(mask), -1)


def _others(kept: Tensor, tokens: int) -> Tensor:
    mask = torch.ones(len(kept), tokens, dtype=torch.bool, device=kept.device)
    return _select(mask.scatter_(1, kept, False))


def _columns(rows: Tensor, x: Tensor) -> Tensor:
    """Index (B, K) repeated over the features of x, as gather and scatter want it."""
    return rows[..., None].expand(-1, -1, x.shape[-1])


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, _columns(rows, x))
