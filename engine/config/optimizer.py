"""Optimizer, learning-rate schedule and EMA sections."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.section import Section, Share


class Muon(Section):
    """Muon for the matrices of the blocks (`optimizer.kind` muon); the defaults are Photoroom/PRX's."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate of the matrices; default optimizer.lr."""
    momentum: Share = 0.95
    """mu, the share of the momentum b that is kept at an update."""
    nesterov: bool = True
    """Orthogonalise the gradient mixed with the momentum, in place of the momentum."""
    form: Literal["lerp", "sum"] = "lerp"
    """`lerp`: b = mu b + (1 - mu) g, as in muon_fsdp2 (PRX's), torch.optim.Muon and DeepSpeed; `sum`:
    b = mu b + g, as in Jordan's post. The factor between them is divided out by the orthogonalisation."""
    steps: int = Field(5, ge=1, lt=100)
    """Newton-Schulz iterations."""
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """a, b, c of the iteration's polynomial a s + b s^3 + c s^5 on the singular values s."""
    scale: Literal["rms", "spectral"] = "rms"
    """Factor of the update of an m x n matrix. `rms`: 0.2 sqrt(max(m, n)), about the size of AdamW's updates.
    `spectral`: sqrt(max(1, m / n)), torch.optim.Muon's default and DeepSpeed's."""
    chunked: bool = False
    """Orthogonalise query, key, value and the six parts of the modulation each by themselves; else qkv
    (3C x C), text kv (2C x C) and modulation (6C x C) of a block are one matrix each, as in PRX."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the matrices; decoupled: they shrink by lr * weight_decay a step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the Newton-Schulz iteration, and what is sent between processes for it."""
    parameters: tuple[str, ...] | None = None
    """Names of the parameters that get Muon, `*` stands for anything: ["blocks.*.weight"] leaves modulation
    and text kv to AdamW. Default every matrix of the blocks."""


class Optimizer(Section):
    """The update of the weights."""

    kind: Literal["adamw", "adamw_8bit", "adamw_offload", "muon"] = "adamw"
    """`adamw`, fused on CUDA, for everything; `adamw_8bit`: its moments in one byte an element, by torchao;
    `adamw_offload`: its moments and its update on the host; `muon` for the matrices of the blocks and AdamW
    for the rest (docs/optimizers.md)."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW: decay of the first and the second moment."""
    eps: float = Field(1e-15, ge=0)
    """AdamW: the post's value; it needs the second moment in FP32. PRX's Muon runs have 1e-8."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW; decoupled: weights shrink by lr * weight_decay a step."""
    clip: float = Field(0.2, ge=0)
    """Largest global norm of the gradient that the optimizer sees (0.2 in PRX's recipe); 0 is off."""
    muon: Muon = Muon()
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained, `*` stands for anything: ["text_kv.*", "blocks.0.*"]. Those of linear
    layers are stored in `precision.compute`, which is what they are multiplied in."""


class Schedule(Section):
    """Learning rate over the run."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After the warm-up: constant; linear or cosine decay to `final`; or warm-up-stable-decay."""
    warmup: int = Field(1_000, ge=0)
    """Steps of linear rise from 0."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the run that decays at its end (`wsd` only)."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak (not for `constant`)."""


class Ema(Section):
    """Exponential moving average of the weights, in FP32."""

    enabled: bool = False
    """Keep the average; sampling and export prefer it."""
    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the average that is kept at an update (0.999 every 10 steps in PRX)."""
    second_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a second average with this decay (`ema2` in checkpoints, sampling and export)."""
    every: int = Field(10, ge=1)
    """Steps between updates."""
    start: int = Field(0, ge=0)
    """The average starts as a copy of the weights at this step."""

    @model_validator(mode="after")
    def _second_needs_first(self) -> "Ema":
        if self.second_decay is not None and not self.enabled:
            raise ValueError(
                "second_decay is set, but enabled is false; enable it, or leave second_decay out"
            )
        return self


def check_masters(optimizer: Optimizer, master: str) -> None:
    """Raise ValueError if the optimizer is made for FP32 weights and those are not."""
    if optimizer.kind in ("adamw_8bit", "adamw_offload") and master != "float32":
        raise ValueError(
            f"optimizer.kind {optimizer.kind} updates FP32 weights, but precision.master is {master}; set it "
            "to float32, or take adamw"
        )


def check_sampled_average(weights: str, ema: Ema) -> None:
    """Raise ValueError if `sampling.weights` names an average that the run does not keep."""
    if weights in ("ema", "ema2") and not ema.enabled:
        raise ValueError(f"sampling.weights is {weights}, but ema.enabled is false")
    if weights == "ema2" and ema.second_decay is None:
        raise ValueError("sampling.weights is ema2, but ema.second_decay is null")
