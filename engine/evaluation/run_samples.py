"""Samples during training: grids and metrics of the weights as they are, at the steps that are due."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from millrace.engine.config import Config
from millrace.engine.config.evaluation import TITLES, MetricName
from millrace.engine.data.sources.pictures import Source
from millrace.engine.distributed import process_group
from millrace.engine.encoders.batch_encoder import BatchEncoder
from millrace.engine.evaluation.evaluator import Evaluation
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.run_log.logs import RunLog
from millrace.engine.sampling.grids import draw_grid
from millrace.engine.sampling.sampler import Sampler, filled_denoiser
from millrace.engine.util.errors import UserError


class RunSamples:
    """What a run makes of its weights as they are, every `sampling.every_steps` and `evaluation.every_steps`.

    Args:
        config: of the stage.
        flow, prepare, source: of the training; none of their state that training depends on changes.
        output: folder of the run.
        log: gets the grids and the metrics.
        prompts: of the grids.

    Raises UserError for networks or reference pictures that cannot be used, unless `evaluation.missing` is
    skip; the statistics of reference pictures are made now, before the first step. Collective.
    """

    def __init__(
        self,
        config: Config,
        flow: FlowMatching,
        prepare: BatchEncoder,
        source: Source,
        output: Path,
        log: RunLog,
        prompts: list[str],
    ) -> None:
        self.config, self.flow, self.prepare, self.prompts = config, flow, prepare, prompts
        self.output, self.log = output, log
        self._evaluation: Evaluation | None = None
        if config.evaluation.every_steps:
            edge, missing = config.model.patch_size * prepare.autoencoder.factor, config.evaluation.missing
            evaluation = process_group.leaders_first(
                lambda: Evaluation(config, edge, prepare.device, source, missing=missing)
            )
            evaluation.agree()
            if evaluation.lacking:
                log.say(_without(evaluation))
            if evaluation.networks:
                for line in evaluation.describe():
                    log.say(line)
                evaluation.prepare(log.say)
                self._evaluation = evaluation

    def due(self, step: int) -> bool:
        """Whether anything is to be made after this many steps; the run's last step counts too."""
        return any(self._due(step))

    def lacking(self, step: int) -> tuple[bool, bool]:
        """Whether a grid and an evaluation that were due at `step` are not there: the run ended between its
        save and them. Collective."""
        grid, evaluation = self._due(step)
        found = (
            grid and not self._path(step).exists(),
            evaluation and not self.log.has_evaluation(step),
        )
        return process_group.gather_objects(found)[0]

    def make(
        self, step: int, weights: Iterator[tuple[str, Tensor]], what: tuple[bool, bool] | None = None
    ) -> None:
        """Make what is due, or of grid and evaluation `what` is given, of whole weights by name, and free
        them. Collective: rank 0 draws a grid, all share an evaluation. A rank that does neither keeps none of
        the weights."""
        grid, evaluation = self._due(step) if what is None else what
        if not evaluation and process_group.rank() > 0:
            for _ in weights:  # gathers from all ranks, so each must come to its end
                pass
            return
        sampler = self._sampler(weights)
        if grid and process_group.rank() == 0:
            with self.log.channels.tolerate("sample grid"):  # nobody waits for rank 0 here
                self._grid(step, sampler)
        if evaluation:
            self._evaluate(step, sampler)

    def _due(self, step: int) -> tuple[bool, bool]:
        last = step == self.config.run.steps
        evaluates = self.config.evaluation.every_steps if self._evaluation is not None else 0
        every = self.config.sampling.every_steps, evaluates
        grid, evaluation = (n > 0 and (last or step % n == 0) for n in every)
        return grid, evaluation

    def _sampler(self, weights: Iterator[tuple[str, Tensor]]) -> Sampler:
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
        draw_grid(sampler, self.config, self.prompts, path)
        self.log.grid(path, step)

    def _evaluate(self, step: int, sampler: Sampler) -> None:
        assert self._evaluation is not None
        try:
            scores = self._evaluation(sampler)
        except UserError as error:  # the same on all ranks; training goes on
            self.log.say(f"warning: step {step} has no evaluation: {error}")
            return
        asked = self.config.sampling.weights
        weights = "model" if not self.config.ema.enabled else "ema" if asked == "auto" else asked
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
