"""Generate pictures from captions.

millrace sample --checkpoint runs/quickstart --prompt "a cup of coffee" --grid coffee.png
millrace sample --checkpoint runs/jit/checkpoints/step-00010000 --prompts-file p.txt --output out
millrace sample --checkpoint runs/jit --prompt "a fox" --prompt "a hen" --seed 1 2 --output out
millrace sample --checkpoint runs/quickstart --recall --grid recall.png
millrace sample --checkpoint runs/latent_256_sprint --prompt "a fox" --method path_drop --grid fox.png
millrace sample --checkpoint runs/latent_256_contrastive --compute-mean-target mean.safetensors
millrace sample --checkpoint my-diffusers-folder --config latent_256 --prompt "a fox" --grid fox.png
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from millrace.engine.cli import command_parser, number, run_command
from millrace.engine.util.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    from millrace.engine.sampling.model_arguments import add_model_arguments

    parser = command_parser(__doc__, "millrace sample")
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", action="append", metavar="CAPTION", help="a caption; may be given several times"
    )
    what.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="captions: text, one a line; .jsonl, an object or a text a line; or .json, a list of these",
    )
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
        "--seed",
        type=number(int, 0, 2**63 - 1),
        nargs="+",
        default=[0],
        metavar="N",
        help="of the noise that a picture starts from, one for all captions (default 0) or one for each: a "
        "caption and a seed give the same picture, alone or among others",
    )
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="height x width in pixels; default data.resolution"
    )
    parser.add_argument(
        "--grid", type=Path, metavar="FILE.png", help="write all pictures as one PNG with captions"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder that receives one PNG a picture"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Load weights and towers, sample, write."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    if not (arguments.grid or arguments.output or arguments.recall or arguments.compute_mean_target):
        parser.error("say where the pictures go: --grid FILE.png or --output FOLDER")
    if arguments.grid and arguments.grid.suffix != ".png":
        parser.error(f"--grid {arguments.grid}: the grid is a PNG, name it so")

    from millrace.engine.sampling.model_arguments import check_model_arguments

    check_model_arguments(arguments)
    prompts = _prompts(arguments)
    count = len(prompts) or 1
    if len(arguments.seed) not in (1, count):
        raise UserError(
            f"--seed: {len(arguments.seed)} seeds for {count} pictures; give one, or one for each"
        )

    from millrace.engine.sampling.trained_model import pinned_model

    with pinned_model(arguments):
        _sample(arguments, prompts)
    return 0


def _sample(arguments: argparse.Namespace, prompts: list[str]) -> None:
    from millrace.engine.config import guidance_warnings
    from millrace.engine.distributed.process_group import choose_device
    from millrace.engine.sampling.grids import Part, made_by, save_grid, save_picture
    from millrace.engine.sampling.trained_model import (
        describe_cost,
        load_model,
        open_sampler,
        training_mean_target,
    )

    weights, config, origin = load_model(arguments)
    device = choose_device(config.run.device)
    if (file := arguments.compute_mean_target) is not None:
        found = training_mean_target(config, arguments.checkpoint, device)
        found.save(file)
        per = "position" if config.data.aspect == "square" else "channel"
        print(f"mean target of {found.count} pictures, per {per}, in {file}")
        return
    sampler = open_sampler(weights, config, arguments.checkpoint, device)
    for warning in guidance_warnings(config.sampling, config.routing, config.objective):
        print(warning, file=sys.stderr)
    size = arguments.size or (config.data.resolution, config.data.resolution)
    if arguments.recall:
        from millrace.engine.evaluation.recall import training_recall

        seed = arguments.seed[0]
        found = training_recall(sampler, config, seed)
        pictures, prompts = found.pictures, found.prompts
        print(found.line)
        asked = {"prompts": prompts, "seeds": [seed] * len(prompts), "numbers": [*range(len(prompts))]}
        part = Part(pictures, prompts, "left: training picture, right: sample of its caption", found.own)
    else:
        # A seed is the number of its picture, so noise and routes do not depend on the place in the list.
        seeds = arguments.seed * (len(prompts) if len(arguments.seed) == 1 else 1)
        pictures = sampler(prompts, size, config.sampling, 0, seeds)
        asked = {"prompts": prompts, "seeds": seeds}
        part = Part(pictures, prompts)
    height, width = pictures.shape[2:]
    print(f"{origin}: {height} x {width} pixels")
    print(describe_cost(sampler, config, pictures))
    made = made_by(config.sampling, origin, (height, width))
    if arguments.grid:
        save_grid([part], arguments.grid, config.sampling.tile, made | asked)
        print(f"{len(pictures)} pictures in {arguments.grid}")
    if arguments.output:
        for i, picture in enumerate(pictures):
            own = {key: values[i : i + 1] for key, values in asked.items()}
            save_picture(picture, arguments.output / f"{i:05d}.png", made | own)
        print(f"{len(pictures)} pictures in {arguments.output}/")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as HEIGHTxWIDTH, for example 256x256")
    return int(found[1]), int(found[2])


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The captions of --prompt or --prompts-file; none of the other modes."""
    if arguments.prompts_file is None:
        for prompt in arguments.prompt or []:
            if not prompt.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in prompt):
                raise UserError(f"--prompt {prompt!a}: not UTF-8; the terminal has another encoding")
        return arguments.prompt or []
    from millrace.engine.data.captions import captions_listed
    from millrace.engine.data.reject_reasons import Rejected

    path = arguments.prompts_file
    try:
        prompts = captions_listed(path.read_bytes(), path.suffix)
    except OSError as error:
        raise UserError(f"--prompts-file {path}: cannot be read: {error.strerror or error}") from None
    except Rejected as problem:
        raise UserError(f"--prompts-file {path}: {problem.detail}; correct it") from None
    if not prompts:
        raise UserError(f"--prompts-file {path}: no caption in it")
    return prompts


if __name__ == "__main__":
    run_command(main)
