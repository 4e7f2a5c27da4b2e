"""Generate pictures from captions.

python engine/sample.py --checkpoint runs/quickstart --prompt "a cup of coffee" --grid coffee.png
python engine/sample.py --checkpoint runs/jit/checkpoints/step-00010000 --prompts-file p.txt --output out
python engine/sample.py --checkpoint runs/quickstart --recall --grid recall.png
python engine/sample.py --checkpoint runs/latent_256_sprint --prompt "a fox" --method path_drop --grid fox.png
python engine/sample.py --checkpoint runs/latent_256_contrastive --compute-mean-target mean.safetensors
python engine/sample.py --checkpoint my-diffusers-folder --config configs/latent_256.json --prompt "a fox"
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is searched first, and engine/ has names (data, config) that others use too.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from millrace.engine.cli import command_parser, run_command
from millrace.engine.conditioning.text import open_text_tower
from millrace.engine.config import Config, Sampling, guidance_warnings
from millrace.engine.config.sampling import SELF_ONLY
from millrace.engine.config_file import dict_from_overrides, load_config, merge, parse_config
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.errors import UserError
from millrace.engine.export import PRX_FILE, is_diffusers, load_weights
from millrace.engine.metrics.nearest import recall
from millrace.engine.model.conversion import expect_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.evaluations import describe
from millrace.engine.model.flops import sampling_flops
from millrace.engine.objective.contrastive import mean_target
from millrace.engine.objective.flow import FlowMatching
from millrace.engine.runtime.distributed import choose_device
from millrace.engine.runtime.precision import DTYPES
from millrace.engine.runtime.weights import checkpoint_folder, checkpoint_state
from millrace.engine.sampling import Sampler, save_grid
from millrace.engine.tuned import open_trained


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="run folder, checkpoint folder, or diffusers folder"
    )
    parser.add_argument("--config", help="configuration for a folder that holds none (diffusers weights)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a caption; may be given several times")
    what.add_argument("--prompts-file", type=Path, help="text file with one caption a line")
    what.add_argument(
        "--recall",
        action="store_true",
        help="sample every training caption; count how often its own picture is the nearest training picture",
    )
    what.add_argument(
        "--compute-mean-target",
        type=Path,
        metavar="FILE",
        help="write the mean velocity target of the training pictures, for --mean-target; makes no pictures",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "ema2", "model"),
        default="auto",
        help="auto: EMA if there is one",
    )
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--guidance", type=float, help="scale of the guidance; 1 is off")
    parser.add_argument(
        "--method",
        choices=get_args(Sampling.model_fields["method"].annotation),
        help="what the guidance leads away from (docs/guidance.md)",
    )
    parser.add_argument("--solver", choices=("euler", "heun"))
    parser.add_argument(
        "--mean-target",
        type=Path,
        metavar="FILE",
        help="take back the shift of contrastive flow matching, with the weight of the training",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", metavar="HxW", help="height x width in pixels; default data.resolution")
    parser.add_argument("--grid", type=Path, help="write all pictures as one PNG")
    parser.add_argument("--output", type=Path, help="folder that receives one PNG a picture")
    arguments = parser.parse_args()
    if not (arguments.grid or arguments.output or arguments.recall or arguments.compute_mean_target):
        parser.error("say where the pictures go: --grid FILE.png or --output FOLDER")
    if arguments.grid and arguments.grid.suffix != ".png":
        parser.error(f"--grid {arguments.grid}: the grid is a PNG, name it so")
    return arguments


def main() -> int:
    """Load weights and towers, sample, write."""
    arguments = parse()
    weights, config = _load(arguments)
    device = choose_device(config.run.device)
    if arguments.compute_mean_target:
        return _compute_mean_target(arguments, config, device)
    compute = DTYPES[config.precision.compute]
    expect_state(weights, config.model, config.routing, f"weights of {arguments.checkpoint}")
    denoiser = Denoiser(config.model, config.routing)
    denoiser.load_state_dict(weights)
    autoencoder = open_trained(config, _run(arguments.checkpoint), device)
    edge = config.model.patch_size * autoencoder.factor
    sampler = Sampler(
        denoiser.to(device).eval().requires_grad_(False),
        FlowMatching(config.objective, config.run.seed, edge),
        autoencoder,
        open_text_tower(config.conditioning.text, config.model.context_dim, device, compute),
        device,
        compute,
    )
    for warning in guidance_warnings(config.sampling, config.routing, config.objective):
        print(warning, file=sys.stderr)
    size = _size(arguments.size, config)
    if arguments.recall:
        pictures = _recall(sampler, config, arguments.seed)
    else:
        pictures = sampler(_prompts(arguments), size, config.sampling, arguments.seed)
    print(_cost(sampler, config, pictures))
    if arguments.grid:
        save_grid(pictures, arguments.grid)
        print(f"{len(pictures)} pictures in {arguments.grid}")
    if arguments.output:
        for i, picture in enumerate(pictures):
            save_grid(picture[None], arguments.output / f"{i:05d}.png")
        print(f"{len(pictures)} pictures in {arguments.output}/")
    return 0


def _load(arguments: argparse.Namespace) -> tuple[dict[str, Tensor], Config]:
    """Weights, and the configuration that they were trained with under the command's overrides."""
    names = ("steps", "guidance", "solver", "method")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    changes = merge(dict_from_overrides(arguments.overrides), {"sampling": given})
    if arguments.method not in (None, "self"):
        # What the run had set for its own method would be refused beside another one.
        changes = merge({"sampling": Sampling().model_dump(mode="json", include=set(SELF_ONLY))}, changes)
    if _holds_weights_only(arguments.checkpoint):
        if not arguments.config:
            raise UserError(
                f"{arguments.checkpoint} holds weights only; add --config FILE for towers and objective"
            )
        wanted = load_config(arguments.config)
        weights, model, routing = load_weights(
            arguments.checkpoint, wanted.model if _is_state_dict(arguments.checkpoint) else None
        )
        # Such weights are of no SPRINT model, whatever the run was that the configuration is for.
        found = {"model": model.model_dump(mode="json"), "routing": routing.model_dump(mode="json")}
        values = wanted.model_dump(mode="json") | found
        return weights, _with_mean_target(merge(values, changes), arguments)
    weights, config = checkpoint_state(checkpoint_folder(arguments.checkpoint), arguments.weights)
    values = config.model_dump(mode="json")
    return weights, _with_mean_target(merge(values, changes), arguments)


