"""Batch encoder: frozen networks and packing, from pictures and captions to what a training step consumes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from millrace.engine.data import Batch, signed_unit
from millrace.engine.data.captions import WhichCaption
from millrace.engine.encoders.autoencoder import Autoencoder, Posterior
from millrace.engine.encoders.teacher import Teacher, TeacherFeatures
from millrace.engine.encoders.text_encoder import TextEncoder
from millrace.engine.model.layout import Layout, LayoutCache, patchify
from millrace.engine.util.randomness import Purpose
from millrace.kernels.support.packed import joined, to_device
from millrace.kernels.support.philox import normal, sample_keys


@dataclass(frozen=True)
class EncodedBatch:
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
    which: list[WhichCaption] = field(default_factory=list)
    """Which of its captions each was trained with, for the log."""
    images: tuple[Tensor, ...] = ()
    """B pictures (3, h, w) FP32 in [-1, 1], if a term of the loss looks at them."""
    teacher: TeacherFeatures | None = None
    """Features that the denoiser's are aligned with, one row for each of its tokens."""
    captions_cut: int = 0
    """How many of the captions were longer than the text encoder's limit."""

    def tensors(self) -> Iterator[Tensor]:
        """All of them but the teacher's, whose stream is its own."""
        layout = (value for value in vars(self.layout).values() if isinstance(value, Tensor))
        yield from (self.clean, self.text, self.sample_index, self.unconditional, *self.images, *layout)


class BatchEncoder:
    """Runs the frozen networks and packs their output.

    Args:
        autoencoder, text_encoder: the frozen networks, on `device`.
        layouts: of the denoiser.
        patch: edge of a token in latent positions.
        seed: of the run; the posterior's noise belongs to the sample.
        keep_images: whether a batch keeps its pictures.
        teacher: whose features a batch gets.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        layouts: LayoutCache,
        patch: int,
        seed: int,
        device: torch.device,
        keep_images: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        self.autoencoder, self.text_encoder, self.layouts = autoencoder, text_encoder, layouts
        self.patch, self.seed, self.device = patch, seed, device
        self.keep_images, self.teacher = keep_images, teacher

    @torch.no_grad()
    def __call__(self, batch: Batch) -> EncodedBatch:
        """Encode captions and pictures, cut the latents into patches, and lay the samples end to end."""
        latents: list[Tensor] = [torch.empty(0)] * len(batch.images)
        images = list(latents)
        for members, posterior, noise in self.kept(batch):
            for i, latent in zip(members, self.autoencoder.sample(posterior, noise), strict=True):
                latents[i] = latent
        for members, stack, noise in self.stacks(batch):
            for i, latent, image in zip(members, self.autoencoder.encode(stack, noise), stack, strict=True):
                latents[i], images[i] = latent, image
        return self.pack(batch, latents, images)

    def stacks(self, batch: Batch) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Places in the batch of the pictures of each size, these pictures (n, 3, h, w) FP32 in [-1, 1] on
        the device, and the noise of their posterior, if there is one. A sample whose posterior is kept has no
        picture."""
        for members in _by_shape(batch.images).values():
            stack = signed_unit(self._pixels([batch.images[i] for i in members]))
            height, width = (edge // self.autoencoder.factor for edge in stack.shape[2:])
            shape = (len(members), self.autoencoder.channels, height, width)
            yield members, stack, self._posterior_noise(shape, batch.sample_index[members])

    def _pixels(self, images: Sequence[Tensor]) -> Tensor:
        """Pictures (n, 3, h, w) on the device; those that a GPU decoded are there already."""
        if all(image.device.type == "cpu" for image in images):
            return joined([image[None] for image in images], self.device)
        for image in images:
            if image.device.type == "cuda":  # from another stream's memory
                image.record_stream(torch.cuda.current_stream(self.device))
        return torch.stack(
            [to_device(image, self.device) if image.device.type == "cpu" else image for image in images]
        )

    def kept(self, batch: Batch) -> Iterator[tuple[list[int], Posterior, Tensor | None]]:
        """Places in the batch of the samples of each size whose posterior is kept, these posteriors on the
        device, and their noise."""
        for members in _by_shape(batch.posteriors).values():
            moments = joined([batch.posteriors[i][None] for i in members], self.device)
            posterior = Posterior(moments[:, 0], moments[:, 1] if moments.shape[1] == 2 else None)
            shape = self.autoencoder.latent_shape(posterior)
            yield members, posterior, self._posterior_noise(shape, batch.sample_index[members])

    def pack(self, batch: Batch, latents: Sequence[Tensor], images: Sequence[Tensor]) -> EncodedBatch:
        """The batch with latents (channels, h, w) and pictures (3, h, w) of each sample, on the device."""
        sample_index = to_device(batch.sample_index, self.device)
        with torch.no_grad():
            text = self.text_encoder.encode(batch.captions, batch.text)
        grids = [(z.shape[1] // self.patch, z.shape[2] // self.patch) for z in latents]
        return EncodedBatch(
            clean=torch.cat([patchify(z, self.patch) for z in latents]),
            text=text.embeddings,
            layout=self.layouts.layout(grids, text.cu_seqlens, text.max_seqlen),
            sample_index=sample_index,
            unconditional=to_device(batch.dropped, self.device),
            keys=batch.keys,
            which=batch.which,
            images=tuple(images) if self.keep_images else (),
            teacher=self.teacher.features(images, grids, batch.keys) if self.teacher else None,
            captions_cut=text.truncated,
        )

    def _posterior_noise(self, shape: tuple[int, int, int, int], sample_index: Tensor) -> Tensor | None:
        """Of latents of a shape (n, channels, h, w)."""
        if not self.autoencoder.stochastic:
            return None
        samples, channels, height, width = shape
        rows = channels * height
        offsets = torch.arange(samples + 1, dtype=torch.int32, device=self.device) * rows
        keys = sample_keys(self.seed, to_device(sample_index, self.device), Purpose.POSTERIOR)
        return normal(keys, offsets, samples * rows, width, rows).view(shape)


def _by_shape(tensors: Sequence[Tensor | None]) -> dict[torch.Size, list[int]]:
    members: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            members.setdefault(tensor.shape, []).append(i)
    return members
