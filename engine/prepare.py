"""Make a data set of shards from a folder of pictures, Parquet files or WebDataset tars.

python engine/prepare.py --input photos --output photos-1024 --resolution 1024
python engine/prepare.py --input train-00000.parquet --output set --resolution 512 --caption-column text
python engine/prepare.py --input tars --output set --resolution 256 --patch 16 --workers 32
python engine/prepare.py --verify photos-1024
python engine/prepare.py --cache text,latents --dataset photos-1024 --config configs/latent_256.json
deepspeed engine/prepare.py --cache text --text-dtype int8 --dataset photos-1024 --config CONFIG.json

A command that was killed goes on where it was when it is given again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is searched first, and engine/ has names (data, config) that others use too.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
import os
from typing import get_args

from millrace.engine.cli import command_parser, run_command
from millrace.engine.data.formats.shard_index import Manifest
from millrace.engine.data.latent_cache import Kind, cache_problems
from millrace.engine.data.prepare.settings import (
    Settings,
    parse_bytes,
)
from millrace.engine.data.prepare.shard_job import prepare
from millrace.engine.data.prepare.verify import verify
from millrace.engine.util.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.cache is not None:
        return write_caches_command(options)
    if options.verify is not None:
        problems = verify(Path(options.verify), options.workers) + cache_problems(Path(options.verify))
        if problems:
            raise UserError("\n".join(problems))
        print(f"{options.verify}: every file is as its manifest says")
        return 0
    missing = [name for name in ("input", "output", "resolution") if getattr(options, name) is None]
    if missing:
        raise UserError(f"--{missing[0]} is missing; prepare.py --help has examples")
    settings = Settings(
        resolution=options.resolution,
        patch=options.patch,
        aspect=options.aspect,
        shard_bytes=options.shard_bytes,
        store=options.store,
        quality=options.quality,
        upscale=options.upscale,
        picture_column=options.picture_column,
        caption_columns=tuple(options.caption_column.split(",")) if options.caption_column else (),
    )
    output = Path(options.output)
    manifest, notes = prepare(Path(options.input), output, settings, options.workers, options.max_bad_share)
    for note in notes:
        print(note)
    for line in summary(output, manifest):
        print(line)
    return 0


def summary(output: Path, manifest: Manifest) -> list[str]:
    """Lines for people."""
    samples, seen = manifest.counts["samples"], manifest.counts["seen"]
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    lines = [
        f"{output}: {samples:,} of {seen:,} inputs in {len(manifest.shards)} shards of "
        f"{len(manifest.buckets)} buckets, {size:,.1f} MiB"
    ]
    for reason, n in manifest.rejects.items():
        lines.append(f"  rejected {n:,} {reason}, such as {manifest.reject_examples[reason][0]}")
    if manifest.rejects:
        lines.append(f"  {output / 'rejects.jsonl'} names them all")
    lines.append(f"look at {output / 'contact_sheet.png'} and {output / 'caption_lengths.png'}")
    lines.append(f"train with data.source=shards data.path={output} data.resolution={manifest.resolution}")
    return lines


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--input", metavar="PATH", help="folder, .parquet or .tar file")
    parser.add_argument("--output", metavar="FOLDER", help="folder to create, or to go on with")
    parser.add_argument("--resolution", type=_whole, help="edge in pixels of the square of a bucket's area")
    parser.add_argument("--patch", type=_whole, default=32, help="edges are multiples of this (default 32)")
    parser.add_argument(
        "--aspect",
        choices=("mixed", "square", "prx"),
        default="mixed",
        help="mixed: buckets from 1:2 to 2:1 in steps of the patch; prx: the sizes of the PRX pipeline",
    )
    parser.add_argument("--shard-bytes", type=_size, default=256 * 2**20, help="such as 256M (default)")
    parser.add_argument("--workers", type=_workers, default=os.cpu_count() or 1, help="processes; 0: none")
    parser.add_argument("--max-bad-share", type=_share, default=0.01, help="stop above it (default 0.01)")
    parser.add_argument(
        "--store",
        choices=("auto", "original"),
        default="auto",
        help="original: keep JPEG files as they are, however large",
    )
    parser.add_argument("--quality", type=_quality, default=95, help="of JPEG files made (default 95)")
    parser.add_argument("--upscale", action="store_true", help="take pictures smaller than their bucket")
    parser.add_argument("--picture-column", metavar="NAME", help="of Parquet files")
    parser.add_argument("--caption-column", metavar="NAME[,NAME]", help="of Parquet files; two: long,short")
    parser.add_argument("--verify", metavar="DATASET", help="compare a data set with its manifest instead")
    _add_cache_arguments(parser)
    return parser.parse_args(arguments)


def write_caches_command(options: argparse.Namespace) -> int:
    """Write the caches that the options ask for. Raises UserError."""
    for name in ("dataset", "config"):
        if getattr(options, name) is None:
            raise UserError(f"--cache needs --{name}; prepare.py --help has examples")
    kinds = cache_kinds(options.cache)
    # Imported here because the networks' packages take seconds, and no other mode needs them.
    import torch

    from millrace.engine.config.loading import load_config
    from millrace.engine.encoders.latent_cache_writer import write_caches

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


def cache_kinds(text: str) -> tuple[Kind, ...]:
    """The kinds in `text,latents`, as given on the command line. Raises UserError."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in get_args(Kind)]
    if unknown or not kinds:
        wrong = (unknown or ["nothing"])[0]
        raise UserError(f"--cache {text}: {wrong!r} is no cache; give text, latents or both")
    return kinds


def _add_cache_arguments(parser: argparse.ArgumentParser) -> None:
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


def _whole(text: str) -> int:
    if not 0 < int(text) < 2**16:
        raise ValueError(text)
    return int(text)


def _workers(text: str) -> int:
    if not 0 <= int(text) <= 1024:
        raise ValueError(text)
    return int(text)


def _quality(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise ValueError(text)
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


def _size(text: str) -> int:
    return parse_bytes(text)


if __name__ == "__main__":
    run_command(main)
