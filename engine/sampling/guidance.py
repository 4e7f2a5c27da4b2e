"""Classifier-free guidance and its relatives: evaluate the branches, batched where they can be, and combine.

    output ──velocity──▶ v ──mean target──▶ v of strong and weak ──▶ weak + s (strong - weak)    s = guidance

Branches whose tokens run through the same blocks are one batch of twice the pictures (classifier-free
guidance); a branch with a route of its own, or without the routed blocks, is evaluated by itself.

Velocities are combined. PRX's pixel pipeline combines clean patches, before it converts them. That is the
same: at one time t the conversion (x_t - x) / max(t, t_min) is affine in x, and the weights s and 1 - s add
up to one.

Contrastive training shifts predictions towards minus the mean target (`engine/losses/contrastive.py`).
`sampling.contrastive` takes that back from the branches that were trained so: those without the caption only
if `objective.contrastive_empty`.
"""

import torch
from torch import Tensor

from millrace.engine.config import Sampling
from millrace.engine.encoders.text_encoder import PackedText
from millrace.engine.losses.contrastive import MeanTarget
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.guidance_branches import Branch, branches
from millrace.engine.model.layout import Grid, Layout
from millrace.engine.model.routing import branch_span
from millrace.engine.util.randomness import Purpose
from millrace.kernels.support.keys import stream_key


class Guidance:
    """Velocities for one batch of pictures, from the captions and, as the settings ask, against them.

    Args:
        denoiser: in evaluation.
        flow: the objective that it was trained with.
        config: method, scale and interval.
        captions: of the B pictures.
        empty: as many empty captions, or None where no branch runs without the caption.
        grids: of patches, one for each picture.
        seed: of the pictures; routes are a function of (seed, picture, step).
        pictures: (B,) int64, index of each picture.
        compute: dtype of matrix products.
        mean_target: for `config.contrastive`, or None.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        flow: FlowMatching,
        config: Sampling,
        captions: PackedText,
        empty: PackedText | None,
        grids: list[Grid],
        seed: int,
        pictures: Tensor,
        compute: torch.dtype,
        mean_target: MeanTarget | None = None,
    ) -> None:
        self.denoiser, self.flow, self.config, self.compute = denoiser, flow, config, compute
        self.mean_target = mean_target
        self._captions, self._empty, self._grids = captions, empty, grids
        self._seed, self._pictures = seed, pictures
        self._layouts: dict[tuple[bool, ...], tuple[Tensor, Layout]] = {}

    def __call__(self, tokens: Tensor, t: float, step: int) -> Tensor:
        """Guided velocity (T, P) FP32; tokens (T, P) FP32 at the common time t of solver step `step`."""
        velocities: list[Tensor] = []
        for batch in _batches(branches(self.config, self.denoiser.routing, t)):
            outputs = self._evaluate(tokens, t, step, batch).chunk(len(batch))
            for branch, output in zip(batch, outputs, strict=True):
                velocities.append(self._uncontrasted(self.flow.velocity(output, tokens, t), branch))
        if len(velocities) == 1:
            return velocities[0]
        strong, weak = velocities
        return weak + self.config.guidance * (strong - weak)

    def _uncontrasted(self, velocity: Tensor, branch: Branch) -> Tensor:
        trained_so = branch.captioned or self.flow.config.contrastive_empty
        if self.mean_target is None or not trained_so:
            return velocity
        patch = self.denoiser.config.patch_size
        return self.mean_target.apply(velocity, self.config.contrastive, self._grids, patch)

    def _evaluate(self, tokens: Tensor, t: float, step: int, batch: list[Branch]) -> Tensor:
        text, layout = self._layout(tuple(branch.captioned for branch in batch))
        span = None
        if batch[0].drop or batch[0].skip:
            span = branch_span(
                batch[0],
                self.denoiser.routing,
                self.denoiser.config.depth,
                layout,
                self._route_seed(batch[0], step),
                self._pictures,
            )
        time = torch.full((len(self._grids) * len(batch),), t, device=tokens.device)
        with torch.autocast(tokens.device.type, self.compute, enabled=self.compute != torch.float32):
            out = self.denoiser(tokens.repeat(len(batch), 1), time, text, layout, span).prediction
        return out.float()

    def _route_seed(self, branch: Branch, step: int) -> int:
        """Of the routes of a branch: another in each step, as CompVis/tread's sampler draws, or one for all,
        as PRX's. Strong and weak branch have their own. Both evaluations of a step of Heun's share one."""
        strong = branch.drop == self.config.strong_drop
        purpose = Purpose.STRONG_ROUTE if strong else Purpose.WEAK_ROUTE
        return stream_key(self._seed, purpose if self.config.weak_route == "fixed" else purpose.at(step))

    def _layout(self, captioned: tuple[bool, ...]) -> tuple[Tensor, Layout]:
        """Text (S, E) and layout of one batch of branches."""
        if captioned not in self._layouts:
            parts = [self._captions if has else self._empty for has in captioned]
            assert None not in parts, "the weak branch has no caption, and no empty one was given"
            starts, offset = [parts[0].cu_seqlens[:1]], 0
            for part in parts:
                starts.append(part.cu_seqlens[1:] + offset)
                offset += len(part.embeddings)
            text = torch.cat([part.embeddings for part in parts])
            longest = max(part.max_seqlen for part in parts)
            grids = self._grids * len(parts)
            layout = self.denoiser.layouts.layout(grids, torch.cat(starts), longest)
            self._layouts[captioned] = text, layout
        return self._layouts[captioned]


def _batches(needed: tuple[Branch, ...]) -> list[list[Branch]]:
    """Branches in order; neighbours in which every token runs through every block share a batch."""
    found: list[list[Branch]] = []
    for branch in needed:
        dense = not (branch.drop or branch.skip)
        if dense and found and not (found[-1][0].drop or found[-1][0].skip):
            found[-1].append(branch)
        else:
            found.append([branch])
    return found
