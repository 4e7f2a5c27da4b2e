"""From a batch of pictures and captions to what a training step consumes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.engine.conditioning.autoencoder import Autoencoder
from millrace.engine.conditioning.teacher import Teacher, TeacherFeatures
from millrace.engine.conditioning.text import TextEncoder
from millrace.engine.data import Batch, signed_unit
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
    """(B,) bool, samples whose caption was dropped."""
    keys: list[str]
    """Names of the samples, for messages."""
    images: tuple[Tensor, ...] = ()
    """B pictures (3, h, w) FP32 in [-1, 1], if a term of the loss looks at them."""
    teacher: TeacherFeatures | None = None
    """Features that the denoiser's are aligned with, one row for each of its tokens."""


class Preparation:
    """Runs the frozen networks and packs their output.

    Args:
        autoencoder, text_tower: the frozen networks, on `device`.
        layouts: of the denoiser.
        patch: edge of a token in latent positions.
        seed: of the run; the posterior's noise belongs to the sample.
        keep_images: whether a batch keeps its pictures.
        teacher: whose features a batch gets.
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
        teacher: Teacher | None = None,
    ) -> None:
        self.autoencoder, self.text_tower, self.layouts = autoencoder, text_tower, layouts
        self.patch, self.seed, self.device = patch, seed, device
        self.keep_images, self.teacher = keep_images, teacher

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Prepared:
        """Encode captions and pictures, cut the latents into patches, and lay the samples end to end."""
        latents: list[Tensor] = [torch.empty(0)] * len(batch.images)
        images = list(latents)
        for members, stack, noise in self.stacks(batch):
            for i, latent, image in zip(members, self.autoencoder.encode(stack, noise), stack, strict=True):
                latents[i], images[i] = latent, image
        return self.pack(batch, latents, images)

    def stacks(self, batch: Batch) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Places in the batch of the pictures of each size, these pictures (n, 3, h, w) FP32 in [-1, 1] on
        the device, and the noise of their posterior, if there is one."""
        by_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(batch.images):
            by_size.setdefault(image.shape, []).append(i)
        for members in by_size.values():
            pixels = torch.stack([batch.images[i] for i in members])
            if pixels.device.type == "cpu":  # a decoder on the GPU leaves them there
                pixels = to_device(pixels, self.device)
            stack = signed_unit(pixels)
            yield members, stack, self._posterior_noise(stack, batch.sample_index[members])

    def pack(self, batch: Batch, latents: Sequence[Tensor], images: Sequence[Tensor]) -> Prepared:
        """The batch with latents (channels, h, w) and pictures (3, h, w) of each sample, on the device."""
        sample_index = to_device(batch.sample_index, self.device)
        with torch.no_grad():
            text = self.text_tower.encode(batch.captions)
        grids = [(z.shape[1] // self.patch, z.shape[2] // self.patch) for z in latents]
        return Prepared(
            clean=torch.cat([patchify(z, self.patch) for z in latents]),
            text=text.embeddings,
            layout=self.layouts.layout(grids, text.cu_seqlens, text.max_seqlen),
            sample_index=sample_index,
            unconditional=to_device(batch.dropped, self.device),
            keys=batch.keys,
            images=tuple(images) if self.keep_images else (),
            teacher=self.teacher.features(images, grids, batch.keys) if self.teacher else None,
        )

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
