"""Generate pictures from captions.

python engine/sample.py --checkpoint runs/quickstart --prompt "a cup of coffee" --grid coffee.png
python engine/sample.py --checkpoint runs/jit/checkpoints/step-00010000 --prompts-file p.txt --output out
python engine/sample.py --checkpoint runs/quickstart --recall --grid recall.png
python engine/sample.py --checkpoint my-diffusers-folder --config configs/latent_256.json --prompt "a fox"
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is searched first, and engine/ has names (data, config) that others use too.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse

import torch
from torch import Tensor

from millrace.engine.cli import command_parser, run_command
from millrace.engine.conditioning.autoencoder import open_autoencoder
from millrace.engine.conditioning.text import open_text_tower
from millrace.engine.config import Config
from millrace.engine.config_file import dict_from_overrides, load_config, merge, parse_config
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.errors import UserError
from millrace.engine.export import PRX_FILE, is_diffusers, load_weights
from millrace.engine.metrics.nearest import recall
from millrace.engine.model.conversion import expect_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.objective.flow import FlowMatching
from millrace.engine.runtime.distributed import choose_device
from millrace.engine.runtime.precision import DTYPES
from millrace.engine.runtime.weights import checkpoint_folder, checkpoint_state
from millrace.engine.sampling import Sampler, save_grid


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
    parser.add_argument(
        "--weights", choices=("auto", "ema", "model"), default="auto", help="auto: EMA if there is one"
    )
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 is off")
    parser.add_argument("--solver", choices=("euler", "heun"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", metavar="HxW", help="height x width in pixels; default data.resolution")
    parser.add_argument("--grid", type=Path, help="write all pictures as one PNG")
    parser.add_argument("--output", type=Path, help="folder that receives one PNG a picture")
    arguments = parser.parse_args()
    if not (arguments.grid or arguments.output or arguments.recall):
        parser.error("say where the pictures go: --grid FILE.png or --output FOLDER")
    if arguments.grid and arguments.grid.suffix != ".png":
        parser.error(f"--grid {arguments.grid}: the grid is a PNG, name it so")
    return arguments


def main() -> int:
    """Load weights and towers, sample, write."""
    arguments = parse()
    weights, config = _load(arguments)
    device = choose_device(config.run.device)
    compute = DTYPES[config.precision.compute]
    expect_state(weights, config.model, config.routing, f"weights of {arguments.checkpoint}")
    denoiser = Denoiser(config.model, config.routing)
    denoiser.load_state_dict(weights)
    sampler = Sampler(
        denoiser.to(device).eval().requires_grad_(False),
        FlowMatching(config.objective, config.run.seed),
        open_autoencoder(config.conditioning.autoencoder, device),
        open_text_tower(config.conditioning.text, config.model.context_dim, device, compute),
        device,
        compute,
    )
    size = _size(arguments.size, config)
    if arguments.recall:
        pictures = _recall(sampler, config, arguments.seed)
    else:
        pictures = sampler(_prompts(arguments), size, config.sampling, arguments.seed)
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
    solver = {"steps": arguments.steps, "guidance": arguments.guidance, "solver": arguments.solver}
    given = {"sampling": {key: value for key, value in solver.items() if value is not None}}
    changes = merge(dict_from_overrides(arguments.overrides), given)
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
        return weights, parse_config(merge(values, changes), arguments.config)
    weights, config = checkpoint_state(checkpoint_folder(arguments.checkpoint), arguments.weights)
    return weights, parse_config(merge(config.model_dump(mode="json"), changes), str(arguments.checkpoint))


def _is_state_dict(path: Path) -> bool:
    """Whether `path` is PRX's form, which does not say what model it is."""
    return path.is_file() or (path / PRX_FILE).is_file()


def _holds_weights_only(path: Path) -> bool:
    """Whether `path` is exported weights (diffusers or PRX), not a run or one of its checkpoints."""
    return _is_state_dict(path) or any(map(is_diffusers, (path, path / "transformer")))


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
