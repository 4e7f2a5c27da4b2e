"""Evaluation: metrics (FID, CMMD, DINO-MMD) of a model's samples against reference pictures.

    captions ──sampler, in parts──▶ uint8 pictures ──feature networks──▶ statistics ──together──▶ metrics
    reference pictures ───────────────────────────────────────────────▶ statistics ──disk────────────┘

Samples are made in parts of fixed limits, part p by process p mod world size, and sample i is a function of
(evaluation.seed, i). So a picture does not depend on the number of processes, nor on who else is in its
batch, and the metrics are those of one process up to the order in which numbers are added. A picture is gone
once its features are added. Nothing here draws from torch's generators.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from millrace.engine.config import Config
from millrace.engine.config.evaluation import FEATURES_OF, TITLES, MetricName
from millrace.engine.data import Source
from millrace.engine.data.sources.pictures import UnreadablePicture
from millrace.engine.distributed import process_group
from millrace.engine.evaluation import reference_statistics
from millrace.engine.evaluation.features import FeatureNetwork, open_network
from millrace.engine.evaluation.reference_set import Reference, levels
from millrace.engine.evaluation.statistics import KINDS, Statistics
from millrace.engine.model.flops import sampling_flops
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.data_sheets import peak_flops
from millrace.engine.util.errors import UserError
from millrace.engine.util.progress_bar import bar_size

PART = Sampler.CHUNK
"""Pictures that are sampled, and looked at, together."""


@dataclass(frozen=True)
class Scores:
    """What one evaluation found."""

    metrics: dict[str, float]
    """Lower is better, each."""
    samples: int
    reference: int
    """Reference pictures."""
    sampling_seconds: float
    """Of the slowest process, without features."""
    feature_seconds: float
    """Of the slowest process, without those of reference pictures."""
    images_per_second: float
    """Samples of all processes over the sampling time."""
    gflop_per_image: float
    """Of the denoiser, all steps and branches, for the mean caption and size."""
    mfu: float | None
    """Model FLOP/s of the sampling over the peak of all devices; None where that is not known."""

    def line(self) -> str:
        """For people."""
        values = ", ".join(f"{TITLES[name]} {value:.4g}" for name, value in self.metrics.items())
        return f"{values} ({self.samples} samples, {self.images_per_second:.1f} img/s)"

    def record(self) -> dict[str, Any]:
        """For the log: the metrics, and what they were taken of."""
        rest = asdict(self)
        return {**rest.pop("metrics"), **{name: value for name, value in rest.items() if value is not None}}


class Evaluation:
    """Everything that evaluations of one model, at one or many steps, have in common.

    Args:
        config: of the model, with its sections `evaluation`, `sampling` and `data`.
        edge: of a token in pixels.
        device: of sampler and feature networks.
        source: of `config.data`, if it is open already.
        features_key: what errors call the place where the networks' paths are given.
        missing: "skip" leaves out the metrics whose network or reference pictures are not there, in place of
            raising UserError.

    Opens networks and reference, so that what is wrong with them is refused before anything is computed.
    Between evaluations the networks lie in host memory.

    Attributes:
        networks: by metric, of those that are computed; none where the reference pictures are missing.
        lacking: metrics that are not, by what they lack.
    """

    def __init__(
        self,
        config: Config,
        edge: int,
        device: torch.device,
        source: Source | None = None,
        features_key: str = "evaluation.features",
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        section = config.evaluation
        self.config, self.edge, self.device = config, edge, device
        self.networks: dict[str, FeatureNetwork] = {}
        self.lacking: dict[str, tuple[MetricName, ...]] = {}
        self._reference: Reference | None = None
        self._of_reference: dict[str, Statistics] = {}
        wanted = section.metrics
        try:
            self._reference = Reference(config, edge, source)
        except UserError as error:
            if missing == "error":
                raise
            self.lacking[str(error)] = wanted
            # What else they lack, as far as it can be told without a download.
            wanted = tuple(metric for metric in wanted if FEATURES_OF.get(metric, metric) == "fid")
        with untouched_randomness(device):
            for metric in wanted:
                path, key = section.features.of(metric), f"{features_key}.{FEATURES_OF.get(metric, metric)}"
                try:
                    self.networks[metric] = open_network(metric, path, key, torch.device("cpu"))
                except UserError as error:
                    if missing == "error":
                        raise
                    self.lacking[str(error)] = (*self.lacking.get(str(error), ()), metric)
        if self._reference is None:
            self.networks.clear()

    @property
    def reference(self) -> Reference:
        """The reference pictures, which are there."""
        assert self._reference is not None
        return self._reference

    def agree(self) -> None:
        """Leave out on every process what one of them lacks. Collective."""
        for lacking in process_group.gather_objects(self.lacking):
            self.lacking |= lacking
        for metrics in self.lacking.values():
            for metric in metrics:
                self.networks.pop(metric, None)

    def describe(self) -> list[str]:
        """Lines for people: networks and reference."""
        lines = [
            f"{TITLES[metric]}: {network.identity} ({network.source}), {network.preprocessing}"
            for metric, network in self.networks.items()
        ]
        lines += [
            f"warning: {TITLES[metric]} of weights that are not the published ones is comparable to no other"
            for metric, network in self.networks.items()
            if not network.published
        ]
        return [*lines, f"reference: {self.reference.count} pictures of {self.reference.name}"]

    @torch.no_grad()
    def __call__(self, sampler: Sampler, say: Callable[[str], None] = lambda _: None) -> Scores:
        """Sample, look, compare. Collective; every process has the same weights in its sampler.

        Raises UserError, on every process, for samples that are not finite.
        """
        tower = sampler.text_encoder
        truncated, cut_before = tower.truncated, sampler.caption_tokens
        self.prepare(say)
        with untouched_randomness(self.device), self._on_device():
            found, seconds, tokens, work = agreed(lambda: self._sampled(sampler))
            for statistics in found.values():
                statistics.together()
            metrics = {name: found[name].distance(self._of_reference[name]) for name in found}
        # Captions cut are counted for the training's log, which knows nothing of these.
        tower.truncated, sampler.caption_tokens = truncated, cut_before
        return self._scores(metrics, seconds, tokens, work, len(tower.encode([""]).embeddings))

    def _sampled(self, sampler: Sampler) -> tuple[dict[str, Statistics], tuple[float, float], int, list[int]]:
        """Statistics of this process's samples, seconds of sampling and of features, caption tokens, and
        image tokens of every sample of this process."""
        section, sampling = self.config.evaluation, self.config.sampling
        found: dict[str, Statistics] = {metric: KINDS[metric]() for metric in self.networks}
        before, drawing, looking, image_tokens = sampler.caption_tokens, 0.0, 0.0, []
        for numbers in _shares(section.samples, "samples"):
            captions = [self.reference.caption(i) for i in numbers]
            sizes = [self.reference.size(i) for i in numbers]
            begun = time.perf_counter()
            pictures = sampler.mixed(captions, sizes, sampling, section.seed, numbers)
            drawn = time.perf_counter()
            for number, picture in zip(numbers, pictures, strict=True):
                if not bool(torch.isfinite(picture).all()):
                    raise UserError(
                        f"sample {number} ({self.reference.caption(number)!r}) is not finite; "
                        "look at the weights, and try precision.compute float32"
                    )
            self._add(found, numbers.start, [levels(picture) for picture in pictures])
            drawing, looking = drawing + drawn - begun, looking + time.perf_counter() - drawn
            image_tokens += [(h // self.edge) * (w // self.edge) for h, w in sizes]
        return found, (drawing, looking), sampler.caption_tokens - before, image_tokens

    def _add(self, found: dict[str, Statistics], first: int, pictures: list[Tensor]) -> None:
        """Features of uint8 pictures number `first` and following, those of one size together."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, picture in enumerate(pictures):
            by_shape.setdefault(picture.shape, []).append(i)
        for metric, statistics in found.items():
            features: list[Tensor] = [torch.empty(0)] * len(pictures)
            for members in by_shape.values():
                stack = torch.stack([pictures[i] for i in members]).to(self.device)
                for i, row in zip(members, self.networks[metric](stack), strict=True):
                    features[i] = row
            statistics.add(first, torch.stack(features))

    def prepare(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Have the statistics of the reference pictures: those in the cache are read, all others made in one
        pass over the pictures and put there. Collective; does nothing the second time.

        Raises UserError for a damaged file, or a picture that cannot be read or is too small.
        """
        if self._of_reference:
            return
        # By one process: it reads a name of every picture.
        named = agreed(lambda: self.reference.identity() if process_group.rank() == 0 else None)
        pictures, missing = process_group.gather_objects(named)[0], {}
        folders = reference_statistics.folders(self.config.evaluation.cache, self.reference.folder)
        for metric, network in self.networks.items():
            identity = {
                "metric": metric,
                "network": network.identity,
                "preprocessing": network.preprocessing,
                "pictures": pictures,
            }
            paths = [reference_statistics.path_of(folder, identity) for folder in folders]
            there = (path for path in paths if process_group.all_ranks(path.exists()))
            if (path := next(there, None)) is not None:
                tensors = agreed(
                    lambda path=path, identity=identity: reference_statistics.read(path, identity)
                )
                self._of_reference[metric] = KINDS[metric].restored(tensors)
            else:
                missing[metric] = (identity, paths)
        made = {metric: KINDS[metric]() for metric in missing}
        with untouched_randomness(self.device), self._on_device():
            agreed(lambda: self._look_at_reference(made))
            for statistics in made.values():
                statistics.together()
        self._of_reference |= made
        for metric, (identity, paths) in missing.items():
            tensors = made[metric].tensors() if process_group.rank() == 0 else {}
            path = agreed(
                lambda p=paths, i=identity, t=tensors: reference_statistics.write(p, i, t) if t else None
            )
            say(f"{TITLES[metric]}: statistics of {self.reference.count} reference pictures in {path}")

    @torch.no_grad()
    def _look_at_reference(self, made: dict[str, Statistics]) -> None:
        for places in _shares(self.reference.count if made else 0, "reference"):
            self._add(made, places.start, self.reference.views(places))

    def _scores(
        self,
        metrics: dict[str, float],
        seconds: tuple[float, float],
        caption_tokens: int,
        image_tokens: list[int],
        empty_tokens: int,
    ) -> Scores:
        section, everyone = (
            self.config.evaluation,
            process_group.gather_objects((seconds, caption_tokens, image_tokens)),
        )
        drawing, looking = (max(times[i] for times, *_ in everyone) for i in range(2))
        text = sum(tokens for _, tokens, _ in everyone) / section.samples
        flops = sum(
            sampling_flops(self.config, tokens, text, empty_tokens)
            for *_, all_ in everyone
            for tokens in all_
        )
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return Scores(
            metrics=metrics,
            samples=section.samples,
            reference=self.reference.count,
            sampling_seconds=drawing,
            feature_seconds=looking,
            images_per_second=section.samples / drawing,
            gflop_per_image=flops / section.samples / 1e9,
            mfu=flops / drawing / (peak * process_group.world_size()) if peak else None,
        )

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        for network in self.networks.values():
            network.to(self.device)
        try:
            yield
        finally:
            for network in self.networks.values():
                network.to(torch.device("cpu"))


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were, whatever a library draws from them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _shares(count: int, what: str) -> Iterator[range]:
    """The parts of `count` pictures that this process takes; rank 0 shows how far it is."""
    starts = range(process_group.rank() * PART, count, process_group.world_size() * PART)
    hidden = True if process_group.rank() else None  # None: hidden unless stderr is a terminal
    for start in tqdm(
        starts, desc=what, unit_scale=PART, unit="img", disable=hidden, leave=False, **bar_size()
    ):
        yield range(start, min(start + PART, count))


def agreed(work: Callable[[], Any]) -> Any:
    """The result of `work`; an error of one process that is no defect of the program, such as a full disk or
    no memory left, is raised as UserError on all, so that none waits for it."""
    result, problem = None, None
    try:
        result = work()
    except (UserError, UnreadablePicture, OSError, torch.OutOfMemoryError) as error:
        problem = str(error)
    problems = [found for found in process_group.gather_objects(problem) if found]
    if problems:
        raise UserError(problems[0])
    return result
