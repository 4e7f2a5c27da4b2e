"""From a batch of pictures and captions to what a training step consumes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.engine.conditioning.autoencoder import Autoencoder
from millrace.engine.conditioning.text import TextEncoder
from millrace.engine.data import Batch
from millrace.engine.model.packing import Layout, LayoutCache, patchify
from millrace.kernels.packed import to_device
from millrace.kernels.random import normal, sample_keys


@dataclass(frozen=True)
class Prepared:
    """A micro-batch on the device, packed."""

    clean: Tensor
    """(T, P) FP32 patches of latents or pixels."""
    text: Tensor
    """(S, E) text embeddings."""
    layout: Layout
    sample_index: Tensor
    """(B,) int64."""
    unconditional: Tensor
    """(B,) bool, samples whose caption is empty."""
    keys: list[str]
    """Names of the samples, for messages."""
    images: tuple[Tensor, ...] = ()
    """B pictures (3, h, w) FP32 in [-1, 1], if a term of the loss looks at them."""


class Preparation:
    """Runs the frozen networks and packs their output.

    Args:
        autoencoder, text_tower: the frozen networks, on `device`.
        layouts: of the denoiser.
        patch: edge of a token in latent positions.
        seed: of the run; the posterior's noise belongs to the sample.
        keep_images: whether a batch keeps its pictures.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_tower: TextEncoder,
        layouts: LayoutCache,
        patch: int,
        seed: int,
        device: torch.device,
        keep_images: bool = False,
    ) -> None:
        self.autoencoder, self.text_tower, self.layouts = autoencoder, text_tower, layouts
        self.patch, self.seed, self.device = patch, seed, device
        self.keep_images = keep_images

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Prepared:
        """Encode captions and pictures, cut the latents into patches, and lay the samples end to end."""
        sample_index = to_device(batch.sample_index, self.device)
        text = self.text_tower.encode(batch.captions)
        latents, images = self._encode(batch.images, batch.sample_index)
        empty = torch.tensor([not caption for caption in batch.captions])
        grids = [(z.shape[1] // self.patch, z.shape[2] // self.patch) for z in latents]
        return Prepared(
            clean=torch.cat([patchify(z, self.patch) for z in latents]),
            text=text.embeddings,
            layout=self.layouts.layout(grids, text.cu_seqlens, text.max_seqlen),
            sample_index=sample_index,
            unconditional=to_device(empty, self.device),
            keys=batch.keys,
            images=images if self.keep_images else (),
        )

    def _encode(self, images: list[Tensor], sample_index: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Latents (channels, h, w) FP32 of each picture, and the pictures on the device.

        Pictures of one size go through together.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        latents: list[Tensor] = [torch.empty(0)] * len(images)
        moved = list(latents)
        for members in by_size.values():
            stack = to_device(torch.stack([images[i] for i in members]), self.device)
            encoded = self.autoencoder.encode(stack, self._posterior_noise(stack, sample_index[members]))
            for i, latent, image in zip(members, encoded, stack, strict=True):
                latents[i], moved[i] = latent, image
        return latents, tuple(moved)

    def _posterior_noise(self, stack: Tensor, sample_index: Tensor) -> Tensor | None:
        if not self.autoencoder.stochastic:
            return None
        channels, factor = self.autoencoder.channels, self.autoencoder.factor
        samples, _, height, width = stack.shape
        shape = (channels, height // factor, width // factor)
        rows = shape[0] * shape[1]
        offsets = torch.arange(samples + 1, dtype=torch.int32, device=self.device) * rows
        keys = sample_keys(self.seed, to_device(sample_index, self.device), "posterior")
        return normal(keys, offsets, samples * rows, shape[2], rows).view(samples, *shape)
