"""Weight formats: diffusers' PRXTransformer2DModel, Photoroom/PRX state dicts and ours, read and written.

What each format calls a tensor is in `model/conversion.py`. diffusers itself is imported by `to_diffusers`
alone; everything else works without it.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from millrace.engine.checkpoint.damage import require_finite
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.config import Model, Routing
from millrace.engine.model.conversion import (
    CLASS_NAME,
    FUSION,
    RESOLUTION,
    State,
    denoiser_state,
    diffusers_config,
    diffusers_state,
    empty_denoiser,
    expect_state,
    infer_model,
    model_config,
    prx_state,
)
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import atomic_file, write_atomically
from millrace.engine.util.quiet_imports import quiet_imports
from millrace.engine.util.safetensors_file import write_safetensors

if TYPE_CHECKING:
    from diffusers import PRXTransformer2DModel

STEM = "diffusion_pytorch_model"
PRX_FILE = "denoiser.safetensors"
_NO_METADATA: Mapping[str, str] = {}
SHARD_BYTES = 5 * 10**9
"""Largest file of an exported folder, unless one tensor alone is larger."""


def to_diffusers(denoiser: Denoiser) -> "PRXTransformer2DModel":
    """A diffusers model with copies of the weights, on their device and in their dtype."""
    try:
        with quiet_imports():
            from diffusers import PRXTransformer2DModel
    except ImportError:
        raise UserError(
            f"diffusers.{CLASS_NAME} is not installed here: pip install 'diffusers>=0.42'"
        ) from None
    with torch.device("meta"):
        model = PRXTransformer2DModel(**diffusers_config(denoiser.config))
    state = diffusers_state(denoiser.state_dict(), denoiser.config)
    model.load_state_dict({name: part.clone() for name, part in state.items()}, assign=True)
    return model


def from_diffusers(model_or_folder: "PRXTransformer2DModel | str | Path") -> Denoiser:
    """A Denoiser with copies of the weights of a diffusers model, or with those of anything on disk that
    `load_weights` reads; in the dtype they have there."""
    routing = None
    if isinstance(model_or_folder, str | Path):
        state, config, routing = load_weights(model_or_folder)
    else:
        config = model_config(model_or_folder.config)
        state = denoiser_state(model_or_folder.state_dict(), config)
        state = {name: tensor.clone() for name, tensor in state.items()}
    denoiser = empty_denoiser(config, routing)
    denoiser.load_state_dict(state, assign=True)
    return denoiser


def load_weights(path: str | Path, config: Model | None = None) -> tuple[dict[str, Tensor], Model, Routing]:
    """Read weights from disk: (tensors by their names in the Denoiser, its two configurations).

    The tensors are on the CPU in their stored dtype. The routing is that of a Millrace run; weights of other
    projects come without, so none of theirs is a SPRINT model.

    Args:
        path: a diffusers folder (of the transformer, or of a pipeline that has one), a Photoroom/PRX state
            dict (.safetensors, or .pt and .pth read with `weights_only`; plain, or under "model" or
            "state_dict"; or a folder that `save_prx` wrote), or a Millrace run or checkpoint folder (EMA
            weights where there are any).
        config: the model that the weights are wanted for; needed for a state dict of unpublished patches.

    Raises UserError if the file cannot be read, or does not hold the weights of `config`.
    """
    path = Path(path)
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    if (path / PRX_FILE).is_file():
        path = path / PRX_FILE
    if path.is_file():
        theirs = _read_state_dict(path)
        model = config or infer_model(theirs)
        return denoiser_state(theirs, model), model, Routing()
    if is_diffusers(folder):
        model = model_config(_read_json(folder / "config.json"), str(folder / "config.json"))
        _expect_model(model, config, path)
        return denoiser_state(_read_shards(folder), model), config or model, Routing()
    if path.is_dir():
        state, run = checkpoint_state(path)
        _expect_model(run.model, config, path)
        expect_state(state, run.model, run.routing, f"weights of {path}")
        return state, config or run.model, run.routing
    raise UserError(
        f"{path}: no such file or folder; give a local diffusers folder, a Photoroom/PRX state dict, or a "
        "Millrace run or checkpoint"
    )


def start_from(denoiser: Denoiser, path: str | Path) -> list[str]:
    """Copy weights from disk into a fresh denoiser; returns what there is to say about SPRINT's fusion layer
    and resolution tokens.

    Weights without them leave the denoiser's as they were initialised; a denoiser without a fusion layer
    leaves theirs out. Raises UserError as `load_weights` does, if both have a fusion layer, but for other
    blocks or in another order, and if the weights alone have resolution tokens.
    """
    weights, _, found = load_weights(path, denoiser.config)
    require_finite(weights, f"{path}: its weights")
    wanted, depth = denoiser.routing, denoiser.config.depth
    own = {name: tensor for name, tensor in denoiser.state_dict().items() if name.startswith(FUSION)}
    theirs = [name for name in weights if name.startswith(FUSION)]
    messages = []
    if own and theirs:
        has, needs = (
            {"start": r.start, "end": r.last(depth), "fuse_order": r.fuse_order} for r in (found, wanted)
        )
        differing = [f"{key} {has[key]} instead of {needs[key]}" for key in has if has[key] != needs[key]]
        if differing:
            raise UserError(f"{path} was trained with other routing: {', '.join(differing)}")
    elif own:
        weights |= own
        messages.append(f"warning: {path} has no SPRINT fusion layer; this run's starts from random weights")
    elif theirs:
        weights = {name: tensor for name, tensor in weights.items() if name not in theirs}
        messages.append(
            f"warning: {path} is a SPRINT model; its fusion layer is left out (routing.policy is "
            f"{wanted.policy}), and its blocks never ran without it"
        )
    tokens = {name: tensor for name, tensor in denoiser.state_dict().items() if name.startswith(RESOLUTION)}
    trained = any(name.startswith(RESOLUTION) for name in weights)
    if trained and not tokens:
        raise UserError(f"{path} was trained with resolution tokens; set model.resolution_tokens to true")
    if tokens and not trained:
        weights |= tokens
        messages.append(f"warning: {path} has no resolution tokens; this run's start from random weights")
    denoiser.load_state_dict(weights)
    return messages


def is_diffusers(folder: Path) -> bool:
    """Whether `folder` holds a diffusers model; a run's folder has a config.json too, of another kind."""
    settings = folder / "config.json"
    return settings.is_file() and "conditioning" not in _read_json(settings)


