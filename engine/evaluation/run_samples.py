"""Samples during training: grids, metrics and held-out loss of the weights at the steps that are due."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.engine.config.evaluation import TITLES, MetricName
from millrace.engine.config.stages import Stage
from millrace.engine.data.sources.held_out_split import Split
from millrace.engine.distributed import process_group
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.evaluation.evaluator import Evaluation
from millrace.engine.evaluation.held_out import HeldOutLoss, exact
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.run_log.logs import RunLog
from millrace.engine.sampling.grids import GridPrompts, draw_grid
from millrace.engine.sampling.sampler import Sampler, filled_denoiser
from millrace.engine.util.errors import UserError

Weights = Iterator[tuple[str, Tensor]]
"""Whole weights by name, one after another."""


class Due(NamedTuple):
    """What is made after a step."""

    grid: bool
    evaluation: bool
    held_out_loss: bool


class RunSamples:
    """What a run makes of its weights, every `sampling.every_steps`, `evaluation.every_steps` and
    `validation.every_steps`.

    Args:
        stage: that is trained.
        flow, prepare, data: of the training; none of their state that training depends on changes.
        output: folder of the run.
        log: gets the grids, the metrics and the losses.
        prompts: of the grids.

    Raises UserError for networks or reference pictures that cannot be used, unless `evaluation.missing` is
    skip; the statistics of reference pictures are made now, before the first step. Collective.
    """

    def __init__(
        self,
        stage: Stage,
        flow: FlowMatching,
        prepare: BatchEncoder,
        data: Split,
        output: Path,
        log: RunLog,
        prompts: GridPrompts,
    ) -> None:
        config = stage.config
        self.stage, self.config, self.flow, self.prepare, self.prompts = stage, config, flow, prepare, prompts
        self.output, self.log = output, log
        self._evaluation: Evaluation | None = None
        self._held_out: HeldOutLoss | None = None
        self._told = False
        if config.evaluation.every_steps:
            edge, missing = config.model.patch_size * prepare.autoencoder.factor, config.evaluation.missing
            evaluation = process_group.leaders_first(
                lambda: Evaluation(config, edge, prepare.device, data.whole, missing=missing)
            )
            evaluation.agree()
            if evaluation.lacking:
                log.say(_without(evaluation))
            if evaluation.networks:
                for line in evaluation.describe():
                    log.say(line)
                evaluation.prepare(log.say)
                self._evaluation = evaluation
        held_out = data.held_out
        if config.validation.every_steps and held_out is not None:  # which the configuration has made sure of
            self._held_out = process_group.leaders_first(lambda: HeldOutLoss(config, held_out, prepare))
            log.say(self._held_out.describe())

    def due(self, step: int) -> bool:
        """Whether anything is to be made after this many steps; the run's last step counts too."""
        return any(self._due(step))

    def lacking(self, step: int) -> Due:
        """What was due at `step` and is not there: the run ended between its save and them. Collective."""
        due = self._due(step)
        found = Due(
            due.grid and not self._path(step).exists(),
            due.evaluation and not self.log.has_evaluation(step),
            due.held_out_loss and not self.log.has_validation(step, self._kinds),
        )
        return process_group.gather_objects(found)[0]

    def make(
        self, step: int, samples_seen: int, weights: Callable[[str], Weights], what: Due | None = None
    ) -> None:
        """Make what is due, or `what` is given. Collective: rank 0 draws a grid, all share the rest.

        `weights` gathers those of a kind (model, ema, or as `sampling.weights`) from all ranks; they are
        freed after use.
        """
        due = self._due(step) if what is None else what
        if due.grid or due.evaluation:
            self._sample(step, weights(self.config.sampling.weights), due)
        if due.held_out_loss:
            self._validate(step, samples_seen, weights)

    def _sample(self, step: int, weights: Weights, due: Due) -> None:
        """Grid and evaluation. A rank that does neither keeps none of the weights."""
        if not due.evaluation and process_group.rank() > 0:
            for _ in weights:  # gathers from all ranks, so each must come to its end
                pass
            return
        sampler = self._sampler(weights)
        if due.grid and process_group.rank() == 0:
            with self.log.channels.tolerate("sample grid"):  # nobody waits for rank 0 here
                self._grid(step, sampler)
        if due.evaluation:
            self._evaluate(step, sampler)

    def _due(self, step: int) -> Due:
        config = self.config
        run_ends, stage_ends = step == config.run.steps, step == self.stage.last

        def now(every: int, ends: bool) -> bool:
            return every > 0 and (ends or step % every == 0)

        evaluates = config.evaluation.every_steps if self._evaluation is not None else 0
        return Due(
            now(config.sampling.every_steps, run_ends),
            now(evaluates, run_ends),
            now(config.validation.every_steps, stage_ends),
        )

    @property
    def _kinds(self) -> list[str]:
        """Weights whose held-out loss is taken."""
        return ["model", "ema"] if self.config.ema.enabled else ["model"]

    @property
    def _sampled_weights(self) -> str:
        """Weights that samples are of."""
        asked = self.config.sampling.weights
        return "model" if not self.config.ema.enabled else "ema" if asked == "auto" else asked

    def _validate(self, step: int, samples_seen: int, weights: Callable[[str], Weights]) -> None:
        assert self._held_out is not None
        told = []
        for kind in self._kinds:
            denoiser = filled_denoiser(exact(self.config), weights(kind), self.prepare.device)
            try:
                scores = self._held_out(denoiser)
            except UserError as error:  # the same on all ranks; training goes on
                self.log.say(f"warning: step {step} has no held-out loss: {error}")
                return
            del denoiser  # before the next one is gathered
            record = {"step": step, "samples_seen": samples_seen, "stage": self.stage.name, "weights": kind}
            record |= {name: getattr(scores, name) for name in ("loss", "by_time", "set", "losses")}
            self.log.validation(record, scores.times)
            told.append(f"{scores.loss:.5f} ({kind}, {scores.seconds:.1f} s)")
        self.log.say(f"step {step}, held-out loss of {len(scores.losses)} pictures: {', '.join(told)}")
        if scores.unreadable and not self._told:
            self._told = True
            key, reason = next(iter(scores.unreadable.items()))
            self.log.say(
                f"warning: {len(scores.unreadable)} held-out pictures cannot be read and do not count; "
                f"{key}: {reason}"
            )

    def _sampler(self, weights: Weights) -> Sampler:
        """Of a denoiser made of `weights`, with the frozen networks of the training."""
        config, device = self.config, self.prepare.device
        return Sampler(
            filled_denoiser(config, weights, device),
            self.flow,
            self.prepare.autoencoder,
            self.prepare.text_encoder,
            device,
            getattr(torch, config.precision.compute),
        )

    def _path(self, step: int) -> Path:
        return self.output / "samples" / f"step-{step:08d}.png"

    def _grid(self, step: int, sampler: Sampler) -> None:
        path = self._path(step)
        origin = f"{self.output}, step {step}, {self._sampled_weights} weights"
        draw_grid(sampler, self.config, self.prompts, path, origin)
        self.log.grid(path, step)

    def _evaluate(self, step: int, sampler: Sampler) -> None:
        assert self._evaluation is not None
        try:
            scores = self._evaluation(sampler)
        except UserError as error:  # the same on all ranks; training goes on
            self.log.say(f"warning: step {step} has no evaluation: {error}")
            return
        weights = self._sampled_weights
        self.log.evaluation(step, scores.record() | {"weights": weights})
        self.log.say(f"step {step}, {weights} weights, {self.config.data.resolution} px: {scores.line()}")


def _without(evaluation: Evaluation) -> str:
    """One line: the metrics that a run trains without, and what each lacks."""
    lacks = dict.fromkeys(f"{reason} ({_titles(metrics)})" for reason, metrics in evaluation.lacking.items())
    metrics = dict.fromkeys(metric for found in evaluation.lacking.values() for metric in found)
    return (
        f"warning: this run computes no {_titles(tuple(metrics))}. Missing: {'; '.join(lacks)}. "
        "docs/evaluation.md says where to get it; a run that is resumed looks again"
    )


def _titles(metrics: tuple[MetricName, ...]) -> str:
    return ", ".join(TITLES[metric] for metric in metrics)
