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

import torch
from torch import Tensor

from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config, guidance_warnings
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.distributed.process_group import choose_device
from millrace.engine.evaluation.recall import recall
from millrace.engine.losses.contrastive import mean_target
from millrace.engine.model.flops import sampling_flops
from millrace.engine.model.guidance_branches import describe
from millrace.engine.sampling.grids import save_grid
from millrace.engine.sampling.sampler import (
    Sampler,
)
from millrace.engine.sampling.trained_model import (
    add_model_arguments,
    load_model,
    open_sampler,
    open_trained_autoencoder,
)
from millrace.engine.util.errors import UserError


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    add_model_arguments(parser)
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
    weights, config = load_model(arguments)
    device = choose_device(config.run.device)
    if arguments.compute_mean_target:
        return _compute_mean_target(arguments, config, device)
    sampler = open_sampler(weights, config, arguments.checkpoint, device)
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


def _compute_mean_target(arguments: argparse.Namespace, config: Config, device: torch.device) -> int:
    """Write the mean target of the training pictures, in evaluation's crops; per channel if sizes differ."""
    path, source = arguments.compute_mean_target, open_source(config.data)
    autoencoder = open_trained_autoencoder(config, arguments.checkpoint, device)
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
