"""REPA-E: end-to-end tuning of the autoencoder with the denoiser (arXiv 2504.10483).

    pictures ──encoder, posterior sample──▶ z ──decoder──▶ reconstruction ──▶ L1, LPIPS, KL, adversarial
       z ──running statistics──▶ noisy ──denoiser and projector, frozen──▶ alignment
            all of these ──▶ gradient of the autoencoder
       pictures, reconstruction (detached) ──discriminator──▶ hinge ──▶ gradient of the discriminator
       z (detached) ──statistics of the global batch──▶ what the denoiser is trained on, as in any run

The three updates of a step use gradients at the weights that it began with, so they can be taken at its end,
all or none: a step that is skipped for one is skipped for all. Times and noise belong to the samples, so both
passes through the denoiser see the same.

The flow matching loss never reaches the autoencoder, because the denoiser is trained on detached latents; the
alignment loss reaches both, each in its own pass.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.engine.checkpoint.checkpoints import CheckpointReader, Piece
from millrace.engine.checkpoint.train_state import TUNED_AUTOENCODER
from millrace.engine.config import Config
from millrace.engine.data import Batch, SampleStream
from millrace.engine.data.sources.pictures import Source
from millrace.engine.distributed import process_group
from millrace.engine.encoders.autoencoder import Latents
from millrace.engine.encoders.batch_encoder import BatchEncoder, EncodedBatch
from millrace.engine.encoders.lpips import load_lpips
from millrace.engine.losses.alignment_terms import alignment_losses
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.optim.schedule import learning_rate
from millrace.engine.repa_e.discriminator import Discriminator
from millrace.engine.repa_e.latent_norm import LatentNorm
from millrace.engine.repa_e.replicated import Replicated
from millrace.engine.repa_e.tuned_autoencoder import STATISTICS
from millrace.engine.repa_e.tuning_losses import (
    discriminator_loss,
    generator_loss,
    kl_divergence,
    reconstruction_loss,
)
from millrace.engine.run_log.loss_buffer import LossBuffer
from millrace.engine.util.errors import UserError
from millrace.kernels.support.packed import rows_from_samples, to_device

TERMS = ("reconstruction", "perceptual", "kl", "adversarial", "alignment", "discriminator")
"""Of the log, weighted; the last is the discriminator's own loss."""


class _Part(NamedTuple):
    """Samples of one picture size on their way through the autoencoder."""

    members: list[int]
    """Their places in the micro-batch."""
    places: Tensor
    """The same (n,) int64, on the device."""
    images: Tensor
    mean: Tensor
    logvar: Tensor
    raw: Tensor
    """(n, C, h, w) FP32, a sample of the posterior; carries the gradient to the encoder."""


