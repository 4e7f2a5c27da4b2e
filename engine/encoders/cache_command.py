"""`prepare.py --cache`: its arguments, and the call."""

import argparse
import os

from millrace.engine.util.errors import UserError


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--cache`."""
    group = parser.add_argument_group("caches, on any number of processes (deepspeed, torchrun)")
    group.add_argument("--cache", metavar="text,latents", help="write these caches of a data set of shards")
    group.add_argument("--dataset", metavar="DATASET", help="the data set")
    group.add_argument("--config", metavar="FILE", help="configuration whose conditioning names the networks")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="override one value of it",
    )
    group.add_argument(
        "--text-dtype", choices=("bf16", "int8"), default="bf16", help="of the stored rows (default bf16)"
    )
    group.add_argument("--replace", action="store_true", help="make caches of another network again")
    group.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run_cache_command(options: argparse.Namespace) -> int:
    """Write the caches that the options ask for. Raises UserError."""
    for name in ("dataset", "config"):
        if getattr(options, name) is None:
            raise UserError(f"--cache needs --{name}; prepare.py --help has examples")
    # Imported here because torch and the networks take seconds, and the rest of prepare.py needs neither.
    import torch

    from millrace.engine.config.loading import load_config
    from millrace.engine.encoders.latent_cache_writer import (
        cache_kinds,
        write_caches,
    )

    kinds = cache_kinds(options.cache)
    config = load_config(options.config, options.overrides)
    rank, world_size = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # DeepSpeed's launcher leaves all cores to every process.
        here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    write_caches(
        options.dataset,
        config,
        kinds,
        rank,
        world_size,
        text_dtype=options.text_dtype,
        replace=options.replace,
    )
    return 0
