"""Every ZeRO stage, micro-batch and checkpointing that a run could take, and the one to take."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data.crop import check_resolution
from millrace.engine.distributed.deepspeed_engine import zero_stage
from millrace.engine.encoders.autoencoder import published_factor
from millrace.engine.model.flops import training_flops
from millrace.engine.model.routing import require_grid
from millrace.engine.planning.activations import Traced, trace
from millrace.engine.planning.devices import Device
from millrace.engine.planning.frozen_sizes import Loaded, frozen_networks
from millrace.engine.planning.step_memory import Memory, Shape, memory_of, shape_of
from millrace.engine.planning.step_time import Step, step_of
from millrace.engine.util.errors import UserError

POLICIES = ("none", "selective", "full")
STAGES = (0, 1, 2, 3)
OVERLAP_BUCKET = 100_000_000
"""Elements of a reduction bucket where reductions run beside the backward pass: several of a model's size, so
that only the last has nothing left to hide behind."""
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
        self.frozen: Loaded = frozen_networks(config, self.image_tokens, self.text_tokens)
        self.shape: Shape = shape_of(config)
        self._traces: dict[tuple[str, int, int, bool], Traced] = {}

    def with_settings(self, stage: int, micro_batch: int, policy: str) -> Config:
        """The configuration with these; UserError where they do not go together."""
        values: dict[str, Any] = {
            "data": {"micro_batch": micro_batch},
            "run": {"activation_checkpointing": {"policy": policy}},
            "deepspeed": {"zero_optimization": self.zero_section(stage)},
        }
        return parse_config(merge(self.config.model_dump(mode="json"), values), "plan")

    def zero_section(self, stage: int) -> dict[str, Any]:
        """`deepspeed.zero_optimization` at this stage: the run's, and where processes communicate while they
        compute, what that needs unless the run sets it."""
        own = self.config.deepspeed.get("zero_optimization", {})
        beside = {"overlap_comm": True, "reduce_bucket_size": OVERLAP_BUCKET}
        smaller = self.shape.parameters > OVERLAP_BUCKET
        wanted = beside if stage and self.ranks > 1 and self.device.overlaps and smaller else {}
        return wanted | own | {"stage": stage}

    def traced(self, policy: str, micro_batch: int, stage: int) -> Traced:
        """A micro-batch; activations grow in proportion to it, so two small ones are traced."""
        few = self._trace(policy, 1, stage)
        if micro_batch == 1:
            return few
        base = 2 if micro_batch < 8 else 8
        low, high = self._trace(policy, base, stage), self._trace(policy, 2 * base, stage)
        if micro_batch in (base, 2 * base):
            return low if micro_batch == base else high
        times = (micro_batch - base) / base

        def grown(name: str) -> int:
            return int(getattr(low, name) + times * (getattr(high, name) - getattr(low, name)))

        return Traced(*(grown(name) for name in Traced.__dataclass_fields__))

    def _trace(self, policy: str, samples: int, stage: int) -> Traced:
        reentrant = stage == 3 and policy == "full"
        key = (policy, samples, 3 if reentrant else 0, reentrant)
        if key not in self._traces:
            config = self.with_settings(3 if reentrant else 0, samples, policy)
            self._traces[key] = trace(config, samples, self.edge, self.text_tokens, 3 if reentrant else 0)
        return self._traces[key]

    def executed_flops(self, policy: str) -> float:
        """For one image: `full` runs the forward of every n-th block once more."""
        again = self.flops / 3 / self.config.run.activation_checkpointing.every
        return self.flops + (again if policy == "full" else 0.0)

    @functools.cache  # noqa: B019 - a planner lives as long as its command
    def option(self, stage: int, micro_batch: int, policy: str) -> Option:
        """What these settings come to."""
        return self._evaluated(self.with_settings(stage, micro_batch, policy), stage, micro_batch, policy)

    def configured(self) -> Option | None:
        """What the configuration comes to as it is; None where its micro-batch does not make the batch."""
        config, micro_batch = self.config, self.config.data.micro_batch
        if config.data.global_batch % (micro_batch * self.ranks):
            return None
        policy = config.run.activation_checkpointing.policy
        return self._evaluated(config, zero_stage(config), micro_batch, policy)

    def _evaluated(self, config: Config, stage: int, micro_batch: int, policy: str) -> Option:
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
            self.images_per_second,
        )
        fits = memory.peak <= self.device.capacity
        return Option(stage, micro_batch, policy, memory, step, fits)

    def micro_batches(self) -> list[int]:
        """Sizes that divide what a process has of the global batch, largest first: halves, and the run's."""
        each = self.config.data.global_batch // self.ranks
        sizes = {each >> i for i in range(each.bit_length()) if each % (1 << i) == 0}
        configured = self.config.data.micro_batch
        return sorted(sizes | ({configured} if each % configured == 0 else set()) | {1}, reverse=True)

    def allowed(self, stage: int, policy: str) -> bool:
        """Whether the engine takes the combination (`runtime.zero.deepspeed_config`)."""
        if policy == "selective" and (stage == 3 or self.config.run.compile):
            return False
        if stage == 3 and self.config.conditioning.autoencoder.tuning.enabled:
            return False
        return stage == 0 or self.config.precision.master == "float32"

    def options(self) -> Iterable[Option]:
        """For each stage and policy the largest micro-batch that fits, or the smallest if none does."""
        for stage in STAGES:
            for policy in POLICIES:
                if not self.allowed(stage, policy):
                    continue
                tried = (self.option(stage, size, policy) for size in self.micro_batches())
                last = None
                for last in tried:
                    if last.fits:
                        break
                yield last

    def best(self) -> tuple[Option, list[Option]]:
        """The option to take, and all that were compared, the fastest first.

        Among those that fit within TIE of the fastest: the lowest stage, then the least recomputation.
        Raises UserError if none fits.
        """
        found = sorted(self.options(), key=lambda o: (not o.fits, o.step.seconds))
        fitting = [option for option in found if option.fits]
        if not fitting:
            least = min(found, key=lambda o: o.memory.peak)
            raise UserError(
                f"no setting fits {self.ranks} x {self.device.name}: ZeRO {least.stage}, micro-batch "
                f"{least.micro_batch} and checkpointing {least.policy} take least, "
                f"{least.memory.peak / 1e9:.1f} GB of {self.device.capacity / 1e9:.1f} GB; take more "
                "devices, a smaller model, or fewer pixels"
            )
        limit = fitting[0].step.seconds * (1 + TIE)
        close = [option for option in fitting if option.step.seconds <= limit]
        return min(close, key=lambda o: (o.stage, POLICIES.index(o.policy))), found
