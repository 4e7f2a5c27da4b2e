"""Every ZeRO stage, micro-batch and checkpointing that a run could take, and the one to take."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.engine.config import AUTO, Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data.crop import check_resolution
from millrace.engine.distributed.deepspeed_engine import accumulation_steps
from millrace.engine.distributed.zero_settings import automatic_keys, zero_section, zero_stage
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.flops import attention_share, routed_flops, training_flops
from millrace.engine.model.routing import require_grid
from millrace.engine.planning.activations import Traced, trace
from millrace.engine.planning.devices import Device
from millrace.engine.planning.frozen_sizes import Loaded, frozen_networks
from millrace.engine.planning.step_memory import Memory, Shape, gigabytes, memory_of, shape_of
from millrace.engine.planning.step_time import Step, step_of
from millrace.engine.util.errors import UserError

POLICIES = ("none", "selective", "full")
STAGES = (0, 1, 2, 3)
TIE = 0.05
"""Relative difference of step times that the model cannot tell: below it the simpler setting wins."""


@dataclass(frozen=True)
class Option:
    """Settings, and what they come to."""

    stage: int
    micro_batch: int
    policy: str
    memory: Memory
    step: Step
    fits: bool


class Planner:
    """Evaluates settings of one run on `ranks` devices of a kind.

    Args:
        config: the resolved configuration, without stages.
        images_per_second: that one process's loader delivers, or None if it is not to be considered.

    Raises UserError for what the start of the run would refuse on the grounds of sizes.
    """

    def __init__(
        self, config: Config, ranks: int, device: Device, images_per_second: float | None = None
    ) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.images_per_second = images_per_second
        if ranks < 1:
            raise UserError(f"the number of devices is {ranks}; it is 1 or more")
        batch = config.data.global_batch
        if batch % ranks:
            near = max(n for n in range(1, min(ranks, batch) + 1) if batch % n == 0)
            up = -(-batch // ranks) * ranks
            raise UserError(
                f"data.global_batch {batch} is not a multiple of {ranks} devices; set it to {up}, or take "
                f"{near} device(s)"
            )
        factor = published_factor(config.conditioning.autoencoder)
        edge = factor * config.model.patch_size
        check_resolution(config.data, edge)
        require_grid(config, edge)
        self.edge = config.data.resolution // edge
        self.image_tokens, self.text_tokens = self.edge**2, config.conditioning.text.max_tokens
        self.flops = training_flops(config, self.image_tokens, self.text_tokens)
        self.forward = routed_flops(config, self.image_tokens, self.text_tokens, config.routing.drop)
        self.attention = attention_share(config, self.image_tokens, self.text_tokens)
        self.frozen: Loaded = frozen_networks(config, self.image_tokens, self.text_tokens)
        self.shape: Shape = shape_of(config)
        self._traces: dict[tuple[str, int, int], Traced] = {}

    @property
    def simplest(self) -> tuple[int, ...]:
        """The stages in the order in which they are taken where they are as fast: the lowest first, but 1
        before 0 where processes reduce beside the backward pass, which 0 cannot."""
        return (1, 0, 2, 3) if self.ranks > 1 and self.device.overlaps else STAGES

    def with_settings(self, stage: int, micro_batch: int, policy: str) -> Config:
        """The configuration with these; UserError where they do not go together."""
        values: dict[str, Any] = {
            "data": {"micro_batch": micro_batch},
            "run": {"activation_checkpointing": {"policy": policy}},
            "deepspeed": {
                "zero_optimization": zero_section(self.config, stage, self.ranks, self.shape.parameters)
            },
        }
        return parse_config(merge(self.config.model_dump(mode="json"), values), "plan")

    def traced(self, policy: str, micro_batch: int, stage: int) -> Traced:
        """A micro-batch; activations grow in proportion to it, so two small ones are traced."""
        if micro_batch == 1:
            return self._trace(policy, 1, stage)
        base = 2 if micro_batch < 8 else 8
        low, high = self._trace(policy, base, stage), self._trace(policy, 2 * base, stage)
        if micro_batch in (base, 2 * base):
            return low if micro_batch == base else high
        times = (micro_batch - base) / base

        def grown(name: str) -> int:
            return int(getattr(low, name) + times * (getattr(high, name) - getattr(low, name)))

        return Traced(*(grown(name) for name in Traced.__dataclass_fields__))

    def _trace(self, policy: str, samples: int, stage: int) -> Traced:
        stage = 3 if stage == 3 else 0  # the others trace alike
        key = (policy, samples, stage)
        if key not in self._traces:
            config = self.with_settings(stage, samples, policy)
            self._traces[key] = trace(config, samples, self.edge, self.text_tokens, stage)
        return self._traces[key]

    def executed_flops(self, policy: str) -> float:
        """For one image: `full` runs the forward of every n-th block once more."""
        again = self.forward / self.config.run.activation_checkpointing.every
        return self.flops + (again if policy == "full" else 0.0)

    @functools.cache  # noqa: B019 - a planner lives as long as its command
    def option(self, stage: int, micro_batch: int, policy: str) -> Option:
        """What these settings come to."""
        config = self.with_settings(stage, micro_batch, policy)
        traced = self.traced(policy, micro_batch, stage)
        frozen = self.frozen
        memory = memory_of(
            config, stage, self.ranks, traced, self.shape, frozen.bytes, self.device.fused_optimizer
        )
        step = step_of(
            config,
            stage,
            self.ranks,
            self.device,
            traced,
            self.shape,
            self.executed_flops(policy),
            frozen.flops,
            self.attention,
            self.images_per_second,
        )
        fits = memory.peak <= self.device.capacity
        return Option(stage, micro_batch, policy, memory, step, fits)

    def micro_batches(self) -> list[int]:
        """Sizes that divide what a process has of the global batch, largest first: halves, and the run's."""
        each = self.config.data.global_batch // self.ranks
        data = self.config.data
        sizes = {each >> i for i in range(each.bit_length()) if each % (1 << i) == 0} | {1}
        if data.micro_batch != AUTO and each % data.micro_batch == 0:
            sizes.add(data.micro_batch)
        # A micro-batch of buckets has one size of pictures.
        whole = data.bucket_run if data.aspect == "bucket" else 0
        # Contrastive flow matching needs a second sample.
        least = 2 if self.config.objective.contrastive_weight > 0 and each > 1 else 1
        return sorted((size for size in sizes if whole % size == 0 and size >= least), reverse=True)

    def allowed(self, stage: int, policy: str) -> bool:
        """Whether the engine takes the combination (`deepspeed_engine.deepspeed_config`)."""
        if policy == "selective" and (stage == 3 or self.config.run.compile):
            return False
        if stage == 3 and (self.config.conditioning.autoencoder.tuning.enabled or self.shape.frozen):
            return False
        return stage == 0 or self.config.precision.master == "float32"

    def options(self) -> Iterable[Option]:
        """For each stage and policy the largest micro-batch that fits, or the smallest if none does.

        One process has nothing to shard: it stays at stage 0.
        """
        stages = STAGES if self.ranks > 1 else STAGES[:1]
        for stage, policy in self._allowed(stages, POLICIES):
            yield self._largest(stage, policy, self.micro_batches())

    def automatic(self) -> Iterable[Option]:
        """As `options`, with all that the configuration fixes, and without policies that recompute more than
        another that fits the largest micro-batch: they are slower."""
        data, policy = self.config.data, self.config.run.activation_checkpointing.policy
        if data.micro_batch == AUTO and self.config.conditioning.autoencoder.tuning.enabled:
            raise UserError(
                "data.micro_batch is auto, but the activations of an autoencoder that is tuned are not known "
                "to the planner; set it to a number"
            )
        stages: Sequence[int] = STAGES if self.ranks > 1 else STAGES[:1]
        if "stage" not in automatic_keys(self.config):
            stages = [zero_stage(self.config)]
        sizes = self.micro_batches()
        if data.micro_batch != AUTO:
            accumulation_steps(self.config, self.ranks)
            sizes = [data.micro_batch]
        policies = POLICIES if policy == AUTO else [policy]
        enough: set[int] = set()
        # What the engine does not take is left to its own check where nothing else is left.
        for stage, tried in self._allowed(stages, policies) or itertools.product(stages, policies):
            if stage not in enough:
                found = self._largest(stage, tried, sizes)
                if found.fits and found.micro_batch == sizes[0]:
                    enough.add(stage)
                yield found

    def _allowed(self, stages: Sequence[int], policies: Sequence[str]) -> list[tuple[int, str]]:
        return [pair for pair in itertools.product(stages, policies) if self.allowed(*pair)]

    def _largest(self, stage: int, policy: str, sizes: Sequence[int]) -> Option:
        for size in sizes:
            found = self.option(stage, size, policy)
            if found.fits:
                break
        return found

    def best(self, options: Iterable[Option] | None = None) -> tuple[Option, list[Option]]:
        """The option to take, and all that were compared, the fastest first.

        Among those that fit within TIE of the fastest: the simplest stage, then the least recomputation.
        Raises UserError if none fits.

        Args:
            options: to compare, by default all of them.
        """
        found = sorted(options or self.options(), key=lambda o: (not o.fits, o.step.seconds))
        fitting = [option for option in found if option.fits]
        if not fitting:
            least = min(found, key=lambda o: o.memory.peak)
            raise UserError(
                f"no setting fits {self.ranks} x {self.device.name}: ZeRO {least.stage}, micro-batch "
                f"{least.micro_batch} and checkpointing {least.policy} take least, "
                f"{gigabytes(least.memory.peak)} GB of {gigabytes(self.device.capacity)} GB; take more "
                "devices, a smaller model, or fewer pixels"
            )
        limit = fitting[0].step.seconds * (1 + TIE)
        close = [option for option in fitting if option.step.seconds <= limit]
        return min(close, key=lambda o: (self.simplest.index(o.stage), POLICIES.index(o.policy))), found
