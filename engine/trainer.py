"""Training loop, on one page.

Batch ──batch encoder──▶ EncodedBatch ──flow──▶ noisy tokens, t ──training model (+ span)──▶ Outputs
  ──loss_fn──▶ terms per sample ──DeepSpeed: backward, reduce, step──▶ EMA, log, checkpoint, samples
"""

import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from millrace.engine.checkpoint import train_state
from millrace.engine.checkpoint.background_saves import BackgroundSaves, room_for_copies
from millrace.engine.checkpoint.checkpoints import (
    CheckpointNotWritten,
    CheckpointReader,
    find_start,
)
from millrace.engine.checkpoint.damage import RECORD, DamagedState, record_damage, total
from millrace.engine.checkpoint.meta_format import stamp
from millrace.engine.checkpoint.weight_formats import start_from
from millrace.engine.checkpoint.weight_meaning import differing_meaning
from millrace.engine.config import Config, Data
from millrace.engine.config.loading import differences
from millrace.engine.config.stages import resolve_stages, stage_at, values_at
from millrace.engine.data import SampleStream, fingerprint, open_source
from millrace.engine.data.lasting_stream import LastingStream
from millrace.engine.data.sample_choices import single_caption_warnings
from millrace.engine.data.sources.held_out_split import Split, split
from millrace.engine.data.sources.open_source import Opened
from millrace.engine.distributed import deepspeed_engine, process_group
from millrace.engine.distributed.precision_audit import audit, require_masters
from millrace.engine.distributed.release import collect_memory, release_engine
from millrace.engine.distributed.signals import DataNeverCame, Request, StopRequests
from millrace.engine.distributed.watchdog import Watchdog
from millrace.engine.distributed.zero_shards import frozen_shards, gather_parameters, local_shards
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.batch_encoder import BatchEncoder, EncodedBatch
from millrace.engine.encoders.frozen_networks import Frozen, open_frozen
from millrace.engine.encoders.prefetch import BatchPrefetcher
from millrace.engine.encoders.teacher import Teacher, teacher_of
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.evaluation.run_samples import Due, RunSamples
from millrace.engine.losses.contrastive import MeanTarget, require_partners
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.losses.loss_term import LossInputs
from millrace.engine.losses.total import build_loss
from millrace.engine.losses.training_model import TrainingModel
from millrace.engine.model.adapters import add_adapter, is_factor, merged
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import training_flops
from millrace.engine.model.fp8 import use_fp8
from millrace.engine.model.freezing import describe_frozen, freeze, store_frozen
from millrace.engine.model.routing import require_grid, routing_policy
from millrace.engine.model.working_weights import WorkingWeights, has_working_weights
from millrace.engine.optim.build_optimizer import build_optimizer, describe_optimizer, set_learning_rates
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.optim.optimizer_step import OptimizerStep
from millrace.engine.optim.training_optimizer import HEADS
from millrace.engine.planning.automatic import settle_run
from millrace.engine.planning.fit_check import check_fits
from millrace.engine.run_log.logs import RunLog, make_output
from millrace.engine.run_log.loss_buffer import LossBuffer
from millrace.engine.run_log.owned_run import owned_run
from millrace.engine.run_log.sample_log import REJECTS, SampleLog
from millrace.engine.run_log.startup import introduction
from millrace.engine.sampling.grids import grid_prompts
from millrace.engine.util.data_sheets import peak_flops
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

if TYPE_CHECKING:  # an ordinary run imports nothing of repa_e
    from millrace.engine.repa_e.tuner import RepaE

_BAD_SHOWN = 20
"""Keys of unreadable pictures that the last line of a run names."""


def train(
    config: Config, resume: str | None = None, make: Callable[[Config, str | None], "Trainer"] | None = None
) -> None:
    """Train a run through all its stages, or until it is asked to stop; `make` builds a Trainer for each.

    From before the first stage to the end of the last the folder has this one owner, and signals are heard.
    """
    make = make or Trainer
    process_group.join(config.run.device)
    requests = StopRequests(Path(config.run.output_dir))
    watchdog = Watchdog(requests.while_stalled)
    with owned_run(config, resume is not None) as failures, requests, watchdog:
        try:
            current = make(config, resume)
            while current.train(requests, watchdog):
                step, config = str(current.step), current.run_config  # settled: nothing is chosen twice
                watchdog.enter(current.step, "start")
                current.release()
                del current  # before the next one measures what is free, and allocates
                collect_memory()
                current = make(config, step)
            current.release()
        except Exception as error:
            failures.note(watchdog.place(), error)
            raise
        failures.forget()


