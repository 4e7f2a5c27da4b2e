"""Everything a user can set, on one page.

A run is one JSON file. `extends` names another file (relative to the first) whose values it starts from;
`--set a.b=c` overrides single values; unknown keys are refused with the nearest valid name. The file
that a run resolved to is saved beside its checkpoints.

Units: sizes in pixels or tokens as said, times in optimizer steps unless the name says seconds.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused, defaults validated too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


Share = Annotated[float, Field(ge=0, lt=1)]


class ActivationCheckpointing(Section):
    """What backward recomputes instead of keeping."""

    policy: Literal["none", "full", "selective"] = "none"
    """`none` keeps every activation; `full` recomputes whole blocks in backward; `selective` keeps the
    outputs of matrix products and attention and recomputes the element-wise rest."""
    every: int = Field(1, ge=1)
    """Apply the policy to every n-th block: 2 halves the memory saved and the work repeated."""


class Run(Section):
    """The run as a whole: where, how long, on what."""

    output_dir: str = "runs/default"
    """Folder that receives checkpoints, log.jsonl, TensorBoard events and sample grids."""
    steps: int = Field(100_000, ge=1)
    """Optimizer steps of the whole run."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Base of all randomness: weights, order, noise, time, crops, caption choice and caption drop."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    compile: bool = False
    """`torch.compile` each block (all blocks share one compiled graph)."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    init_from: str | None = None
    """Start from these weights instead of random ones: a diffusers folder, a Photoroom/PRX state-dict
    file (.safetensors or .pt), or a Millrace checkpoint folder. Optimizer and step start anew."""
    max_bad_steps: int = Field(10, ge=1)
    """Stop after this many steps in a row were skipped because a loss or gradient was not finite."""


AttentionBackend = Literal["auto", "reference", "triton", "sdpa", "varlen", "flash_attn", "xformers"]


class Model(Section):
    """The PRX denoiser (a single-stream DiT with static text keys)."""

    width: int = Field(1792, ge=8)
    """C, features of a token."""
    depth: int = Field(16, ge=1)
    """Number of blocks."""
    heads: int = Field(28, ge=1)
    """H, attention heads; head_dim = width / heads."""
    mlp_ratio: float = Field(3.5, gt=0)
    """F / C of the GeGLU MLP."""
    patch_size: int = Field(2, ge=1)
    """Edge of a square patch, in latent positions or pixels."""
    in_channels: int = Field(16, ge=1)
    """Channels of the latent (16 FLUX.1, 32 FLUX.2 and DC-AE) or 3 for pixels."""
    bottleneck: int | None = Field(None, ge=1)
    """Width of the linear bottleneck of the patch embedding (JiT), or null for a single linear layer."""
    context_dim: int = Field(2304, ge=1)
    """Features of a text token as the text tower emits it."""
    rope_axes: tuple[int, int] | None = None
    """Head features that encode the row and the column; default half of head_dim each."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the RoPE frequencies."""
    resolution_embedding: bool = False
    """Add an embedding of (height, width) to the time vector (PRX's 7 B pixel model)."""
    attention_backend: AttentionBackend = "auto"
    """How `rope_attention` computes: plain PyTorch, own fused kernels, or own prologue and then torch's SDPA,
    torch's varlen attention, flash-attn or xformers; `auto` takes the fastest measured on this GPU."""

    @property
    def head_dim(self) -> int:
        """D, features of an attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """F, hidden features of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def axes(self) -> tuple[int, int]:
        """Head features that encode the row and the column."""
        return self.rope_axes or (self.head_dim // 2, self.head_dim // 2)

    @model_validator(mode="after")
    def _shapes(self) -> "Model":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if sum(self.axes) != self.head_dim or any(a % 2 for a in self.axes):
            raise ValueError(
                f"rope_axes {list(self.axes)} must be even and add up to head_dim {self.head_dim}"
            )
        return self


class Objective(Section):
    """Flow matching: x_t = (1-t) x0 + t n, v = n - x0; t = 0 is data and t = 1 noise."""

    prediction: Literal["velocity", "sample"] = "velocity"
    """What the network outputs: v, or x0 (x-prediction, compared in v-space)."""
    t_min: float = Field(0.05, gt=0, lt=1)
    """Floor of t in the division (x_t - x) / max(t, t_min) of x-prediction."""
    time_shift: float = Field(1.0, gt=0)
    """s of t -> s t / (1 + (s-1) t): 1 for latents, 3 for pixels at 1024 px; also in sampling."""
    time_uniform: float = Field(0.1, ge=0, le=1)
    """Share of samples whose t is uniform instead of logit-normal."""
    time_floor: float = Field(1e-3, gt=0, lt=0.5)
    """Smallest t that is trained."""
    noise_scale: float = Field(1.0, gt=0)
    """Standard deviation of the noise."""
    contrastive_weight: float = Field(0.0, ge=0, lt=1)
    """Lambda of contrastive flow matching (arXiv 2506.05350); 0 is off, 0.05 the post's value."""


def _usual_drop(routing: dict[str, Any]) -> float:
    return 0.75 if routing.get("policy") == "sprint" else 0.5


class Routing(Section):
    """Which tokens run through which blocks during training."""

    policy: Literal["none", "tread", "sprint"] = "none"
    """`tread` (arXiv 2501.04765) lets a random share of tokens bypass a span of blocks. `sprint` (arXiv
    2510.21986) lets all tokens bypass it and fuses them with the few that ran, in a layer of its own; the
    defaults are Photoroom/PRX's, `configs/latent_256_sprint_paper.json` is the paper's form."""
    start: int = Field(2, ge=0)
    """First routed block (0-based)."""
    end: int | None = Field(None, ge=0)
    """Last routed block, inclusive; default depth - 4."""
    drop: float = Field(default_factory=_usual_drop, gt=0, lt=1)
    """Share of tokens that do not run through the span; default 0.5, for `sprint` 0.75."""
    structured: bool = False
    """`sprint`: drop the same number of tokens in each square of 2 x 2 or 4 x 4, instead of anywhere."""
    fuse_order: Literal["dense_deep", "deep_dense"] = "dense_deep"
    """`sprint`: which stream comes first in the fusion layer's input."""
    mask_token: Literal["learned", "frozen"] = "learned"
    """`sprint`: what the fusion layer gets for tokens that did not run, a parameter that starts at zero or a
    fixed random vector."""
    path_drop: float = Field(0.0, ge=0, lt=1)
    """`sprint`: share of samples for which none of the tokens counts as having run."""

    def last(self, depth: int) -> int:
        """Index of the last routed block of `depth`: as set, or depth - 4 (TREAD's absolute rule)."""
        return depth - 4 if self.end is None else self.end

    @model_validator(mode="after")
    def _of_sprint(self) -> "Routing":
        if self.policy != "sprint":
            for name in ("structured", "fuse_order", "mask_token", "path_drop"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} belongs to policy sprint, but policy is {self.policy}; remove one of the two"
                    )
        if self.structured and not (16 * self.drop).is_integer():
            raise ValueError(f"structured drops whole sixteenths of the tokens; drop {self.drop} is none")
        return self


