"""Configurations at another size: what makes a row of the logbook is kept, how large it is changes."""

from pathlib import Path
from typing import Any, NamedTuple

from millrace.benchmarks.report.recording import ROOT
from millrace.engine.config import Config
from millrace.engine.config.loading import load_config, merge, parse_config
from millrace.engine.planning.automatic import without_auto
from millrace.engine.util.errors import UserError

BASELINE = "latent_256"
"""What fine-tuning starts from at a reduced scale."""


class Scale(NamedTuple):
    """The sizes that every run of a scale has in common."""

    name: str
    device: str
    edge: int
    """Pixels of a picture's edge."""
    patch: int
    """Pixels of a token's edge."""
    width: int
    depth: int
    heads: int
    steps: int
    batch: int
    """Samples of a step."""
    micro_batch: int
    lr: dict[str, float]
    """Peak learning rate by kind of optimizer, where no sweep has found another."""
    solver_steps: int
    guidance: float
    curated: float = 0.1
    """Share of the training pictures that fine-tuning sees, the most typical of each class."""


LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""What the sweep tries, the same for every optimizer."""

SWEPT = ("latent_256", "latent_256_muon")
"""Configurations whose learning rate is swept, one of each optimizer; the others take their optimizer's."""

SCALES = {
    "cpu": Scale("cpu", "cpu", 16, 4, 64, 8, 2, 600, 32, 32, {"adamw": 4e-3, "muon": 4e-3}, 20, 1.0),
    "gpu": Scale("gpu", "cuda", 32, 2, 512, 16, 8, 20_000, 256, 256, {"adamw": 3e-4, "muon": 3e-4}, 28, 2.0),
}
"""`post`, the third scale, is not here: it runs the configurations as they are."""

VALIDATION = {"samples": 512, "times": 8, "caption": "long", "seed": 1138}
"""Held-out loss of the reduced scales."""
HELD_OUT_SHARE = 0.1
"""Share of the data that is held out where it has no part for that."""

FINE_TUNING = 0.2
"""Share of the steps that a run which starts from another one's weights has at a reduced scale."""


class Assets(NamedTuple):
    """Files that runs at a reduced scale use in place of those that the configurations name."""

    teacher: Path
    """A `SmallClassifier`, in place of DINO."""
    curated: Path
    """Keys of the pictures for fine-tuning, in place of another data set."""
    held_out: Path | None
    """Folder of the pictures of the held-out loss; None takes a share of the data."""

    def validation(self) -> dict[str, Any]:
        """Settings of `validation` that every run of a scale has: the same pictures, times and noise."""
        if self.held_out is None:
            return {**VALIDATION, "share": HELD_OUT_SHARE, "path": None}
        return {**VALIDATION, "share": 0.0, "source": "folder", "path": str(self.held_out)}


def open_config(name: str) -> Config:
    """A configuration by its file, or by the name of a file in configs/."""
    path = Path(name)
    return without_auto(load_config(path if path.suffix == ".json" else ROOT / "configs" / f"{name}.json"))


def set_source(config: Config, source: str) -> Config:
    """`config` on other data: `digits`, `builtin`, or a folder."""
    return parse_config(merge(config.model_dump(mode="json"), {"data": data_source(source)}), "--source")


def data_source(source: str) -> dict[str, Any]:
    """Settings of `data` that name the source."""
    if source in ("digits", "builtin"):
        return {"source": source, "path": None, "keys": None, "mixture": []}
    return {"source": "folder", "path": source, "keys": None, "mixture": []}


