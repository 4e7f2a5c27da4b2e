"""Pipeline folder: a model with all its frozen networks, as diffusers' PRX pipelines load it.

| trained on | predicts | pipeline         | noise                    | scheduler                     |
|------------|----------|------------------|--------------------------|-------------------------------|
| latents    | velocity | PRXPipeline      | N(0, 1)                  | FlowMatchEulerDiscreteScheduler |
| pixels     | sample   | PRXPixelPipeline | `noise_scale` of the run | with the run's `time_shift`     |

The two do not know any other pair, nor another floor of t than 0.05 in x-prediction.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from millrace.engine.checkpoint.weight_formats import new_folder, save_diffusers, write_json
from millrace.engine.config import Config
from millrace.engine.encoders.autoencoder import Latents, locate
from millrace.engine.encoders.text_encoder import open_text_encoder, text_encoder_entry
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.conversion import CLASS_NAME, State, diffusers_state
from millrace.engine.model.guidance_branches import TRAIN_TIMES
from millrace.engine.publishing.folded_scale import fold_scale
from millrace.engine.sampling.trained_model import open_trained_autoencoder
from millrace.engine.util.errors import UserError

INDEX = "model_index.json"
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_T_MIN = 0.05
"""Floor of t that PRXPixelPipeline divides by."""
_CPU = torch.device("cpu")

Components = Literal["copy", "reference"]


class Component(NamedTuple):
    """A frozen network of a pipeline."""

    name: str
    """Argument of the pipeline."""
    kind: tuple[str, str]
    """Library and class in model_index.json."""
    source: str
    """Folder or hub id of the weights that the run was trained with."""
    loading: str
    """Python that loads it from there."""


def pipeline_class(config: Config) -> str:
    """Name of the pipeline that samples as a run of `config` does. Raises UserError where none does."""
    objective, autoencoder = config.objective, config.conditioning.autoencoder
    pixels = autoencoder.kind == "pixels"
    name = "PRXPixelPipeline" if pixels else "PRXPipeline"
    wanted = "sample" if pixels else "velocity"
    problem = None
    if objective.prediction != wanted:
        space = "pixels" if pixels else "latents"
        problem = f"objective.prediction is {objective.prediction}; on {space} it samples {wanted}"
    elif pixels and objective.t_min != _T_MIN:
        problem = f"objective.t_min is {objective.t_min}; it divides by {_T_MIN} at least"
    elif not pixels and objective.noise_scale != 1.0:
        problem = f"objective.noise_scale is {objective.noise_scale}; it starts from noise of scale 1"
    elif autoencoder.form != "raw":
        problem = f"conditioning.autoencoder.form is {autoencoder.form}; it decodes raw latents"
    elif text_encoder_entry(config.conditioning.text.kind).component is None:
        problem = f"conditioning.text.kind is {config.conditioning.text.kind}, which diffusers does not have"
    if problem:
        raise UserError(
            f"diffusers' {name} cannot sample this model: {problem}; export the transformer alone, with "
            "--output"
        )
    return name


def frozen_components(config: Config) -> list[Component]:
    """Text encoder, tokenizer and, for latents, the autoencoder."""
    text = config.conditioning.text
    entry = text_encoder_entry(text.kind)
    source, (library, name, loading) = entry.source_of(text), entry.component
    tokenizer = f"transformers.AutoTokenizer.from_pretrained({source!r}, model_max_length={text.max_tokens})"
    found = [
        Component("text_encoder", (library, name), source, loading.format(source=source)),
        Component("tokenizer", ("transformers", "PreTrainedTokenizerFast"), source, tokenizer),
    ]
    if config.conditioning.autoencoder.kind != "pixels":
        origin = locate(config.conditioning.autoencoder)
        name, within = origin.network_class.__name__, ""
        if origin.subfolder:
            within = f", subfolder={origin.subfolder!r}"
        loading = f"diffusers.{name}.from_pretrained({origin.source!r}{within})"
        found.append(Component("vae", ("diffusers", name), origin.source, loading))
    return found


def save_pipeline(
    state: State,
    config: Config,
    folder: str | Path,
    checkpoint: Path,
    components: Components = "copy",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> list[Component]:
    """Write a pipeline; returns its frozen networks. model_index.json is written last.

    Args:
        state: weights of the denoiser.
        config: of the run.
        folder: new or empty.
        checkpoint: whose autoencoder it is, if the run tuned one.
        components: `copy` writes the frozen networks in the dtypes that the run computes them in;
            `reference` names their sources, and whoever loads the pipeline hands them over.
        dtype, metadata: of the transformer, as `save_diffusers`.

    Raises UserError for a model that no pipeline samples, for networks that cannot be loaded, and for a
    folder with content.
    """
    name = pipeline_class(config)
    diffusers_state(state, config.model)  # which refuses what diffusers has no place for
    tuned = config.conditioning.autoencoder.tuning.enabled
    if components == "reference" and tuned:
        raise UserError(
            "the run tuned its autoencoder (conditioning.autoencoder.tuning), which is nowhere else; export "
            "with --components copy"
        )
    frozen = frozen_components(config)
    folder = new_folder(folder)
    save_diffusers(state, config.model, folder / "transformer", dtype, metadata=metadata or {})
    scheduler = {
        "_class_name": _SCHEDULER,
        "num_train_timesteps": TRAIN_TIMES,
        "shift": config.objective.time_shift,
    }
    write_json(new_folder(folder / "scheduler") / "scheduler_config.json", scheduler)
    kinds = {each.name: list(each.kind) for each in frozen}
    try:
        if components == "copy":
            kinds |= _copy_networks(config, checkpoint, folder)
            for path in folder.glob("*/*.safetensors"):  # which their libraries let only the owner read
                shutil.copymode(folder / "scheduler" / "scheduler_config.json", path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": _diffusers_version(),
        "default_sample_size": config.data.resolution,
        "scheduler": ["diffusers", _SCHEDULER],
        "transformer": ["diffusers", CLASS_NAME],
        **kinds,
    }
    if name == "PRXPixelPipeline":
        index |= {
            "noise_scale": noise_scale(config),
            "prompt_max_tokens": config.conditioning.text.max_tokens,
        }
    if components == "reference":
        index["_references"] = {each.name: each.source for each in frozen}
    write_json(folder / INDEX, index)
    return frozen


def noise_scale(config: Config) -> float:
    """Standard deviation of the noise at `data.resolution`, of a model on pixels."""
    patch, side = config.model.patch_size, config.data.resolution // config.model.patch_size
    return FlowMatching(config.objective, 0, patch).noise_scale((side, side))


def _copy_networks(config: Config, checkpoint: Path, folder: Path) -> dict[str, list[str]]:
    """Write the frozen networks; what model_index.json says of those that are known only now."""
    compute = getattr(torch, config.precision.compute)
    text = config.conditioning.text.model_copy(update={"kernels": "hf"})
    encoder = open_text_encoder(text, config.model.context_dim, _CPU, compute)
    encoder.save(folder)
    known = {"tokenizer": ["transformers", type(encoder.tokenizer).__name__]}
    del encoder
    if config.conditioning.autoencoder.kind != "pixels":
        latents = open_trained_autoencoder(config, checkpoint, _CPU)
        assert isinstance(latents, Latents)
        fold_scale(latents).save_pretrained(folder / "vae")
    return known


def _diffusers_version() -> str:
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return "0.42.1"  # the first with both pipelines
