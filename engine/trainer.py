"""The training loop, on one page.

Batch ──preparation──▶ Prepared ──flow──▶ noisy tokens, t ──denoiser (+ span)──▶ prediction
  ──flow.loss──▶ per-sample loss ──DeepSpeed: backward, reduce, step──▶ EMA, log, checkpoint, samples
"""

import gc
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.engine.conditioning.autoencoder import open_autoencoder
from millrace.engine.conditioning.text import open_text_tower
from millrace.engine.config import Config
from millrace.engine.config_file import differences
from millrace.engine.data import SampleStream, fingerprint, open_source
from millrace.engine.errors import UserError
from millrace.engine.export import start_from
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import peak_flops, training_flops
from millrace.engine.model.routing import describe, require_grid, routing_policy
from millrace.engine.objective.flow import FlowMatching
from millrace.engine.optim.adamw import build_optimizer
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.optim.schedule import learning_rate
from millrace.engine.preparation import Preparation, Prepared
from millrace.engine.runtime import distributed, state, zero
from millrace.engine.runtime.checkpoint import (
    CheckpointReader,
    list_checkpoints,
    resume_checkpoint,
    save_checkpoint,
)
from millrace.engine.runtime.logs import LossBuffer, RunLog, make_output, replace_text
from millrace.engine.runtime.memory import check_fits
from millrace.engine.runtime.precision import DTYPES, audit, require_masters
from millrace.engine.runtime.preemption import StopRequests
from millrace.engine.runtime.shards import gather_parameters, local_shards
from millrace.engine.sampling import Sampler, save_grid


