"""One training step, forward and backward, of our engine and of the peer, on the same batch and weights.

Each side gets the batch as its own data path delivers it: ours packed (patches, text rows without padding,
layout), the peer's dense (images, padded text, mask). From there a step is: noise to the samples' times, the
route, the network, the flow-matching loss, backward. Optimizer, reduction and logging are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.benchmarks.step.peer import Peer
from millrace.engine.config import Config, route_end
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.conversion import diffusers_config, diffusers_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.layout import patchify
from millrace.engine.model.routing import routing_policy
from millrace.engine.util.errors import UserError
from millrace.kernels import add_noise

VARIANTS = {"dense": None, "tread": 0.5, "sprint": 0.75}
"""Routing policies compared, and the share of tokens that bypass the routed blocks: the published runs'."""


@dataclass(frozen=True)
class Batch:
    """The inputs of a step, before either side's layout."""

    clean: Tensor
    """(B, channels, height, width) FP32, latents or pixels."""
    noise: Tensor | None
    """The same shape, or None: each side draws its own within the step."""
    t: Tensor
    """(B,) FP32."""
    text: Tensor
    """(B, S, E), in the dtype of the weights."""
    lengths: tuple[int, ...]
    """Text tokens of each sample; the rest of S is padding."""

    def cast(self, dtype: torch.dtype) -> "Batch":
        """With text in the dtype of the arithmetic."""
        return replace(self, text=self.text.to(dtype))

    def without_noise(self) -> "Batch":
        """With the noise left to each side's step."""
        return replace(self, noise=None)

    @property
    def mask(self) -> Tensor:
        """(B, S) bool, False where the text is padding."""
        position = torch.arange(self.text.shape[1], device=self.text.device)
        return position < torch.tensor(self.lengths, device=self.text.device)[:, None]


def random_batch(
    config: Config,
    samples: int,
    grid: tuple[int, int],
    text_tokens: int,
    lengths: Sequence[int],
    device: torch.device,
) -> Batch:
    """Standard normal inputs for `samples` images of `grid` tokens and `text_tokens` rows of padded text."""
    model = config.model
    shape = (samples, model.in_channels, grid[0] * model.patch_size, grid[1] * model.patch_size)
    return Batch(
        clean=torch.randn(shape, device=device),
        noise=torch.randn(shape, device=device),
        t=torch.rand(samples, device=device).clamp_min(0.01),
        text=torch.randn(samples, text_tokens, model.context_dim, device=device),
        lengths=tuple(lengths),
    )


def variant_config(config: Config, variant: str) -> Config:
    """The configuration with another routing policy, at its published share, blocks as configured."""
    routing: dict[str, Any] = {"policy": "none" if variant == "dense" else variant}
    if variant != "dense":
        routing["drop"] = VARIANTS[variant]
    return with_values(config, {"routing": routing})


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with some values replaced, checked as a whole."""
    return parse_config(merge(config.model_dump(mode="json"), values), "benchmark")


def build_denoiser(config: Config, seed: int) -> Denoiser:
    """The network of a configuration, random in every parameter, also in those that training starts at
    zero."""
    denoiser = Denoiser(config.model, config.routing)
    denoiser.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return denoiser


FUSION = {"mask_token": "fusion.mask_token", "fuse.weight": "fusion.weight", "fuse.bias": "fusion.bias"}
"""The peer's parameters of SPRINT's fusion layer, and ours; only the mask token's shape differs."""


def build_peer(denoiser: Denoiser, config: Config) -> Peer:
    """The peer with copies of the denoiser's weights, on their device (also meta) and in their dtype."""
    try:
        from diffusers import PRXTransformer2DModel
    except ImportError:
        raise UserError("the comparison needs diffusers: pip install 'diffusers>=0.42'") from None
    with torch.device("meta"):
        model = PRXTransformer2DModel(**diffusers_config(config.model))
    weights = denoiser.state_dict()
    network = {name: tensor for name, tensor in weights.items() if name not in FUSION.values()}
    parts = diffusers_state(network, config.model)
    model.load_state_dict({name: part.clone() for name, part in parts.items()}, assign=True)
    routing = config.routing
    if routing.policy == "none":
        return Peer(model)
    peer = Peer(model, routing.policy, routing.start, route_end(config), routing.drop)
    if routing.policy == "sprint":
        peer.to(denoiser.txt_in.weight)
        for name, ours in FUSION.items():
            own = peer.get_parameter(name)
            own.data = weights[ours].detach().clone().view_as(own)
    return peer


class OurStep:
    """The engine's micro-batch, as `Trainer.sample_losses` runs it, and its backward.

    Args:
        denoiser: with its weights in the dtype of the arithmetic.
        config: decides routing and objective.
        batch: packed here, once.
    """

    def __init__(self, denoiser: Denoiser, config: Config, batch: Batch) -> None:
        self.denoiser, self.config = denoiser, config
        self.flow = FlowMatching(config.objective, config.run.seed)
        self.policy = routing_policy(config)
        patch, device = config.model.patch_size, batch.clean.device
        samples, _, height, width = batch.clean.shape
        grids = [(height // patch, width // patch)] * samples
        offsets = torch.tensor((0, *batch.lengths)).cumsum(0).int().to(device)
        self.layout = denoiser.layouts.layout(grids, offsets, max(batch.lengths))
        self.clean = patchify(batch.clean, patch).flatten(0, 1)
        self.noise = None if batch.noise is None else patchify(batch.noise, patch).flatten(0, 1)
        self.text = torch.cat([rows[:n] for rows, n in zip(batch.text, batch.lengths, strict=True)])
        self.t = batch.t
        self.sample_index = torch.arange(samples, device=device)

    def forward(self) -> Tensor:
        """The loss ()."""
        layout, flow = self.layout, self.flow
        if self.noise is None:
            noisy, noise = flow.noisy(self.clean, self.sample_index, self.t, layout)
        else:
            noise = self.noise
            noisy = add_noise(self.clean, noise, self.t, layout.cu_seqlens, layout.max_seqlen)
        noisy = noisy.to(self.text.dtype)
        span = self.policy.draw(layout, self.config.run.seed, self.sample_index)
        prediction = self.denoiser(noisy, self.t, self.text, layout, span).prediction
        return flow.loss(prediction, self.clean, noise, self.t, layout).mean()


class PeerStep:
    """The same in Photoroom/PRX's operations (`pipeline/fm_pipeline.py`), on dense tensors."""

    def __init__(self, peer: Peer, config: Config, batch: Batch) -> None:
        if config.objective.contrastive_weight:
            raise UserError("objective.contrastive_weight is set, but the comparison has no contrastive term")
        self.peer, self.config, self.batch, self.mask = peer, config, batch, batch.mask

    def forward(self, kept: Tensor | None = None) -> Tensor:
        """The loss (); `kept` (B, K) as in `Peer`."""
        batch, objective = self.batch, self.config.objective
        noise = torch.randn_like(batch.clean) if batch.noise is None else batch.noise
        t = batch.t[:, None, None, None]
        noisy = (1 - t) * batch.clean + t * noise
        prediction = self.peer(noisy.to(batch.text.dtype), batch.t, batch.text, self.mask, kept).float()
        if objective.prediction == "velocity":
            return F.mse_loss(prediction, noise - batch.clean)
        floor = t.clamp_min(objective.t_min)
        return F.mse_loss((noisy - prediction) / floor, (noisy - batch.clean) / floor)


def run(forward: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """A step into fresh gradients; returns the loss ()."""
    for parameter in parameters:
        parameter.grad = None
    loss = forward()
    loss.backward()
    return loss.detach()