class RepaE:
    """The autoencoder, its discriminator and the statistics of its latents, as they are trained.

    A step of the run is `next_batch` for each of its micro-batches, then `finish`. All state is replicated:
    every rank holds the same bits.

    Args:
        config: of the run, with `conditioning.autoencoder.tuning` enabled.
        prepare: of the run, with a teacher, and with the autoencoder to tune in FP32. Its `scale` and `shift`
            follow the running statistics, so that its `encode` and `decode` are what sampling needs.
        model: the training model, with `denoiser` and `alignment`.
        flow: gives times and noise.
        accumulate: micro-batches of a step on this process.

    Raises UserError if a network's weights cannot be read.
    """

    def __init__(
        self,
        config: Config,
        prepare: BatchEncoder,
        model: nn.Module,
        flow: FlowMatching,
        accumulate: int,
    ) -> None:
        self.config, self.tuning = config, config.conditioning.autoencoder.tuning
        self.prepare, self.model, self.flow = prepare, model, flow
        self.accumulate, self.device = accumulate, prepare.device
        none = config.alignment.attention.model_copy(update={"weight": 0.0})
        weight = self.tuning.alignment_weight
        self.aligned = config.alignment.model_copy(update={"weight": weight, "attention": none})
        tuning, device = self.tuning, prepare.device
        self.latents: Latents = prepare.autoencoder
        self.compute = getattr(torch, config.conditioning.autoencoder.dtype)
        self.autoencoder = Replicated(self.latents.network.train(), device)
        if tuning.activation_checkpointing:
            self.latents.network.enable_gradient_checkpointing()
        discriminator = Discriminator(tuning.discriminator_width)
        discriminator.init_weights(torch.Generator().manual_seed(config.run.seed))
        if tuning.discriminator_path:
            discriminator.load_file(tuning.discriminator_path)
        self.discriminator = Replicated(discriminator, device)
        path = config.objective.lpips.path
        self.lpips = load_lpips(path, device, torch.float32) if tuning.perceptual_weight else None
        self.norm = LatentNorm(
            self.latents.channels, prepare.patch, tuning.norm_momentum, tuning.norm_eps, device
        )
        self._follow()
        self._ready: deque[EncodedBatch] = deque()
        self._norms: list[Tensor] = []
        self._losses = LossBuffer(config.logging.every_steps, device, TERMS)

    def next_batch(self, stream: Iterator[Batch], step: int) -> EncodedBatch:
        """The next micro-batch for the denoiser; the first of a step brings the other two gradients."""
        if not self._ready:
            self._ready.extend(self._begin([next(stream) for _ in range(self.accumulate)], step))
        return self._ready.popleft()

    def finish(self, applied: bool, step: int, steps: int) -> None:
        """End the step: all updates if the denoiser's was `applied`, else none. `step` of `steps`, both
        counted from where the learning rate's schedule began."""
        tuning, schedule = self.tuning, self.config.schedule
        if applied:
            rates = [learning_rate(step, lr, schedule, steps) for lr in (tuning.lr, tuning.discriminator_lr)]
            trained = (self.autoencoder, self.discriminator)
            # No discriminator has a norm before it begins to learn.
            for part, lr, norm in zip(trained, rates, self._norms, strict=False):
                part.apply(lr, tuning.clip, norm)
            self.norm.update(self._statistics)
            self._follow()
        self.autoencoder.clear()
        self.discriminator.clear()
        self._losses.end_step()

    def flush(self, records: list[dict[str, Any]]) -> None:
        """Put the losses of the steps since the last call into their records. Collective."""
        if self._losses.filled:
            for record, loss in zip(records, self._losses.flush(), strict=True):
                record["autoencoder"] = loss.terms

    def describe(self) -> list[str]:
        """Lines for people."""
        trained = sum(p.numel() for p in self.autoencoder.named.values())
        judges = sum(p.numel() for p in self.discriminator.named.values())
        line = (
            f"tuning: {trained:,} parameters of the autoencoder, {judges:,} of its discriminator, in FP32 on "
            f"every process; arithmetic in {self.config.conditioning.autoencoder.dtype}"
        )
        return [line]

    def _begin(self, batches: list[Batch], step: int) -> list[EncodedBatch]:
        """Gradients of autoencoder and discriminator over a step's micro-batches, and these for the
        denoiser."""
        adversarial = self.tuning.gan_weight > 0 and step >= self.tuning.gan_start
        done = [self._micro_batch(batch, adversarial) for batch in batches]
        self._norms = [self.autoencoder.reduce()] + ([self.discriminator.reduce()] if adversarial else [])
        sums, bad = self._gather(torch.cat([rows for _, _, rows in done]))
        # Samples that are not finite stay out of the statistics, so that they alone are.
        self._statistics = self.norm.statistics(torch.where(bad[:, None], 0.0, sums))
        failed = ~torch.stack(self._norms).isfinite().all() & ~bad.any()
        return [self._for_denoiser(batch, own | failed) for batch, own, _ in done]

    def _micro_batch(self, batch: Batch, adversarial: bool) -> tuple[EncodedBatch, Tensor, Tensor]:
        """Backward of autoencoder and discriminator.

        Returns the batch with raw latents, detached; which samples (B,) had a loss that is not finite; and a
        row of each sample for `_gather`.
        """
        parts = [self._encode(*stack) for stack in self.prepare.stacks(batch)]
        where = {i: (part, j) for part in parts for j, i in enumerate(part.members)}
        order = [where[i] for i in range(len(where))]
        prepared = self.prepare.pack(
            batch, [part.raw[j] for part, j in order], [part.images[j] for part, j in order]
        )
        t = self.flow.time(prepared.sample_index)
        terms = dict.fromkeys(TERMS, torch.zeros(len(order), device=self.device))
        with frozen(self.model, self.discriminator.module):
            terms["alignment"] = self.alignment(prepared, t)
            fakes = [self._own_losses(part, terms, adversarial) for part in parts]
            loss = sum(terms.values())
            (loss.mean() / self.accumulate).backward()
        if adversarial:
            judge = self.discriminator.module
            for part, fake in zip(parts, fakes, strict=True):
                hinge = discriminator_loss(judge(part.images), judge(fake))
                (hinge.sum() / (len(order) * self.accumulate)).backward()
                terms["discriminator"] = terms["discriminator"].index_put((part.places,), hinge.detach())
        self._losses.add(terms, t)
        bad = ~(loss.detach() + terms["discriminator"]).isfinite()
        rows = [
            _rows(self.norm, part.raw, bad[part.places], prepared.sample_index[part.places]) for part in parts
        ]
        return replace(prepared, clean=prepared.clean.detach()), bad, torch.cat(rows)

    def _encode(self, members: list[int], images: Tensor, noise: Tensor) -> _Part:
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            posterior = self.latents.network.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        raw = mean + torch.exp(0.5 * logvar) * noise
        return _Part(members, to_device(torch.tensor(members), self.device), images, mean, logvar, raw)

    def _own_losses(self, part: _Part, terms: dict[str, Tensor], adversarial: bool) -> Tensor:
        """Put the weighted losses of the part's samples into `terms`. Returns their reconstructions (n, 3, h,
        w) FP32, detached. The losses are FP32, outside autocast, as in the authors' code."""
        tuning = self.tuning
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            fake = self.latents.network.decode(part.raw).sample
        fake = fake.float()
        losses = {
            "reconstruction": tuning.reconstruction_weight * reconstruction_loss(part.images, fake),
            "kl": tuning.kl_weight * kl_divergence(part.mean, part.logvar),
        }
        if self.lpips is not None:
            losses["perceptual"] = tuning.perceptual_weight * self.lpips(fake, part.images)
        if adversarial:
            losses["adversarial"] = tuning.gan_weight * generator_loss(self.discriminator.module(fake))
        for name, loss in losses.items():
            terms[name] = terms[name].index_put((part.places,), loss)
        return fake.detach()

    def alignment(self, batch: EncodedBatch, t: Tensor) -> Tensor:
        """Weighted alignment loss (B,) of a batch whose `clean` are raw latents, to which its gradient
        goes.

        Over all tokens: routing belongs to training, and here the denoiser is evaluated.
        """
        layout, head = batch.layout, self.model.alignment
        clean = self.norm.evaluate(batch.clean)
        with torch.no_grad():
            noisy, _ = self.flow.noisy(clean, batch.sample_index, t, layout)
        path = rows_from_samples(1 - t, layout.cu_seqlens, len(clean), layout.max_seqlen)[:, None]
        noisy = noisy + path * (clean - clean.detach())  # adds nothing but the derivative of the path
        compute = getattr(torch, self.config.precision.compute)
        with torch.autocast(self.device.type, compute, enabled=compute != torch.float32):
            output = self.model.denoiser(noisy, t, batch.text, layout, None, taps=(head.block,))
            projected = head(output.features[0], layout, None)
        losses = alignment_losses(self.aligned, projected, (), batch.teacher.tokens, (), layout, None)
        return losses[self.aligned.kind]

    @staticmethod
    def _gather(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (B, 2C + 1) of all samples of the global batch in their order, and which are bad (B,).
        Collective.

        Every rank adds the same numbers in the same order, however the batch is cut.
        """
        if process_group.world_size() > 1:
            parts = [torch.empty_like(rows) for _ in range(process_group.world_size())]
            dist.all_gather(parts, rows)
            rows = torch.cat(parts)
        rows = rows[rows[:, -1].argsort()]
        return rows[:, :-2], rows[:, -2] > 0

    def _for_denoiser(self, batch: EncodedBatch, bad: Tensor) -> EncodedBatch:
        """The batch with normalised latents. Those of bad samples are NaN, so that the denoiser's step is
        skipped with the others and the samples are named."""
        clean, layout = self.norm.normalise(batch.clean, self._statistics), batch.layout
        bad = rows_from_samples(bad, layout.cu_seqlens, len(clean), layout.max_seqlen)[:, None]
        return replace(batch, clean=torch.where(bad, float("nan"), clean))

    @torch.no_grad()
    def initialise(self, stream: Iterator[Batch]) -> None:
        """Start the running statistics from the latents of the first `norm_samples` samples. Collective."""
        steps = -(-self.tuning.norm_samples // self.config.data.global_batch)
        rows = []
        for _ in range(steps * self.accumulate):
            batch = next(stream)
            for members, images, noise in self.prepare.stacks(batch):
                raw = self._encode(members, images, noise).raw
                index = to_device(batch.sample_index[members], self.device)
                rows.append(_rows(self.norm, raw, ~raw.flatten(1).isfinite().all(1), index))
        sums, bad = self._gather(torch.cat(rows))
        self.norm.update(self.norm.statistics(torch.where(bad[:, None], 0.0, sums)), momentum=1.0)
        self._follow()

    def _follow(self) -> None:
        self.latents.scale, self.latents.shift = self.norm.scale, self.norm.shift

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that later steps depend on, by its name in a checkpoint."""
        for part, held in (("autoencoder", self.autoencoder), ("discriminator", self.discriminator)):
            for name, tensor in held.state():
                yield f"{TUNED_AUTOENCODER}{part}/{name}", tensor
        yield f"{STATISTICS}mean", self.norm.mean
        yield f"{STATISTICS}variance", self.norm.variance

    def state_pieces(self) -> Iterator[Piece]:
        """The state for a checkpoint; the first rank writes it."""
        if process_group.rank() == 0:
            for name, tensor in self.named_state():
                yield Piece(name, tuple(tensor.shape), 0, tensor.detach().flatten())

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> None:
        """Take the state from a checkpoint. Raises UserError if it is another autoencoder's."""
        stored = {name for name in reader.names() if name.startswith(TUNED_AUTOENCODER)}
        wanted = dict(self.named_state())
        for name, tensor in wanted.items():
            found = reader.tensor(name) if name in stored else None
            if found is None or found.shape != tensor.shape or len(stored) != len(wanted):
                raise UserError(
                    f"{reader.folder}: its tuned autoencoder or discriminator is not of this configuration "
                    f"({name.removeprefix(TUNED_AUTOENCODER)} differs); resume with "
                    "conditioning.autoencoder of the run"
                )
            tensor.copy_(found)
        self.autoencoder.share_updates()
        self.discriminator.share_updates()
        self._follow()


def _rows(norm: LatentNorm, raw: Tensor, bad: Tensor, index: Tensor) -> Tensor:
    """(n, 2C + 3) FP64: sums of each sample's latents, whether it is bad, its index."""
    return torch.cat([norm.sums(raw), torch.stack([bad.double(), index.double()], dim=1)], dim=1)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass through modules without reaching their parameters."""
    held = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def open_repa_e(
    config: Config,
    prepare: BatchEncoder,
    model: nn.Module,
    flow: FlowMatching,
    accumulate: int,
    source: Source,
    reader: CheckpointReader | None,
) -> RepaE:
    """The tuner in the state of the checkpoint, or with statistics of its latents at its beginning."""
    tuning = RepaE(config, prepare, model, flow, accumulate)
    if reader is not None:
        tuning.load(reader)
        return tuning
    stream = SampleStream(
        source,
        config.data,
        seed=config.run.seed,
        patch=prepare.patch * prepare.autoencoder.factor,
        caption_drop=0.0,
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        first_sample=0,
    )
    try:
        tuning.initialise(stream)
    finally:
        stream.close()
    return tuning