# What stands from here on is shown on the page of results.
def at_scale(config: Config, scale: Scale, source: str, assets: Assets) -> Config:
    """`config` with its technique as it is and its size that of `scale`, on other data.

    Kept: objective, policy and share of the routing, kind, weight and relative place of the alignment,
    optimizer but for its learning rate, precision, clipping, shape of the schedule, captions, stages.
    Changed: width, depth, resolution, steps, batch, learning rate, held-out pictures, and all that is
    pretrained: latents become pixels, the text encoder the hash tower, the teacher a classifier of this data
    set.
    """
    old, optimizer = config.model_dump(mode="json"), config.optimizer
    autoencoder, depth, steps = config.conditioning.autoencoder.kind, config.model.depth, config.run.steps
    if autoencoder not in ("pixels", "flux1"):
        raise UserError(f"the autoencoder {autoencoder} is what this row is about; run it with --scale post")
    if config.adapter.kind != "none":
        raise UserError("an adapter trains beside the weights of another run; run it with --scale post")
    if config.run.init_from:
        # What a fine-tuning changes are its pictures; it starts from the baseline's weights at this scale.
        stage = {"at": round((1 - FINE_TUNING) * steps), "name": "fine-tuning", "data": {"path": "curated"}}
        baseline = open_config(BASELINE).model_dump(mode="json")
        old = merge(baseline, {"run": {"steps": steps}, "stages": [stage]})
        return at_scale(parse_config(old, "fine-tuning"), scale, source, assets)

    def step(number: int) -> int:
        return max(1, round(number * scale.steps / steps))

    def block(number: int) -> int:
        return max(0, round((number + 1) * scale.depth / depth) - 1)

    rate = scale.lr[optimizer.kind] / optimizer.lr
    end = config.routing.last(depth)
    stages = []
    for given in config.stages:
        stage = {k: v for k, v in given.items() if k in ("name", "objective", "precision", "schedule")}
        stage["at"] = step(given["at"]) if given["at"] else 0
        data = given.get("data", {})
        stage["data"] = {k: v for k, v in data.items() if k == "long_caption"}
        if {"path", "keys", "source", "mixture"} & data.keys():
            stage["data"]["keys"] = str(assets.curated)
        if given.get("schedule", {}).get("warmup"):
            stage["schedule"] = stage["schedule"] | {"warmup": step(stage["schedule"]["warmup"])}
        if "lr" in given.get("optimizer", {}):
            stage["optimizer"] = {"lr": given["optimizer"]["lr"] * rate}
        for section, names in (("routing", ("drop",)), ("alignment", ("kind", "weight"))):
            stage[section] = {k: v for k, v in given.get(section, {}).items() if k in names}
        stages.append({k: v for k, v in stage.items() if v != {}})

    small: dict[str, Any] = {
        "run": {"steps": scale.steps, "device": scale.device, "compile": False, "init_from": None},
        "model": {
            "width": scale.width,
            "depth": scale.depth,
            "heads": scale.heads,
            "patch_size": scale.patch,
            "in_channels": 3,
            "bottleneck": scale.width // 4 if config.model.bottleneck else None,
            "context_dim": scale.width,
            "rope_axes": None,
        },
        "routing": {"end": scale.depth - (depth - end)} if config.routing.policy != "none" else {},
        "alignment": {
            "block": block(config.alignment.block),
            "projector_width": None,
            "teacher": {"kind": "classifier", "path": str(assets.teacher), "dtype": "float32", "cache": None},
            "until": step(config.alignment.until) if config.alignment.until else None,
        },
        "conditioning": {
            "text": {"kind": "hash", "path": None, "max_tokens": 64},
            "autoencoder": {"kind": "pixels", "path": None},
        },
        "data": data_source(source)
        | {"resolution": scale.edge, "aspect": "square", "crop": "center", "upscale": True, "workers": 0}
        | {"global_batch": scale.batch, "micro_batch": scale.micro_batch},
        "optimizer": {
            "lr": scale.lr[optimizer.kind],
            "muon": {"lr": optimizer.muon.lr * rate if optimizer.muon.lr else None},
        },
        "schedule": {"warmup": scale.steps // 20},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "sampling": {"every_steps": 0, "steps": scale.solver_steps, "guidance": scale.guidance},
        "evaluation": {"every_steps": 0},
        "validation": assets.validation(),
        "stages": stages,
    }
    return parse_config(merge(old, small), f"--scale {scale.name}")
