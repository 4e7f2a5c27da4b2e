"""Weight formats: diffusers' PRXTransformer2DModel, Photoroom/PRX state dicts and ours, read and written.

What each format calls a tensor is in `model/conversion.py`. diffusers itself is imported by `to_diffusers`
alone; everything else works without it.
"""

import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from millrace.engine.checkpoint.damage import require_finite
from millrace.engine.checkpoint.model_weights import (
    checkpoint_config,
    checkpoint_folder,
    choose_weights,
    describe_checkpoint,
    read_weights,
)
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
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
from millrace.engine.util.hub import local_weights
from millrace.engine.util.quiet_imports import quiet_imports
from millrace.engine.util.safetensors_file import write_safetensors

if TYPE_CHECKING:
    from diffusers import PRXTransformer2DModel

STEM = "diffusion_pytorch_model"
PRX_FILE = "denoiser.safetensors"
ORIGIN = "millrace_origin"
"""In the header of an exported file: which checkpoint, step and weights it was made of."""
_WRAPPERS = re.compile(
    r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|(?<=\.)module\."
)
"""What DistributedDataParallel, torch.compile, FSDP and recomputation put into names."""
_PRX_MODEL, _PRX_EMA, _PRX_EMA_ACTIVE = "denoiser.", "ema_denoiser.model.", "ema_denoiser._is_active"
"""Names in a checkpoint of Photoroom/PRX's training pipeline."""
_NUMPY = [
    numpy.ndarray,
    numpy.dtype,
    numpy.random.get_state()[1].__reduce__()[0],
    type(numpy.dtype(numpy.uint32)),
]
"""A Composer checkpoint has the state of NumPy's generator, an array of integers."""
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
        state, config, routing, _ = load_weights(model_or_folder)
    else:
        config = model_config(model_or_folder.config)
        state = denoiser_state(model_or_folder.state_dict(), config)
        state = {name: tensor.clone() for name, tensor in state.items()}
    denoiser = empty_denoiser(config, routing)
    denoiser.load_state_dict(state, assign=True)
    return denoiser


class Weights(NamedTuple):
    """Weights of a denoiser, and what is known of them."""

    state: dict[str, Tensor]
    """By their names in the Denoiser, on the CPU in their stored dtype."""
    model: Model
    routing: Routing
    """Of a Millrace run; weights of other projects come without, so none of theirs is a SPRINT model."""
    origin: str
    """For people: form, place, EMA or not, step."""


def load_weights(path: str | Path, config: Model | None = None) -> Weights:
    """Read weights in any form.

    Args:
        path: a diffusers folder (of the transformer, or of a pipeline that has one); the name of a repository
            of the hub with one, `OWNER/NAME` or `OWNER/NAME@REVISION`; a Photoroom/PRX state dict
            (.safetensors, or .pt and .pth read with `weights_only`; what wraps it there is taken off, see
            `unwrap_state`; or a folder that `save_prx` wrote); a Millrace run or checkpoint folder (EMA
            weights where there are any).
        config: the model that the weights are wanted for; needed for a state dict of unpublished patches.

    Raises UserError if the file cannot be read, or does not hold the weights of `config`.
    """
    name, path = path, local_weights(path)
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    if (path / PRX_FILE).is_file():
        path = path / PRX_FILE
    if path.is_file():
        theirs, what = _read_state_dict(path)
        model = config or infer_model(theirs)
        origin = _with_stored_origin(f"{what} of the state dict {path}", [path])
        return Weights(denoiser_state(theirs, model), model, Routing(), origin)
    if is_diffusers(folder):
        model = model_config(_read_json(folder / "config.json"), str(folder / "config.json"))
        _expect_model(model, config, path)
        form = "diffusers folder" if folder == path else "diffusers pipeline"
        origin = _with_stored_origin(f"weights of the {form} {name}", folder.glob("*.safetensors"))
        return Weights(denoiser_state(_read_shards(folder), model), config or model, Routing(), origin)
    if path.is_dir():
        reader = CheckpointReader(checkpoint_folder(path))
        kind, run = choose_weights(reader), checkpoint_config(reader)
        state = read_weights(reader, kind)
        _expect_model(run.model, config, path)
        expect_state(state, run.model, run.routing, f"weights of {path}")
        return Weights(state, config or run.model, run.routing, describe_checkpoint(reader, kind))
    raise UserError(
        f"{path}: no such file or folder; give a diffusers folder, the name of one on the hub, a "
        "Photoroom/PRX state dict, or a Millrace run or checkpoint"
    )


