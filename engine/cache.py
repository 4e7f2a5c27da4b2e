"""Write the text and latent caches of a data set of shards, on any number of processes.

millrace cache text,latents --dataset photos-1024 --config latent_256
millrace cache latents --dataset photos-1024 --config latent_256 --replace
deepspeed engine/cache.py text --text-dtype int8 --dataset photos-1024 --config configs/latent_256.json

A command that was killed goes on where it was when it is given again.
"""

import argparse
import os
from collections.abc import Sequence
from typing import get_args

from millrace.engine.cli import add_config_arguments, command_parser, require_path, run_command


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = command_parser(__doc__, "millrace cache", launched=True)
    parser.add_argument(
        "kinds",
        type=cache_kinds,
        metavar="KINDS",
        help="text (outputs of the text encoder), latents (of the autoencoder), or text,latents",
    )
    parser.add_argument("--dataset", required=True, metavar="DATASET", help="folder of shards")
    add_config_arguments(parser)
    parser.add_argument(
        "--text-dtype",
        choices=("bf16", "int8"),
        default="bf16",
        help="of the stored rows of captions (default bf16)",
    )
    parser.add_argument("--replace", action="store_true", help="make caches of another network again")
    return parser


def cache_kinds(text: str) -> tuple[str, ...]:
    """Argument type: the kinds in `text,latents`."""
    from millrace.engine.config.data import CacheKind

    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in get_args(CacheKind)]
    if unknown or not kinds:
        wrong = (unknown or ["nothing"])[0]
        raise argparse.ArgumentTypeError(f"{text}: {wrong!r} is no cache; give text, latents or both")
    return kinds


def main(words: Sequence[str] | None = None) -> int:
    """Write the caches that the arguments ask for. Raises UserError."""
    arguments = build_parser().parse_args(words)
    require_path("--dataset", arguments.dataset)

    from millrace.engine.config.loading import load_config
    from millrace.engine.distributed.launchers import read_launcher

    config = load_config(arguments.config, arguments.overrides)
    read_launcher()

    import torch

    from millrace.engine.encoders.latent_cache_writer import write_caches
    from millrace.engine.planning.automatic import without_auto

    rank, world_size = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # DeepSpeed's launcher leaves all cores to every process.
        here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    write_caches(
        arguments.dataset,
        without_auto(config),
        arguments.kinds,
        rank,
        world_size,
        text_dtype=arguments.text_dtype,
        replace=arguments.replace,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
