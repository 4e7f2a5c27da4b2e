"""Evaluation section: metrics of the model's samples, during training and afterwards."""

from typing import Literal

from pydantic import Field, model_validator

from millrace.engine.config.section import PathText, Section

MetricName = Literal["fid", "fid_prx", "cmmd", "dino_mmd"]
TITLES: dict[MetricName, str] = {
    "fid": "FID",
    "fid_prx": "FID of PRX (of negatives)",
    "cmmd": "CMMD",
    "dino_mmd": "DINO-MMD",
}
FEATURES_OF: dict[MetricName, str] = {"fid_prx": "fid"}
"""Whose feature network a metric has that has none of its own."""


class FeaturePaths(Section):
    """Weights of the feature networks: a local file or folder, or a hub id."""

    fid: PathText | None = None
    """Inception of FID, also of `fid_prx`: the file of torch-fidelity or pytorch-fid, or a folder with it
    (docs/evaluation.md). There is no default, because it is not on the hub."""
    cmmd: PathText | None = None
    """CLIP; default openai/clip-vit-large-patch14-336."""
    dino_mmd: PathText | None = None
    """DINOv2; default facebook/dinov2-with-registers-large."""

    def of(self, metric: MetricName) -> str | None:
        """Weights of the network of a metric."""
        return getattr(self, FEATURES_OF.get(metric, metric))


class Evaluation(Section):
    """Metrics of samples against reference pictures, and the defaults of `millrace evaluate`.

    Samples are made as `sampling` says: guidance, solver, steps, weights.
    """

    every_steps: int = Field(0, ge=0)
    """Steps between evaluations during training; 0 is never."""
    metrics: tuple[MetricName, ...] = ("fid", "cmmd", "dino_mmd")
    """What is computed. `fid_prx` is the FID of Photoroom/PRX's callback, which hands bytes to torchmetrics'
    `FrechetInceptionDistance(normalize=True)`: of the negatives, of both sets. It can be set beside the
    post's tables and nothing else."""
    samples: int = Field(10_000, ge=2)
    """Pictures that are sampled. Sample i has the caption of the i-th reference picture; where there are
    fewer, they come round again with other noise."""
    reference: PathText | None = None
    """Folder of pictures to compare with; null takes the pictures of `data`. Captions are those beside the
    pictures; for a folder without any they come from `data`."""
    reference_samples: int | None = Field(None, ge=2)
    """Reference pictures, taken in an order that is the same for every run; null takes as many as samples.
    There may be fewer."""
    caption: Literal["long", "short"] = "long"
    """Which caption of a picture that has two."""
    seed: int = Field(1138, ge=0, lt=2**63)
    """Of the samples' noise; sample i is a function of (seed, i)."""
    features: FeaturePaths = FeaturePaths()
    cache: PathText | None = None
    """Folder for statistics of reference pictures, which runs may share; null is `NAME.statistics` beside the
    folder of the pictures, or the user's cache where that cannot be written."""
    missing: Literal["error", "skip"] = "error"
    """What becomes of a run whose reference pictures or feature networks are not there. `skip` trains without
    the metrics that need them, and says in one line which those are and what they need."""

    @model_validator(mode="after")
    def _some_metric(self) -> "Evaluation":
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics is {list(self.metrics)}; name one or more, each once")
        return self