def unwrap_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """A denoiser's tensors out of what training programs put around them, and which weights they are.

    Composer nests them under "state" and "model", others under "model" or "state_dict".
    DistributedDataParallel prefixes names with "module."; torch.compile, FSDP and recomputation have infixes
    of their own. Photoroom/PRX's training pipeline holds the denoiser, its EMA where one is kept, and frozen
    networks, which are left out.
    """
    for key in ("state", "model", "state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    named = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    average = {n.removeprefix(_PRX_EMA): v for n, v in named.items() if n.startswith(_PRX_EMA)}
    if average and bool(named.get(_PRX_EMA_ACTIVE, True)):
        return average, "EMA weights"
    own = {n.removeprefix(_PRX_MODEL): v for n, v in named.items() if n.startswith(_PRX_MODEL)}
    return own or named, "weights"


def stored_metadata(files: Iterable[Path]) -> dict[str, str]:
    """What the header of the first safetensors file says beside its tensors; empty if nothing. Raises
    UserError for a file that cannot be read."""
    for file in sorted(files):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    return dict(opened.metadata() or {})
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: cannot be read: {error}") from None
    return {}


def _with_stored_origin(text: str, files: Iterable[Path]) -> str:
    """`text`, and of which checkpoint they were exported where the files say so."""
    origin = stored_metadata(files).get(ORIGIN)
    return f"{text} ({origin})" if origin else text


def start_from(denoiser: Denoiser, path: str | Path, heads: Sequence[str] = ()) -> list[str]:
    """Copy weights in any form into a fresh denoiser; returns a line that says which they are, how many
    tensors were taken and which were left new, and warnings about SPRINT's fusion layer and resolution
    tokens. `heads` are parameters of the training model that no such weights have.

    Weights without them leave the denoiser's as they were initialised; a denoiser without a fusion layer
    leaves theirs out. Raises UserError as `load_weights` does, if both have a fusion layer, but for other
    blocks or in another order, and if the weights alone have resolution tokens.
    """
    weights, _, found, origin = load_weights(path, denoiser.config)
    require_finite(weights, f"{path}: its weights")
    wanted, depth = denoiser.routing, denoiser.config.depth
    own = {name: tensor for name, tensor in denoiser.state_dict().items() if name.startswith(FUSION)}
    theirs = [name for name in weights if name.startswith(FUSION)]
    messages: list[str] = []
    new: set[str] = set()
    if own and theirs:
        has, needs = (
            {"start": r.start, "end": r.last(depth), "fuse_order": r.fuse_order} for r in (found, wanted)
        )
        differing = [f"{key} {has[key]} instead of {needs[key]}" for key in has if has[key] != needs[key]]
        if differing:
            raise UserError(f"{path} was trained with other routing: {', '.join(differing)}")
    elif own:
        weights |= own
        new |= own.keys()
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
        new |= tokens.keys()
        messages.append(f"warning: {path} has no resolution tokens; this run's start from random weights")
    new = [name for name in denoiser.state_dict() if name in new]
    denoiser.load_state_dict(weights)
    left = f"left new: {', '.join([*new, *heads])}" if new or heads else "none left new"
    return [f"init_from: {origin}: {len(weights) - len(new)} tensors, {left}", *messages]


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


def _read_state_dict(path: Path) -> tuple[dict[str, Tensor], str]:
    """The denoiser's tensors of a file, and which weights they are."""
    try:
        if path.suffix == ".safetensors":
            return unwrap_state(load_file(path))
        with torch.serialization.safe_globals(_NUMPY):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise UserError(f"{path}: cannot be read as a state dict: {reason}") from None
    found, what = unwrap_state(state) if isinstance(state, Mapping) else ({}, "")
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: not a state dict, which maps names to tensors and nothing else")
    return found, what


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
        name: tensor for file in sorted(files) for name, tensor in _read_state_dict(folder / file)[0].items()
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