class TextTower(Section):
    """The frozen network that turns captions into text tokens."""

    kind: Literal["hash", "t5gemma", "qwen3vl"] = "hash"
    """`hash` maps words to fixed Gaussian vectors: it has no weights and knows no language, and is there so
    that everything runs anywhere. `t5gemma` and `qwen3vl` are the towers of the PRX models."""
    path: str | None = None
    """Local folder or hub id of the tower's weights; default the published one on the hub."""
    max_tokens: int = Field(256, ge=1)
    """Longer captions are cut here; the log counts how many were."""


class Autoencoder(Section):
    """The frozen network that turns pictures into latents."""

    kind: Literal["pixels", "flux1", "flux2", "repa_e", "dc_ae"] = "flux1"
    """`pixels` trains on pixels in [-1, 1]; the others encode with that autoencoder."""
    path: str | None = None
    """Local folder or hub id of the autoencoder's weights; default the published one on the hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the encoder."""


class Conditioning(Section):
    """The frozen networks around the denoiser."""

    text: TextTower = TextTower()
    autoencoder: Autoencoder = Autoencoder()
    caption_drop: float = Field(0.1, ge=0, lt=1)
    """Share of samples trained with the empty caption, for classifier-free guidance."""


class Data(Section):
    """Pictures, captions, crops and batches."""

    source: Literal["builtin", "folder"] = "builtin"
    """`builtin`: the photographs that ship inside scikit-image and scikit-learn, captioned for this project.
    `folder`: images with a .txt or .json file of the same name beside each."""
    path: str | None = None
    """Folder of `source: folder`."""
    resolution: int = Field(256, ge=1)
    """Edge in pixels of a square picture, or of the square with the same area in `mixed`."""
    aspect: Literal["square", "mixed"] = "square"
    """`mixed` keeps each picture near its own aspect ratio (between 1:2 and 2:1), in one batch."""
    crop: Literal["random", "center"] = "random"
    """`random` scales and places the crop differently each time; `center` takes the largest centred crop."""
    crop_scale: float = Field(0.8, gt=0, le=1)
    """Smallest edge of a random crop as a share of the largest possible crop."""
    flip: float = Field(0.0, ge=0, le=1)
    """Share of samples mirrored left to right."""
    upscale: bool = False
    """Allow pictures smaller than the crop to be enlarged; otherwise they are an error."""
    long_caption: float = Field(0.5, ge=0, le=1)
    """Share of samples that get the long caption, where a picture has both."""
    global_batch: int = Field(256, ge=1)
    """Samples of one optimizer step, over all processes and micro-batches."""
    micro_batch: int = Field(32, ge=1)
    """Samples of one forward pass of one process."""
    workers: int = Field(4, ge=0)
    """Threads that decode pictures in each process; 0 decodes in the training thread."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches prepared ahead."""
    max_bad_share: float = Field(0.0, ge=0, lt=1)
    """Share of unreadable pictures that is tolerated (each counted and named); above it the run stops."""

    @model_validator(mode="after")
    def _path(self) -> "Data":
        if self.source == "folder" and not self.path:
            raise ValueError("source folder needs data.path")
        return self