class Trainer:
    """One training run: builds its parts in order, resumes, and trains to the last step.

    Args:
        config: the resolved configuration.
        resume: None starts anew, "auto" continues from the newest good checkpoint if there is one; a step or
            a folder continues from exactly that one.

    Raises UserError for anything about the configuration, data or checkpoint that cannot be used.
    """

    # Where the inputs come from; a throughput benchmark replaces them with stand-ins.
    open_source = staticmethod(open_source)
    open_autoencoder = staticmethod(open_autoencoder)
    open_text_tower = staticmethod(open_text_tower)

    def __init__(self, config: Config, resume: str | None = None) -> None:
        self.config = config
        self.output = Path(config.run.output_dir)
        self.device = distributed.choose_device(config.run.device)
        distributed.initialize(self.device)
        self.stage = zero.zero_stage(config)
        self.accumulate = zero.accumulation_steps(config)
        zero.deepspeed_config(config)
        seed, compute = config.run.seed, DTYPES[config.precision.compute]

        self.source = self.open_source(config.data)
        make_output(self.output)
        self.data_digest = fingerprint(self.source)
        reader, messages = self._find_checkpoint(resume)
        self.step, self.samples, self.skipped, updates = 0, 0, 0, 0
        if reader is not None:
            saved = reader.meta
            self.step, self.samples = saved["step"], saved["samples"]
            self.skipped, updates = saved["skipped"], saved["updates"]
            if saved["data"] != self.data_digest:
                messages.append(
                    "warning: the data set is not the checkpoint's; from here on its order differs"
                )
            changed = differences(saved["config"], config.model_dump(mode="json"))
            if changed:
                messages.append(f"warning: changed since the checkpoint: {', '.join(changed)}")

        autoencoder = self.open_autoencoder(config.conditioning.autoencoder, self.device)
        if autoencoder.channels != config.model.in_channels:
            raise UserError(
                f"model.in_channels is {config.model.in_channels}, but {autoencoder.identity} has "
                f"{autoencoder.channels} channels"
            )
        tight = check_fits(config, self.stage, distributed.world_size(), autoencoder.factor, self.device)
        messages += [tight] if tight else []
        require_grid(config, autoencoder.factor * config.model.patch_size)
        text = config.conditioning.text
        text_tower = self.open_text_tower(text, config.model.context_dim, self.device, compute)

        denoiser = Denoiser(config.model, config.routing)
        if reader is not None:
            state.load_weights(denoiser, reader, str(reader.folder))
        else:
            denoiser.init_weights(seed)
            if config.run.init_from:
                messages += start_from(denoiser, config.run.init_from)
        denoiser.to(self.device, DTYPES[config.precision.master])
        denoiser.checkpoint_activations(config.run.activation_checkpointing, reentrant=self.stage == 3)
        if config.run.compile:
            for block in denoiser.blocks:
                block.compile()
        self.named_shapes = [(name, tuple(p.shape)) for name, p in denoiser.named_parameters()]

        self.optimizer = build_optimizer(denoiser.parameters(), config.optimizer, self.device)
        self.engine, wrapped = zero.initialize_engine(config, denoiser, self.optimizer)
        self.denoiser = denoiser
        self.shards = local_shards(denoiser, wrapped, self.stage)
        self.ema = EmaWeights(config.ema, self.shards) if config.ema.enabled else None
        if reader is not None:
            state.load_optimizer(self.shards, self.optimizer, reader, updates)
            if self.ema is not None:
                state.load_ema(self.shards, self.ema, reader)
        require_masters(self.denoiser, self.shards, self.optimizer.state, config.precision)

        self.flow = FlowMatching(config.objective, seed)
        self.routing = routing_policy(config)
        patch = config.model.patch_size
        self.prepare = Preparation(autoencoder, text_tower, denoiser.layouts, patch, seed, self.device)
        self.stream = SampleStream(
            self.source,
            config.data,
            seed=seed,
            patch=patch * autoencoder.factor,
            caption_drop=config.conditioning.caption_drop,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            first_sample=self.samples,
        )

        self.losses = LossBuffer(config.logging.every_steps, self.device)
        self.records: list[dict[str, Any]] = []
        self.saved_at = self.step if reader is not None else -1
        self.bad_in_row = 0
        self.stop = StopRequests(self.output)
        self.log = RunLog(config, self.output, self.step)
        self._introduce(messages)

    def train(self) -> None:
        """Train to `run.steps`, or until asked to stop; either way the last state is in a checkpoint."""
        config = self.config
        gc.collect()
        gc.freeze()
        try:
            while self.step < config.run.steps:
                self.train_step()
                last, every = self.step == config.run.steps, config.sampling.every_steps
                if every and (last or self.step % every == 0):
                    self.sample_grid()
                request = self.stop.poll()
                if request.stop:
                    self.save()
                    self.log.say(f"stopped at step {self.step} ({request.stop}); continue with --resume auto")
                    return
                if request.save or self.step % config.checkpoint.every_steps == 0:
                    self.save()
            self.save()
            self.log.say(f"finished: {self.step} steps, {self.samples} samples, {self.skipped} steps skipped")
            bad = sorted({key for keys in distributed.gather_objects(list(self.stream.bad)) for key in keys})
            if bad:
                self.log.say(f"unreadable pictures passed over: {len(bad)} ({', '.join(bad)})")
        finally:
            self.stream.close()
            self.log.close()

    def train_step(self) -> None:
        """One optimizer step over the global batch."""
        started = time.perf_counter()
        lr = learning_rate(self.step, self.config.optimizer.lr, self.config.schedule, self.config.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seen: list[tuple[list[str], Tensor]] = []
        flops = 0.0
        for _ in range(self.accumulate - 1):
            flops += self._micro_batch(seen)
            self.engine.step()
        flops += self._micro_batch(seen)
        norm, applied = self._update()

        self.step += 1
        self.samples += self.config.data.global_batch
        if applied:
            self.bad_in_row = 0
            if self.ema is not None:
                self.ema.update(self.step)
        self._record(lr, norm, applied, time.perf_counter() - started, flops)
        if not applied:
            self._report_bad(seen)

    def _micro_batch(self, seen: list[tuple[list[str], Tensor]]) -> float:
        """Forward and backward of one micro-batch; returns its model FLOPs."""
        batch = self.next_batch()
        per_sample, t = self.sample_losses(batch)
        self.engine.backward(per_sample.mean())
        self.losses.add(per_sample, t)
        seen.append((batch.keys, per_sample.detach()))
        text_tokens = len(batch.text) / len(batch.keys)
        return sum(training_flops(self.config, n, text_tokens) for n in batch.layout.lengths)

    def next_batch(self) -> Prepared:
        """The next micro-batch of this process, encoded and packed."""
        return self.prepare(next(self.stream))

    def sample_losses(self, batch: Prepared) -> tuple[Tensor, Tensor]:
        """Losses (B,) of the batch's samples, and their times (B,)."""
        layout, index = batch.layout, batch.sample_index
        t = self.flow.time(index)
        noisy, noise = self.flow.noisy(batch.clean, index, t, layout)
        span = self.routing.draw(layout, self.config.run.seed, index)
        (prediction,) = self.engine(noisy, t, batch.text, layout, span)
        return self.flow.loss(prediction, batch.clean, noise, t, layout), t

    def _update(self) -> tuple[float, bool]:
        """Clip and apply the reduced gradients, unless they are not finite: (their norm, whether applied).

        ZeRO 1 to 3 do this themselves. At stage 0 DeepSpeed would apply NaN, so the norm is taken here.
        """
        if self.stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()
        gradients = [p.grad for p in self.denoiser.parameters() if p.grad is not None]
        norm = float(zero.global_norm(gradients))
        clip = self.config.optimizer.clip
        if clip and norm > clip:
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        self.optimizer.skip = not math.isfinite(norm)
        self.engine.step()
        return norm, not self.optimizer.skip

    def _record(self, lr: float, norm: float, applied: bool, seconds: float, flops: float) -> None:
        """Keep the step's numbers; write them when the device's loss buffer is full."""
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        record = {
            "step": self.step,
            "lr": lr,
            "grad_norm": norm,
            "applied": applied,
            "step_seconds": seconds,
            "images_per_second": self.config.data.global_batch / seconds,
            "captions_cut": self.prepare.text_tower.truncated,
        }
        if peak is not None:
            record["mfu"] = flops / seconds / peak
        self.records.append(record)
        if self.losses.end_step() or not applied:
            self._flush()

    def _flush(self) -> None:
        if self.losses.filled:
            for record, loss in zip(self.records, self.losses.flush(), strict=True):
                record["loss"], record["loss_by_time"] = loss.loss, loss.by_time
        self.log.records(self.records)
        self.records = []

    def _report_bad(self, seen: list[tuple[list[str], Tensor]]) -> None:
        """Name the samples of a skipped step, and give up after too many in a row."""
        self.skipped += 1
        self.bad_in_row += 1
        bad = [
            key
            for keys, losses in seen
            for key, loss in zip(keys, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        bad = [key for keys in distributed.gather_objects(bad) for key in keys]
        among = ", ".join(bad) if bad else "none: the loss was finite, the gradient was not"
        self.log.say(
            f"step {self.step} skipped, weights unchanged; samples with a loss that is not finite: {among}"
        )
        if self.bad_in_row >= self.config.run.max_bad_steps:
            self.save()
            raise UserError(
                f"stopped: {self.bad_in_row} steps in a row up to step {self.step} had no finite loss or "
                f"gradient (run.max_bad_steps); the last samples: {among}"
            )

    def save(self) -> None:
        """Publish a checkpoint of the current state, unless this step has one."""
        self._flush()
        if self.saved_at == self.step:
            return
        meta = {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skipped,
            "updates": state.optimizer_steps(self.shards, self.optimizer),
            "text_tower": self.prepare.text_tower.identity,
            "autoencoder": self.prepare.autoencoder.identity,
            "data": self.data_digest,
            "config": self.config.model_dump(mode="json"),
        }
        folder = save_checkpoint(
            self.output / "checkpoints",
            self.step,
            state.state_pieces(self.shards, self.optimizer, self.ema, self.denoiser.named_buffers()),
            meta,
            keep=self.config.checkpoint.keep,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            all_ok=distributed.all_ranks,
        )
        self.saved_at = self.step
        self.log.say(f"saved {folder}")

    def _find_checkpoint(self, resume: str | None) -> tuple[CheckpointReader | None, list[str]]:
        if resume is None:
            if list_checkpoints(self.output / "checkpoints"):
                raise UserError(
                    f"{self.output} already holds a run; continue it with --resume auto, or choose another "
                    "run.output_dir"
                )
            return None, []
        return resume_checkpoint(
            self.output / "checkpoints",
            resume,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            all_ok=distributed.all_ranks,
        )

    def sample_grid(self) -> None:
        """Write a grid of pictures for `sampling.prompts`. Collective: gathers the weights; rank 0 draws."""
        config = self.config
        use_ema = self.ema is not None and config.sampling.weights != "model"
        source = self.ema.of if use_ema else _itself
        weights = gather_parameters(self.named_shapes, self.shards, self.stage, source)
        if distributed.rank() != 0:
            for _ in weights:
                pass
            return
        with torch.device(self.device):
            copy = Denoiser(config.model, config.routing)
        copy.load_state_dict(dict(weights) | dict(self.denoiser.named_buffers()))
        sampler = Sampler(
            copy.eval().requires_grad_(False),
            self.flow,
            self.prepare.autoencoder,
            self.prepare.text_tower,
            self.device,
            DTYPES[config.precision.compute],
        )
        prompts = list(config.sampling.prompts) or [
            self.source.captions(i).long for i in range(min(config.sampling.count, len(self.source)))
        ]
        size = (config.data.resolution, config.data.resolution)
        pictures = sampler(prompts, size, config.sampling, config.run.seed)
        path = self.output / "samples" / f"step-{self.step:08d}.png"
        save_grid(pictures, path)
        replace_text(path.parent / "prompts.txt", "\n".join(prompts) + "\n")
        self.log.grid(path, self.step)

    def _introduce(self, messages: list[str]) -> None:
        """Save the resolved configuration and say what was built."""
        config = self.config
        if distributed.rank() == 0:
            replace_text(self.output / "config.json", config.model_dump_json(indent=2) + "\n")
        parameters = sum(torch.Size(shape).numel() for _, shape in self.named_shapes)
        lines = [
            *messages,
            f"model: {parameters:,} parameters, width {config.model.width}, depth {config.model.depth}",
            f"data: {len(self.source)} pictures ({config.data.source}); "
            f"text: {self.prepare.text_tower.identity}; pictures as {self.prepare.autoencoder.identity}",
            f"job: {distributed.world_size()} process(es) on {self.device.type}, ZeRO {self.stage}, "
            f"{self.accumulate} x {config.data.micro_batch} samples per process and step",
            describe(config),
        ]
        lines.append("precision audit:")
        rows = audit(self.denoiser, self.shards, self.optimizer.state, self.ema, config.precision)
        lines += [f"  {what:<32} {dtypes}" for what, dtypes in rows]
        if self.step:
            lines.append(f"resumed at step {self.step}, sample {self.samples}")
        for line in lines:
            self.log.say(line)


def _itself(master: Tensor) -> Tensor:
    return master
