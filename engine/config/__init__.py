"""Configuration: everything a user can set, one file for each section, all of them exported here.

A run is one JSON file. `extends` names another file (relative to the first) whose values it starts from;
`--set a.b=c` overrides single values; unknown keys are refused with the nearest valid name. The file
that a run resolved to is saved beside its checkpoints.

Units: sizes in pixels or tokens as said, times in optimizer steps unless the name says seconds.
"""

from typing import Any

from pydantic import Field, model_validator

from millrace.engine.config.adapter import Adapter, check_adapter
from millrace.engine.config.alignment import Alignment, AttentionAlignment, Teacher, check_alignment
from millrace.engine.config.autoencoder_tuning import AutoencoderTuning, check_tuning
from millrace.engine.config.conditioning import Autoencoder, Conditioning, TextTower
from millrace.engine.config.data import Data
from millrace.engine.config.evaluation import Evaluation, FeaturePaths
from millrace.engine.config.model import AttentionBackend, GegluBackend, Model, Routing
from millrace.engine.config.objective import Lpips, Objective, PerceptualDino, check_perceptual
from millrace.engine.config.optimizer import (
    Ema,
    Muon,
    Optimizer,
    Schedule,
    check_masters,
    check_sampled_average,
)
from millrace.engine.config.precision import Fp8, Precision, check_fp8
from millrace.engine.config.run import ActivationCheckpointing, Checkpoint, Logging, Run
from millrace.engine.config.sampling import Sampling, check_guidance, guidance_warnings, weak_drop
from millrace.engine.config.section import AUTO, Section
from millrace.engine.config.validation import Validation

__all__ = [
    "AUTO",
    "ActivationCheckpointing",
    "Adapter",
    "Alignment",
    "AttentionAlignment",
    "AttentionBackend",
    "Autoencoder",
    "AutoencoderTuning",
    "Checkpoint",
    "Conditioning",
    "Config",
    "Data",
    "Ema",
    "Evaluation",
    "FeaturePaths",
    "Fp8",
    "GegluBackend",
    "Logging",
    "Lpips",
    "Model",
    "Muon",
    "Objective",
    "Optimizer",
    "PerceptualDino",
    "Precision",
    "Routing",
    "Run",
    "Sampling",
    "Schedule",
    "Section",
    "Teacher",
    "TextTower",
    "Validation",
    "guidance_warnings",
    "route_end",
    "weak_drop",
]


class Config(Section):
    """A run."""

    source: str = ""
    """Where this configuration comes from, e.g. the table and row of a publication that it reproduces."""
    run: Run = Run()
    model: Model = Model()
    objective: Objective = Objective()
    routing: Routing = Routing()
    alignment: Alignment = Alignment()
    conditioning: Conditioning = Conditioning()
    data: Data = Data()
    adapter: Adapter = Adapter()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    validation: Validation = Validation()
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 0}})
    """Passed to DeepSpeed after a check that it names no key that the engine sets itself. May be `auto`:
    `zero_optimization`, or its `stage`, `overlap_comm`, `reduce_bucket_size` and `allgather_bucket_size`."""
    stages: tuple[dict[str, Any], ...] = ()
    """What changes during the run: objects with `at` (steps done before), `name`, and any settings that hold
    from there on (`engine/config/stages.py`)."""

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        model, routing = self.model, self.routing
        if self.conditioning.autoencoder.kind == "pixels" and model.in_channels != 3:
            raise ValueError(
                f"model.in_channels is {model.in_channels}; with conditioning.autoencoder.kind pixels it is 3"
            )
        if routing.policy != "none":
            end = route_end(self)
            if not routing.start <= end < model.depth:
                raise ValueError(
                    f"routing spans blocks {routing.start}..{end} but model.depth is {model.depth}; "
                    "set routing.start and routing.end inside the depth"
                )
        if routing.structured and self.data.aspect != "square":
            raise ValueError("routing.structured needs one grid for all pictures; set data.aspect to square")
        check_perceptual(self.objective, self.conditioning.autoencoder, self.data, model.patch_size)
        check_guidance(self.sampling, routing)
        check_alignment(self.alignment, model, routing, self.data)
        check_sampled_average(self.sampling.weights, self.ema)
        autoencoder = self.conditioning.autoencoder
        check_tuning(
            autoencoder.tuning,
            autoencoder.kind,
            autoencoder.form,
            self.objective.lpips.path,
            self.alignment,
            self.deepspeed,
        )
        check_adapter(self.adapter, self.optimizer, self.precision, autoencoder.tuning.enabled)
        if self.precision.master == "bfloat16" and self.precision.compute != "bfloat16":
            raise ValueError("precision.master bfloat16 needs precision.compute bfloat16")
        check_masters(self.optimizer, self.precision.master)
        check_fp8(self.precision.fp8, self.precision.compute, model)
        return self


def route_end(config: Config) -> int:
    """Index of the last routed block of the run."""
    return config.routing.last(config.model.depth)
