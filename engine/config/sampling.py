"""Sampling section: pictures made during training and afterwards."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.model import Routing
from millrace.engine.config.objective import Objective
from millrace.engine.config.section import PathText, Section

SELF_ONLY = ("strong_drop", "weak_drop", "weak_unconditional", "weak_route")
"""Settings that belong to method `self`."""


class Sampling(Section):
    """Pictures made during training, and the defaults of `millrace sample`."""

    every_steps: int = Field(0, ge=0)
    """Steps between sample grids during training; 0 is never."""
    prompts: tuple[str, ...] = ()
    """Captions of the grid's first part."""
    count: int = Field(16, ge=0)
    """How many of the data's first captions make the second part of the grid, or all of it where there are no
    `prompts`."""
    tile: int = Field(256, ge=16)
    """Pixels of the longer edge of a picture in a grid; larger pictures are shrunk to it."""
    steps: int = Field(28, ge=1)
    """Solver steps."""
    solver: Literal["euler", "heun"] = "euler"
    """`heun` evaluates the model twice a step."""
    times: Literal["even", "diffusers"] = "even"
    """Times of the solver's steps before the shift. `even`: 1, (n-1)/n, ..., 1/n, then 0, as PRX samples.
    `diffusers`: n even ones from 1 to the smallest time of FlowMatchEulerDiscreteScheduler, then 0, as an
    exported pipeline samples."""
    guidance: float = Field(5.0, ge=0)
    """Scale s of the guidance, weak + s (strong - weak); 1 is off."""
    method: Literal["cfg", "self", "path_drop", "none"] = "cfg"
    """What the guidance leads away from. `cfg`: the prediction without the caption. `self` (Sparse Guidance,
    arXiv 2601.01608, and PRX's self-guidance): the prediction of a route that drops more tokens, for models
    trained with routing. `path_drop` (arXiv 2510.21986): the prediction without the caption and without the
    routed blocks, for SPRINT. `none`: nothing, whatever `guidance` is."""
    strong_drop: float = Field(0.0, ge=0, lt=1)
    """`self`: share of tokens that bypass the routed blocks in the strong branch; 0 runs all of them."""
    weak_drop: float | None = Field(None, gt=0, lt=1)
    """`self`: the same of the weak branch; default routing.drop."""
    weak_unconditional: bool = False
    """`self`: the weak branch has no caption either (classifier-free and Sparse Guidance together)."""
    weak_route: Literal["step", "fixed"] = "step"
    """`self`: tokens that bypass are drawn for each picture anew in every solver step, or once."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times t (0 is data, 1 noise; ends included) with guidance; at others only the strong branch runs."""
    contrastive: float = Field(0.0, ge=0, lt=1)
    """Lambda of contrastive flow matching, whose shift by the mean target is taken back; 0 leaves it."""
    mean_target: PathText | None = None
    """File with the mean target, which `contrastive` needs; `millrace sample --compute-mean-target`."""
    weights: Literal["auto", "model", "ema", "ema2"] = "auto"
    """`auto` takes EMA where the run has one; `ema2` is the second average (ema.second_decay)."""

    @property
    def guided(self) -> bool:
        """Whether any evaluation may have a weak branch."""
        return self.method != "none" and self.guidance != 1

    @property
    def captionless(self) -> bool:
        """Whether a weak branch runs without the caption."""
        return self.guided and (self.method != "self" or self.weak_unconditional)

    @model_validator(mode="after")
    def _of_method(self) -> "Sampling":
        if self.method != "self":
            for name in SELF_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} belongs to method self, but method is {self.method}; remove one of the two"
                    )
        if self.every_steps and not (self.prompts or self.count):
            raise ValueError(
                "every_steps asks for grids, but count is 0 and there are no prompts; set one of them"
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval is [{low}, {high}], expected two times in order between 0 and 1")
        if self.contrastive and self.mean_target is None:
            raise ValueError(
                f"contrastive is {self.contrastive} but mean_target names no file; make one with "
                "millrace sample --compute-mean-target FILE"
            )
        return self


def weak_drop(sampling: Sampling, routing: Routing) -> float:
    """Share of tokens that bypass the routed blocks in the weak branch of `self`."""
    return routing.drop if sampling.weak_drop is None else sampling.weak_drop


def check_guidance(sampling: Sampling, routing: Routing) -> None:
    """Raise ValueError where the guidance needs a routing that the model was not trained with."""
    if sampling.method == "path_drop" and routing.policy != "sprint":
        raise ValueError(
            f"sampling.method path_drop needs a model of SPRINT, but routing.policy is {routing.policy}; "
            "set sampling.method to cfg"
        )
    if sampling.method != "self":
        return
    if routing.policy == "none":
        raise ValueError(
            "sampling.method self needs a model trained with routing, but routing.policy is none; "
            "set sampling.method to cfg"
        )
    weak = weak_drop(sampling, routing)
    if sampling.strong_drop >= weak:
        origin = "routing.drop" if sampling.weak_drop is None else "sampling.weak_drop"
        raise ValueError(
            f"sampling.strong_drop {sampling.strong_drop} is not below the weak branch's drop {weak} "
            f"({origin}); set sampling.weak_drop above sampling.strong_drop"
        )
    if routing.structured:
        for name, drop in (("strong_drop", sampling.strong_drop), ("weak_drop", weak)):
            if not (16 * drop).is_integer():
                raise ValueError(
                    f"routing.structured drops whole sixteenths of the tokens; sampling.{name} {drop} is none"
                )


def guidance_warnings(sampling: Sampling, routing: Routing, objective: Objective) -> list[str]:
    """A line for each thing that the sampling asks of the model without the training for it."""
    found = []
    if sampling.method == "path_drop" and sampling.guided and not routing.path_drop:
        found.append(
            "warning: sampling.method is path_drop, but routing.path_drop is 0: the model was never trained "
            "without its routed blocks, so its weak branch means little"
        )
    if sampling.contrastive and not objective.contrastive_weight:
        found.append(
            f"warning: sampling.contrastive is {sampling.contrastive:.4g}, but objective.contrastive_weight "
            "is 0: there is no shift to take back"
        )
    return found