def _with_mean_target(values: dict[str, Any], arguments: argparse.Namespace) -> Config:
    """The configuration of `values`, with --mean-target and the weight that goes with it."""
    if arguments.mean_target is not None:
        sampling = values["sampling"]
        sampling["mean_target"] = str(arguments.mean_target)
        sampling["contrastive"] = sampling["contrastive"] or values["objective"]["contrastive_weight"]
        if not sampling["contrastive"]:
            raise UserError(
                "--mean-target takes back what objective.contrastive_weight does, which is 0 for this model; "
                "leave it out, or --set sampling.contrastive"
            )
    return parse_config(values, arguments.config or str(arguments.checkpoint))


def _compute_mean_target(arguments: argparse.Namespace, config: Config, device: torch.device) -> int:
    """Write the mean target of the training pictures, in evaluation's crops; per channel if sizes differ."""
    path, source = arguments.compute_mean_target, open_source(config.data)
    autoencoder = open_trained(config, _run(arguments.checkpoint), device)
    edge = autoencoder.factor * config.model.patch_size

    def latents() -> Iterator[Tensor]:
        for i in range(len(source)):
            view = evaluation_view(source.image(i), config.data, edge, source.key(i))
            yield autoencoder.encode(view[None].to(device))

    per = "position" if config.data.aspect == "square" else "channel"
    found = mean_target(latents(), per, autoencoder.identity)
    found.save(path)
    print(f"mean target of {found.count} pictures, per {per}, in {path}")
    return 0


def _cost(sampler: Sampler, config: Config, pictures: Tensor) -> str:
    """What the sampling did, and the work of it by the shapes of the model."""
    edge = sampler.autoencoder.factor * config.model.patch_size
    image_tokens = (pictures.shape[2] // edge) * (pictures.shape[3] // edge)
    text_tokens = sampler.caption_tokens / len(pictures)
    empty_tokens = len(sampler.text_tower.encode([""]).embeddings)
    flops = sampling_flops(config, image_tokens, text_tokens, empty_tokens)
    alone = config.sampling.model_copy(update={"method": "none", "strong_drop": 0.0})
    unguided = sampling_flops(
        config.model_copy(update={"sampling": alone}), image_tokens, text_tokens, empty_tokens
    )
    return (
        f"sampling: {describe(config)}; {flops / 1e9:,.4f} GFLOP a picture, {flops / unguided:.3g} times "
        "those without guidance"
    )


def _is_state_dict(path: Path) -> bool:
    """Whether `path` is PRX's form, which does not say what model it is."""
    return path.is_file() or (path / PRX_FILE).is_file()


def _holds_weights_only(path: Path) -> bool:
    """Whether `path` is exported weights (diffusers or PRX), not a run or one of its checkpoints."""
    return _is_state_dict(path) or any(map(is_diffusers, (path, path / "transformer")))


def _run(path: Path) -> Path | None:
    """`path` if it is a run or one of its checkpoints, None if it is weights alone."""
    return None if _holds_weights_only(path) else path


def _size(text: str | None, config: Config) -> tuple[int, int]:
    if text is None:
        return config.data.resolution, config.data.resolution
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"--size {text}: write it as HEIGHTxWIDTH, for example 256x256")
    return int(height), int(width)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt:
        return arguments.prompt
    try:
        lines = arguments.prompts_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {arguments.prompts_file}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {arguments.prompts_file}: no caption in it")
    return prompts


def _recall(sampler: Sampler, config: Config, seed: int) -> Tensor:
    """Sample the long and the short caption of every training picture and print the share that comes back."""
    source = open_source(config.data)
    square = config.data.model_copy(update={"aspect": "square"})
    edge = sampler.autoencoder.factor * config.model.patch_size
    views = [evaluation_view(source.image(i), square, edge, source.key(i)) for i in range(len(source))]
    prompts, own = [], []
    for i in range(len(source)):
        for caption in dict.fromkeys(source.captions(i)):
            prompts.append(caption)
            own.append(i)
    size = (config.data.resolution, config.data.resolution)
    pictures = sampler(prompts, size, config.sampling, seed)
    share = recall(pictures, torch.stack(views), torch.tensor(own))
    print(
        f"recall: {share:.1%} of {len(prompts)} training captions gave a picture whose nearest training "
        f"picture (of {len(source)}) is their own"
    )
    return pictures


if __name__ == "__main__":
    run_command(main)