class Seen(NamedTuple):
    """What is kept of a micro-batch until its step ends."""

    keys: list[str]
    which: list[str]
    """Its captions: long, short or empty."""
    losses: Tensor


class Trainer:
    """One stage of a training run: builds its parts in order, resumes, and trains to the stage's last step.

    Which stage it is follows from the step of the checkpoint that it resumes from.

    Args:
        config: the resolved configuration of the whole run.
        resume: None starts anew, "auto" continues from the newest good checkpoint if there is one; a step or
            a folder continues from exactly that one.

    Raises UserError for anything about the configuration, data or checkpoint that cannot be used.
    """

    # Where the inputs come from, and whether people see the steps; a throughput benchmark replaces these.
    open_source = staticmethod(open_source)
    open_autoencoder = staticmethod(open_autoencoder)
    open_text_encoder = staticmethod(open_text_encoder)
    open_teacher = staticmethod(teacher_of)
    shows_steps = True

    def __init__(self, config: Config, resume: str | None = None) -> None:
        self.output = Path(config.run.output_dir)
        self.device = process_group.join(config.run.device)
        self.stop_requests, self.watchdog = StopRequests(self.output), Watchdog()
        resolve_stages(config)  # refuses what is not well formed, before a folder is made
        make_output(self.output)
        reader, messages = find_start(self.output, resume)
        self.run_config, chosen = settle_run(config, self.device, reader)
        messages += chosen
        self.stages = resolve_stages(self.run_config)
        for stage in self.stages:  # what only a later stage would meet is refused now
            deepspeed_engine.accumulation_steps(stage.config)
            deepspeed_engine.deepspeed_config(stage.config)
            require_partners(stage.config)
        data_sets = process_group.leaders_first(self._open_data)  # the others map what a leader has indexed
        self._choose_stage(reader)
        data = data_sets[self.config.data]
        self.source = data.train
        messages += self._load_counters(reader)
        messages += self._caption_warnings()
        frozen = process_group.leaders_first(
            lambda: open_frozen(
                self.config, self.source, self.device, self.open_autoencoder, self.open_text_encoder
            )
        )
        messages += self._check_size(frozen.autoencoder.factor)
        # A cache of the teacher's features knows pictures by their names.
        seen = self.data_digest + (", whole pictures" if self.config.data.crop == "none" else "")
        teacher = process_group.leaders_first(
            lambda: self.open_teacher(self.config.alignment, self.device, seen)
        )
        messages += self._build_model(reader, teacher.dim if teacher else 0)
        messages += self._build_optimizer(reader)
        process_group.leaders_first(lambda: self._build_loss(frozen.autoencoder.factor))
        self._build_batches(frozen, teacher)
        self.repa_e = self._open_repa_e(reader)

        self.saved_at = self.step if reader is not None else -1
        self.sound_at, self.failed_saves = self.step, 0
        messages += self._open_saves()
        self._open_logs(messages + self._describe(frozen.lines))
        # Of the run's first data, so that grids of all stages show the same.
        prompts = grid_prompts(self.config.sampling, data_sets[self.stages[0].config.data].train)
        self.run_samples = RunSamples(
            self.stage, self.flow, self.batch_encoder, data, self.output, self.run_log, prompts
        )

    def _open_data(self) -> dict[Data, Split]:
        """The data of each stage; all are opened now, so that a later one fails before the run begins."""
        opened: Opened = {}
        return {
            config.data: split(self.open_source(config.data, opened), config.validation, config.data)
            for config in {stage.config.data: stage.config for stage in self.stages}.values()
        }

    def _choose_stage(self, reader: CheckpointReader | None) -> None:
        """Take the stage that the checkpoint's step lies in; from here on `config` is the stage's."""
        self.step = 0 if reader is None else reader.meta["step"]
        self.stage = stage_at(self.stages, self.step)
        self.stage_begins = self.stage.number > 0 and self.step == self.stage.first
        self.config = self.stage.config
        self.zero_stage = deepspeed_engine.zero_stage(self.config)
        self.accumulate = deepspeed_engine.accumulation_steps(self.config)

    def _load_counters(self, reader: CheckpointReader | None) -> list[str]:
        """Counters of the run so far; lines about what differs from the checkpoint."""
        self.data_digest = fingerprint(self.source)
        self.samples_seen, self.skipped, self.updates = 0, 0, 0
        self.bad_in_row, self.told_of_cuts = 0, False
        if reader is None:
            return []
        saved, messages = reader.meta, []
        self._require_same_fusion(reader)
        if reader.written_by != (ours := stamp()["millrace"]):
            messages.append(f"the checkpoint was written by millrace {reader.written_by}, this is {ours}")
        self.samples_seen, self.skipped, self.updates = saved["samples"], saved["skipped"], saved["updates"]
        if saved["data"] != self.data_digest and self.step > self.stage.data_step:
            messages.append("warning: the data set is not the checkpoint's; from here on its order differs")
        if changed := differences(saved["config"], self.run_config.model_dump(mode="json")):
            messages.append(f"warning: changed since the checkpoint: {', '.join(changed)}")
        return messages

    def _require_same_fusion(self, reader: CheckpointReader) -> None:
        """Refuse a model with other fusion than the checkpoint's, and name what does what was meant."""
        before = values_at(reader.meta["config"], self.step)[0]["routing"]["policy"]
        now = self.config.routing.policy
        if (before == "sprint") == (now == "sprint"):
            return
        instead = (
            "set routing.drop to 0 to train on all tokens"
            if before == "sprint"
            else "start another run with run.init_from"
        )
        raise UserError(
            f"{reader.folder} was trained with routing.policy {before}, not {now}, and sprint's fusion layer "
            f"is part of the model; {instead}"
        )

    def _caption_warnings(self) -> list[str]:
        """A line where the run says which captions it wants, and the pictures have not both."""
        wanted = {stage.config.data.long_caption for stage in self.stages}
        if wanted == {Data.model_fields["long_caption"].default}:
            return []
        return single_caption_warnings(self.config.data, self.source)

    def _check_size(self, factor: int) -> list[str]:
        """Refuse what cannot fit, before anything large is allocated; a line where it is close."""
        require_grid(self.config, factor * self.config.model.patch_size)
        tight = check_fits(self.config, self.zero_stage, process_group.world_size(), factor, self.device)
        return [tight] if tight else []

    def _build_model(self, reader: CheckpointReader | None, teacher_dim: int) -> list[str]:
        """The denoiser and the heads of its losses, with the weights that the run begins or goes on with."""
        config, messages = self.config, []
        self.denoiser = Denoiser(config.model, config.routing)
        self.model = TrainingModel(self.denoiser, config.alignment, teacher_dim)
        # A stage may begin with parameters of its own, and a loss with a head at any step.
        if reader is None or self.stage_begins or train_state.lacks_heads(self.model, reader):
            self.init_weights(config.run.seed)
        self.model.to(self.device)
        if reader is None and config.run.init_from:
            heads = [name for name, _ in self.model.named_parameters() if name.startswith(HEADS)]
            messages += start_from(self.denoiser, config.run.init_from, heads)
            messages += differing_meaning(config.run.init_from, config)
        add_adapter(self.denoiser, config.adapter, config.run.seed)
        freeze(self.model, config)
        if reader is not None:
            messages += train_state.load_weights(self.model, reader, str(reader.folder), self.stage_begins)
        self.model.to(getattr(torch, config.precision.master))
        store_frozen(self.model, getattr(torch, config.precision.compute))
        use_fp8(self.denoiser, config.precision.fp8, self.device)
        self.working_weights = None
        if has_working_weights(config.precision, self.zero_stage):
            self.working_weights = WorkingWeights(self.model, getattr(torch, config.precision.compute))
        # ZeRO-3 frees a block's weights after its forward; only reentrant recomputation fetches them again.
        self.denoiser.checkpoint_activations(
            config.run.activation_checkpointing, reentrant=self.zero_stage == 3
        )
        if config.run.compile:
            for block in self.denoiser.blocks:
                block.compile()  # one by one: all blocks share one graph, and compile once
        # Taken before DeepSpeed: at stage 3 parameters lose their shapes.
        self.named_shapes = [(name, tuple(p.shape)) for name, p in self.model.named_parameters()]
        return messages

    def _build_optimizer(self, reader: CheckpointReader | None) -> list[str]:
        """Optimizer, DeepSpeed engine and EMA, with the state of the checkpoint."""
        config, messages = self.config, []
        self.optimizer = build_optimizer(
            self.model.named_parameters(), config.optimizer, self.device, config.model
        )
        self.engine, wrapped = deepspeed_engine.initialize_engine(config, self.model, self.optimizer)
        self.shards = local_shards(self.model, wrapped, self.zero_stage)
        self.frozen = frozen_shards(self.model)
        self.optimizer.attach(self.shards, self.zero_stage)
        self.optimizer_step = OptimizerStep(
            self.engine, wrapped, self.optimizer, self.model, self.zero_stage, config.optimizer.clip
        )
        # Averages of the masters, which DeepSpeed has just made.
        self.ema = EmaWeights(config.ema, self.shards) if config.ema.enabled else None
        if reader is not None:
            messages += train_state.load_optimizer(
                self.shards, self.optimizer, reader, self.updates, self.stage_begins
            )
            if self.ema is not None:
                train_state.load_ema(self.shards, self.ema, reader)
        if self.working_weights is not None:
            self.working_weights.refresh()
        require_masters(
            self.model, self.shards, self.optimizer.state, config.precision, self.optimizer.quantized
        )
        return messages

    def _build_loss(self, factor: int) -> None:
        """Flow matching, the loss's terms and the routing; `factor` is pixels per latent position."""
        config = self.config
        self.flow = FlowMatching(config.objective, config.run.seed, config.model.patch_size * factor)
        self.loss_fn = build_loss(config, self.flow, self.device)
        self.loss_buffer = LossBuffer(config.logging.every_steps, self.device, self.loss_fn.names)
        self.routing = routing_policy(config)
        if config.sampling.every_steps and config.sampling.contrastive:
            MeanTarget.load(config.sampling.mean_target)  # so that a bad file is refused now, not at a grid

    def _build_batches(self, frozen: Frozen, teacher: Teacher | None) -> None:
        """The stream of samples, and what encodes them."""
        config, patch = self.config, self.config.model.patch_size
        self.batch_encoder = BatchEncoder(
            frozen.autoencoder,
            frozen.text_encoder,
            self.denoiser.layouts,
            patch,
            config.run.seed,
            self.device,
            self.loss_fn.needs_images,
            teacher,
        )
        self.batches = BatchPrefetcher(self.batch_encoder, None if config.conditioning.overlap else False)
        self.stream = SampleStream(
            self.source,
            config.data,
            seed=config.run.seed,
            patch=patch * frozen.autoencoder.factor,
            caption_drop=config.conditioning.caption_drop,
            rank=process_group.rank(),
            world_size=process_group.world_size(),
            first_sample=self.samples_seen,
            origin=(self.stage.data_sample, self.stage.data_step),
            caches=frozen.caches,
            device=self.device,
        )
        self.lasting = LastingStream(self.stream)

    def _open_repa_e(self, reader: CheckpointReader | None) -> "RepaE | None":
        """What tunes the autoencoder, where the run does."""
        tuned = self.config.conditioning.autoencoder.tuning.enabled
        if reader is not None:
            train_state.require_same_autoencoder(reader, tuned)
        if not tuned:
            return None
        from millrace.engine.repa_e.tuner import open_repa_e

        return open_repa_e(
            self.config, self.batch_encoder, self.model, self.flow, self.accumulate, self.source, reader
        )

    def _open_saves(self) -> list[str]:
        """What writes checkpoints; a line where training will wait for it though it need not."""
        section, messages = self.config.checkpoint, []
        blocking = section.blocking
        if not blocking:
            need = train_state.written_bytes(self.shards, self.optimizer, self.ema, self.frozen)
            messages = room_for_copies(need)
            blocking = bool(messages)
        self.saves = BackgroundSaves(self.output / "checkpoints", section.keep, blocking)
        return messages

    def _open_logs(self, messages: list[str]) -> None:
        """The files of the run's folder; then the lines that people read at the start."""
        self.records: list[dict[str, Any]] = []
        self.run_log = RunLog(self.config, self.output, self.step, self.shows_steps)
        channels = self.run_log.channels
        self.sample_log = SampleLog(self.output, self.step, self.config.logging.sample_keys, channels)
        if process_group.rank() == 0:
            with channels.tolerate("config.json"):
                text = self.run_config.model_dump_json(indent=2) + "\n"
                write_atomically(self.output / "config.json", text)
        for line in messages:
            self.run_log.say(line)

    def _describe(self, frozen_lines: list[str]) -> list[str]:
        """Lines about what was built."""
        averages = [] if self.ema is None else self.ema.tensors
        copies = [] if self.working_weights is None else self.working_weights.copies
        rows = audit(
            self.model,
            self.shards,
            self.optimizer.state,
            averages,
            self.config.precision,
            copies,
            self.optimizer.storage,
        )
        lines = introduction(
            self.stages, self.stage, self.named_shapes, self.source, self.batch_encoder, rows
        )
        lines += describe_optimizer(self.named_shapes, self.optimizer)
        lines += describe_frozen(self.frozen, self.config)
        lines += [f"loader: {self.stream.loader}", *frozen_lines]
        lines += self.repa_e.describe() if self.repa_e is not None else []
        if self.step > self.stage.first:
            lines.append(f"resumed at step {self.step}, sample {self.samples_seen}")
        return lines

    def init_weights(self, seed: int) -> None:
        """Fill the weights of a run that begins."""
        self.model.init_weights(seed)

    def train(self, requests: StopRequests | None = None, watchdog: Watchdog | None = None) -> bool:
        """Train to the end of the stage, or until asked to stop; either way with a checkpoint of the end.

        `requests` and `watchdog` are those of all stages; without them no signal is heard. Returns whether
        another stage follows.
        """
        config = self.config
        self.stop_requests = requests = requests or self.stop_requests
        self.watchdog = watchdog or self.watchdog
        self.lasting.waiting = requests.waiting_for_data
        # What lives now lives to the end of the stage: the collector need not look through it in every step.
        gc.collect()
        gc.freeze()
        try:
            if self._stopped(requests.poll(now=True)):  # asked while the stage was built
                return False
            # A run that was stopped or killed between a save and its samples left them to this one.
            if self.step > self.stage.first and any(lacking := self.run_samples.lacking(self.step)):
                self._make_samples(lacking)
            while self.step < self.stage.last:
                if not self.train_step():  # the data did not come, and a rank was asked to stop
                    return not self._stopped(requests.poll(now=True))
                ended = self.step == self.stage.last
                request = Request(save=True, stop=None) if ended else requests.poll(saved=self.saves.ended)
                if request.saved:
                    self._finish_save()
                if request.save or request.stop or self.step % config.checkpoint.every_steps == 0:
                    self.save(final=bool(request.stop) or ended)
                if self._stopped(request):
                    return False
                # After the save: what goes wrong with samples costs no steps.
                if self.run_samples.due(self.step):
                    self._make_samples()
                    if not ended and self._stopped(requests.poll(now=True)):  # they may have taken long
                        return False
            self.save(final=True)
            bad = sorted(
                {key for keys in process_group.gather_objects(list(self.stream.bad)) for key in keys}
            )
            if bad:
                shown = ", ".join(bad[:_BAD_SHOWN])
                more = f", and {len(bad) - _BAD_SHOWN} more in {REJECTS}" if len(bad) > _BAD_SHOWN else ""
                self.run_log.say(f"unreadable pictures passed over: {len(bad)} ({shown}{more})")
            if self.stage.last < config.run.steps:
                return not self._stopped(requests.poll(now=True))
            self.run_log.say(
                f"finished: {self.step} steps, {self.samples_seen} samples, {self.skipped} steps skipped"
            )
            return False
        except DataNeverCame:
            return self._stopped_without_data()
        finally:
            if not isinstance(sys.exception(), KeyboardInterrupt):  # who insists does not wait for the disk
                self.saves.close(self.run_log.say)
            self.sample_log.reject(self.stream.bad)
            self.sample_log.close()
            self.stream.close()
            self.run_log.close()

    def _stopped(self, request: Request) -> bool:
        """Whether the run was asked to stop; then it is saved, unless nothing was trained."""
        if not request.stop:
            return False
        if self.step > 0:
            self.save(final=True)
        self.run_log.say(f"stopped at step {self.step} ({request.stop}); continue with --resume auto")
        return True

    def _stopped_without_data(self) -> bool:
        """Asked to stop while the first micro-batch of the stage does not come."""
        if process_group.world_size() == 1:
            return not self._stopped(Request(save=True, stop=self.stop_requests.reason))
        raise UserError(
            f"stopped ({self.stop_requests.reason}) while rank {process_group.rank()} waited for the data of "
            f"step {self.step + 1}; the other ranks cannot save without it, continue with --resume auto"
        )

    def _make_samples(self, what: Due | None = None) -> None:
        """Grid, evaluation and held-out loss that are due, or those of `what`. Collective."""
        self.watchdog.enter(self.step, "samples")
        self._flush()
        self.batches.settle()
        self.run_samples.make(self.step, self.samples_seen, self.gathered, what)

    def train_step(self) -> bool:
        """One optimizer step over the global batch.

        Returns whether it was taken: not where a rank was asked to stop while its data did not come.
        """
        started = time.perf_counter()
        begun, end = self.stage.schedule_step, self.stage.schedule_end
        rates = set_learning_rates(self.optimizer, self.step - begun, self.config.schedule, end - begun)
        seen: list[Seen] = []
        flops = 0.0
        for _ in range(self.accumulate - 1):
            flops += self._micro_batch(seen)
            self.engine.step()  # counts a micro-batch; DeepSpeed updates nothing before the last one
        flops += self._micro_batch(seen, last=self.step + 1 == self.stage.last)
        self.watchdog.enter(self.step, "update")
        norm, applied = self.optimizer_step.apply()
        # Before anything counts the step: it is taken again when there are data.
        if not applied and self._data_ended():
            return False
        if applied and self.working_weights is not None:
            self.working_weights.refresh()
        if self.repa_e is not None:
            self.repa_e.finish(applied, self.step - begun, end - begun)

        self.step += 1
        self.samples_seen += self.config.data.global_batch
        if applied:
            self.bad_in_row = 0
            if self.ema is not None:
                self.ema.update(self.step)
        keys, captions = ([name for part in seen for name in part[i]] for i in (0, 1))
        self.sample_log.step(self.step, keys, captions, self.stream.bad)
        self._record(rates, norm, applied, time.perf_counter() - started, flops)
        if not applied:
            self._report_bad(seen)
        if self.step % self.config.logging.every_steps == 0:
            self._stop_for([self.stream.too_many_bad()])
        return True

    def _micro_batch(self, seen: list[Seen], last: bool = False) -> float:
        """Forward and backward of one micro-batch, maybe the stage's `last`; returns its model FLOPs."""
        self.watchdog.enter(self.step, "data")
        batch = self.next_batch()
        self.watchdog.enter(self.step, "compute")
        if self.lasting.ended:  # spoilt, so that all ranks skip the step
            batch = replace(batch, clean=torch.full_like(batch.clean, math.nan))
        terms, t = self.sample_losses(batch)
        per_sample = sum(terms.values())
        # The mean over samples: a batch of mixed sizes weighs the same however it is cut.
        self.engine.backward(per_sample.mean() * self.optimizer_step.loss_factor)
        if not last:  # the stage's last would take a micro-batch that nobody trains on
            self.look_ahead()
        self.loss_buffer.add(terms, t, batch.captions_cut)
        seen.append(Seen(batch.keys, batch.which, per_sample.detach()))
        text_tokens = len(batch.text) / len(batch.keys)
        return sum(training_flops(self.config, n, text_tokens) for n in batch.layout.lengths)

    def next_batch(self) -> EncodedBatch:
        """The next micro-batch of this process, encoded and packed."""
        if self.repa_e is not None:
            return self.repa_e.next_batch(self.lasting, self.step)
        return self.batches.next_batch(self.lasting)

    def look_ahead(self) -> None:
        """Have the micro-batch after this one encoded while the device is busy with this one."""
        if self.repa_e is None:  # which makes the next latents only after this step's update
            self.batches.look_ahead(self.lasting)

    def sample_losses(self, batch: EncodedBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Terms of the loss (B,) of the batch's samples by name, and their times (B,)."""
        layout, index = batch.layout, batch.sample_index
        t = self.flow.time(index)
        noisy, noise = self.flow.noisy(batch.clean, index, t, layout)
        span = self.routing.draw(layout, self.config.run.seed, index)
        outputs = self.engine(noisy, t, batch.text, layout, span)
        return self.loss_fn(LossInputs(outputs, batch, noise, t, span)), t

    def _record(
        self, rates: dict[str, float], norm: float, applied: bool, seconds: float, flops: float
    ) -> None:
        """Keep the step's numbers; write them when the device's loss buffer is full."""
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        record = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            **rates,
            "grad_norm": norm,
            "applied": applied,
            "step_seconds": seconds,
            "images_per_second": self.config.data.global_batch / seconds,
        }
        if len(self.stages) > 1:
            record["stage"] = self.stage.name
        if given := self.stream.given(self.samples_seen):
            record["parts"] = given
        if peak is not None:
            record["mfu"] = flops / seconds / peak
        self.records.append(record)
        self.run_log.advance(record)
        if self.loss_buffer.end_step() or not applied:
            self._flush()

    def _flush(self) -> None:
        if self.loss_buffer.filled:
            losses = self.loss_buffer.flush()
            for record, loss in zip(self.records, losses, strict=True):
                record |= {"loss": loss.loss, "losses": loss.terms, "loss_by_time": loss.by_time}
                record["captions_cut"] = loss.captions_cut
            self._tell_of_cuts(sum(loss.captions_cut for loss in losses), len(losses))
        if self.repa_e is not None:
            self.repa_e.flush(self.records)
        self.run_log.records(self.records)
        self.records = []

    def _tell_of_cuts(self, cut: int, steps: int) -> None:
        """Once a stage: that captions are longer than the text encoder takes."""
        if cut and not self.told_of_cuts:
            self.told_of_cuts = True
            self.run_log.say(
                f"captions: {cut} of {steps * self.config.data.global_batch} are cut to "
                f"conditioning.text.max_tokens {self.config.conditioning.text.max_tokens}"
            )

    def _report_bad(self, seen: list[Seen]) -> None:
        """Name the samples of a skipped step, and give up after too many in a row."""
        self.skipped += 1
        self.bad_in_row += 1
        state = process_group.gather_objects(train_state.bad_state(self.shards, self.optimizer, self.ema))
        if found := total(state):
            self._stop_damaged(DamagedState(found), self.step)
        bad = [
            key
            for part in seen
            for key, loss in zip(part.keys, part.losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        bad = [key for keys in process_group.gather_objects(bad) for key in keys]
        among = ", ".join(bad) if bad else "none: the loss was finite, the gradient was not"
        self.run_log.say(
            f"step {self.step} skipped, weights unchanged; samples with a loss that is not finite: {among}"
        )
        if self.bad_in_row >= self.config.run.max_bad_steps:
            self.save(final=True)
            raise UserError(
                f"stopped: {self.bad_in_row} steps in a row up to step {self.step} had no finite loss or "
                f"gradient (run.max_bad_steps); the last samples: {among}"
            )

    def _data_ended(self) -> bool:
        """Whether the data of any rank have ended: UserError where they failed, True where it was asked to
        stop while it waited for them. Collective."""
        ends = process_group.gather_objects((self.lasting.failure, self.lasting.asked))
        self._stop_for([failure for failure, _ in ends])
        return any(asked for _, asked in ends)

    def _stop_for(self, failures: list[str | None]) -> None:
        """End the run, with a checkpoint, if any rank's data have failed; `failures` are the same on all."""
        if reasons := [reason for reason in failures if reason]:
            self.save(final=True)
            raise UserError(f"stopped after step {self.step}, which is saved: {reasons[0]}")

    def _stop_damaged(self, damage: DamagedState, step: int) -> NoReturn:
        """End the run without a checkpoint: what there is to say of a state that was damaged at `step`, and
        where to go back."""
        self._finish_save()  # an earlier one, which may be the one to go back to
        if process_group.rank() == 0:
            with self.run_log.channels.tolerate(RECORD):
                record_damage(self.output, max(self.saved_at, 0), step, damage)
        back = (
            "start again"
            if self.saved_at < 0
            else f"continue with --resume auto, which goes back to step {self.saved_at}"
        )
        raise UserError(
            f"{damage}; it was sound at step {self.sound_at} and is not at step {step}, so it is not "
            f"saved: {back}. Suspect the device or a kernel if no loss was near overflow"
        ) from damage

    def save(self, final: bool = False) -> None:
        """Begin a checkpoint of the current state, unless this step has one; the `final` one of this process
        is published when it returns.

        Where it cannot be written, the run goes on to the next step that is due, once; not after a `final`.
        """
        self._flush()
        if self.saves.step != self.step:
            self._finish_save()
            if self.saved_at == self.step:
                return
            self.watchdog.enter(self.step, "save")
            pieces = train_state.state_pieces(
                self.shards, self.optimizer, self.ema, self.model.named_buffers(), self.frozen
            )
            tuning = self.repa_e.state_pieces() if self.repa_e is not None else ()
            damage = train_state.bad_state(self.shards, self.optimizer, self.ema, copies=True)
            self.saves.begin(self.step, itertools.chain(pieces, tuning), self._meta(), damage)
        if final or self.saves.blocking:
            self._finish_save(final)

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "step": self.step,
            "samples": self.samples_seen,
            "skipped": self.skipped,
            "updates": train_state.optimizer_steps(self.shards, self.optimizer),
            "text_tower": self.batch_encoder.text_encoder.identity,
            "autoencoder": self.batch_encoder.autoencoder.identity,
            "data": self.data_digest,
            "config": self.run_config.model_dump(mode="json"),
        }

    def _finish_save(self, final: bool = False) -> None:
        """Wait for the save that was begun, if there is one, and take note of it. Collective."""
        step = self.saves.step
        if step is None:
            return
        self.watchdog.enter(self.step, "save")
        try:
            folder = self.saves.finish()
        except DamagedState as damage:
            self._stop_damaged(damage, step)
        except CheckpointNotWritten as failure:
            self.failed_saves += 1
            if final or self.failed_saves > 1:
                raise
            self.run_log.say(
                f"warning: {failure}; tried again at the next step that is due, for the last time"
            )
            return
        self.saved_at = self.sound_at = step
        self.failed_saves = 0
        self.run_log.say(f"saved {folder}")

    def release(self) -> None:
        """Let go of the engine, whose hooks would keep weights and masters in memory."""
        release_engine(self.engine, self.zero_stage)

    def _gathered(
        self, named_shapes: list[tuple[str, tuple[int, ...]]], source: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        return gather_parameters(named_shapes, self.shards, self.zero_stage, source, self.frozen)

    def gathered(self, weights: str) -> Iterator[tuple[str, Tensor]]:
        """Whole weights and buffers of the denoiser, as `sampling.weights` names them. Collective."""
        source = Tensor.detach if self.ema is None else self.ema.source(weights)
        factors = dict(self._gathered([one for one in self.named_shapes if is_factor(one[0])], source))
        own = self._gathered([one for one in self.named_shapes if one[0] not in factors], source)
        yield from merged(own, factors, self.config.adapter.scale)
        yield from self.denoiser.named_buffers()