class Optimizer(Section):
    """The update of the weights."""

    kind: Literal["adamw"] = "adamw"
    """AdamW, fused on CUDA."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(1e-15, ge=0)
    """The post's value; it needs the second moment in FP32."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled: weights shrink by lr * weight_decay a step."""
    clip: float = Field(0.2, ge=0)
    """Largest global gradient norm (0.2 in PRX's recipe); 0 is off."""


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
    every: int = Field(10, ge=1)
    """Steps between updates."""
    start: int = Field(0, ge=0)
    """The average starts as a copy of the weights at this step."""


class Precision(Section):
    """What is computed and what is stored in which dtype."""

    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of matrix products and attention; norms, softmax, RoPE and loss are FP32 in any case."""
    master: Literal["float32", "bfloat16"] = "float32"
    """Storage of weights, optimizer state and EMA. `bfloat16` is the post's bug, kept as an experiment."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the gradient reduction between processes."""


class Checkpoint(Section):
    """When the state is saved and how much of it stays."""

    every_steps: int = Field(5_000, ge=1)
    """Steps between checkpoints; one is also written at the end and on SIGTERM or Ctrl-C."""
    keep: int = Field(3, ge=1)
    """How many of the newest checkpoints stay."""


class Logging(Section):
    """What a run tells, where."""

    every_steps: int = Field(10, ge=1)
    """Steps between reads of the device's loss buffer; log.jsonl has every step all the same."""
    tensorboard: bool = True
    """Write events to `tensorboard/` in the run's folder."""
    wandb: bool = False
    """Weights & Biases, if installed."""
    project: str = "millrace"
    """Project name for Weights & Biases."""


class Sampling(Section):
    """Pictures made during training, and the defaults of `engine/sample.py`."""

    every_steps: int = Field(0, ge=0)
    """Steps between sample grids during training; 0 is never."""
    prompts: tuple[str, ...] = ()
    """Captions of the grid; empty takes the first captions of the data."""
    count: int = Field(16, ge=1)
    """Pictures in the grid when `prompts` is empty."""
    steps: int = Field(28, ge=1)
    """Solver steps."""
    solver: Literal["euler", "heun"] = "euler"
    """`heun` evaluates the model twice a step."""
    guidance: float = Field(5.0, ge=0)
    """Scale of classifier-free guidance; 1 is off."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """`auto` takes EMA where the run has one."""


class Config(Section):
    """A run."""

    source: str = ""
    """Where this configuration comes from, e.g. the table and row of a publication that it reproduces."""
    run: Run = Run()
    model: Model = Model()
    objective: Objective = Objective()
    routing: Routing = Routing()
    conditioning: Conditioning = Conditioning()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    sampling: Sampling = Sampling()
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 0}})
    """Passed to DeepSpeed after a check that it names no key that the engine sets itself."""

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
        if routing.structured and self.data.aspect == "mixed":
            raise ValueError("routing.structured needs one grid for all pictures; set data.aspect to square")
        if self.sampling.weights == "ema" and not self.ema.enabled:
            raise ValueError("sampling.weights is ema, but ema.enabled is false")
        if self.precision.master == "bfloat16" and self.precision.compute != "bfloat16":
            raise ValueError("precision.master bfloat16 needs precision.compute bfloat16")
        return self


def route_end(config: Config) -> int:
    """Index of the last routed block of the run."""
    return config.routing.last(config.model.depth)