def _expect_model(found: Model, wanted: Model | None, path: Path) -> None:
    """Raise UserError, naming the settings, if weights of `found` mean something else in a `wanted` model."""
    if wanted is None:
        return
    has, needs = diffusers_config(found), diffusers_config(wanted)
    differing = [f"{key} {has[key]} instead of {needs[key]}" for key in has if has[key] != needs[key]]
    if differing:
        raise UserError(f"{path} is another model: {', '.join(differing)}")


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise UserError(f"{path}: cannot be read as a state dict: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict, which maps names to tensors and nothing else")
    return dict(state)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder, in one file or in shards."""
    index = folder / f"{STEM}.safetensors.index.json"
    files = {f"{STEM}.safetensors"}
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: there is no weight_map, which says what file holds which tensor")
        files = set(weight_map.values())
    return {
        name: tensor for file in sorted(files) for name, tensor in _read_state_dict(folder / file).items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, this is a {type(values).__name__}")
    return values


def save_diffusers(
    state: State,
    config: Model,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = _NO_METADATA,
) -> None:
    """Write our weights as `PRXTransformer2DModel.from_pretrained` reads them; `metadata` is for the headers.

    Needs memory for one shard beyond `state`. config.json is written last, so a folder that has it is
    complete. Raises UserError if `folder` has content, or for weights that do not fit `config`.
    """
    theirs = diffusers_state(state, config)
    folder = new_folder(folder)
    shards = _shard(theirs, dtype, max_shard_bytes)
    if len(shards) == 1:
        _write_tensors(theirs, shards[0], dtype, folder / f"{STEM}.safetensors", metadata)
    else:
        weight_map = {}
        for i, names in enumerate(shards, start=1):
            file = f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
            _write_tensors(theirs, names, dtype, folder / file, metadata)
            weight_map |= dict.fromkeys(names, file)
        total = sum(part.numel() for part in theirs.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{STEM}.safetensors.index.json", index)
    write_json(folder / "config.json", {"_class_name": CLASS_NAME, **diffusers_config(config)})


def save_prx(
    state: State,
    config: Model,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] = _NO_METADATA,
) -> None:
    """Write our weights as a Photoroom/PRX state dict, `denoiser.safetensors` in an empty `folder`."""
    theirs = prx_state(state, config)
    _write_tensors(theirs, theirs, dtype, new_folder(folder) / PRX_FILE, metadata)


def new_folder(folder: str | Path) -> Path:
    """`folder`, created where it is not there. Raises UserError if it has content or cannot be created."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    if occupied:
        raise UserError(f"{folder} is not empty; choose a new folder or empty this one")
    return folder


def _shard(state: State, dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Names in groups, in order, each of at most `limit` bytes or of one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_tensors(
    state: State, names: Iterable[str], dtype: torch.dtype, path: Path, metadata: Mapping[str, str]
) -> None:
    tensors = {name: state[name].to(dtype) for name in names}
    try:
        with atomic_file(path) as file:
            write_safetensors(file, tensors, {"format": "pt", **metadata})
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all. Raises UserError."""
    try:
        write_atomically(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
