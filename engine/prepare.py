"""Make a data set of shards from a folder of pictures, Parquet files or WebDataset tars.

millrace prepare --input photos --output photos-1024 --resolution 1024
millrace prepare --input train-00000.parquet --output set --resolution 512 --caption-column text
millrace prepare --input s3://bucket/tars --output set --resolution 256 --patch 16 --workers 32
millrace prepare --captions captions.jsonl --output photos-1024
millrace prepare verify photos-1024

A command that was killed goes on where it was when it is given again, and after edits of the input it reads
what has changed. --captions gives the pictures of a data set other captions. Caches: millrace cache.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.engine.cli import (
    byte_count,
    command_parser,
    number,
    require_local,
    require_path,
    run_command,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import is_url

if TYPE_CHECKING:
    from millrace.engine.data.formats.shard_index import Manifest

CAPTIONS = """Give the samples of a data set of shards other captions; no picture is touched.

millrace prepare --captions captions.jsonl --output photos-1024

FILE has a key and long, short or both a line, or caption for both: JSON lines or Parquet.
"""
VERIFY = """Compare a data set of shards, and its caches, with its manifest.

millrace prepare verify photos-1024
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of `millrace prepare`."""
    parser = command_parser(__doc__, "millrace prepare")
    parser.add_argument(
        "--input", required=True, metavar="PATH|URL", help="folder, .parquet or .tar file; .txt of URLs"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder to create, or to go on with"
    )
    parser.add_argument(
        "--resolution",
        required=True,
        type=number(int, 1, 2**16 - 1),
        metavar="PIXELS",
        help="edge of a square picture; pictures of other aspect ratios get about as many pixels",
    )
    parser.add_argument(
        "--patch",
        type=number(int, 1, 2**16 - 1),
        default=32,
        metavar="PIXELS",
        help="heights and widths are multiples of this: model.patch_size x the autoencoder's downsampling "
        "(default 32)",
    )
    parser.add_argument(
        "--aspect",
        choices=("mixed", "square", "prx"),
        default="mixed",
        help="mixed: sizes from 1:2 to 2:1 in steps of --patch (default); prx: those of Photoroom/PRX",
    )
    parser.add_argument(
        "--shard-bytes",
        type=byte_count,
        default=256 * 2**20,
        metavar="SIZE",
        help="size of a shard (default 256M)",
    )
    _add_workers(parser)
    parser.add_argument(
        "--max-bad-share",
        type=number(float, 0, 1),
        default=0.01,
        metavar="SHARE",
        help="stop if more than this share of the inputs cannot be read or has no caption (default 0.01); "
        "pictures that are only too small do not count",
    )
    parser.add_argument(
        "--store",
        choices=("auto", "original"),
        default="auto",
        help="auto: large pictures are made smaller (default); original: JPEG files are kept as they are",
    )
    parser.add_argument(
        "--quality",
        type=number(int, 1, 100),
        default=95,
        metavar="1..100",
        help="of JPEG files that are made (default 95)",
    )
    parser.add_argument(
        "--upscale", action="store_true", help="take pictures that are too small; else they are rejected"
    )
    parser.add_argument("--picture-column", metavar="NAME", help="column of Parquet files with the pictures")
    parser.add_argument(
        "--caption-column",
        metavar="NAME[,NAME]",
        help="column of Parquet files with the captions; two: long,short",
    )
    return parser


def build_verify_parser() -> argparse.ArgumentParser:
    """Arguments of `millrace prepare verify`."""
    parser = command_parser(VERIFY, "millrace prepare verify")
    parser.add_argument("dataset", metavar="DATASET", help="folder that millrace prepare made")
    _add_workers(parser)
    return parser


def build_captions_parser() -> argparse.ArgumentParser:
    """Arguments of `millrace prepare --captions`."""
    parser = command_parser(CAPTIONS, "millrace prepare")
    parser.add_argument("--captions", required=True, metavar="FILE", help="JSON lines, or .parquet")
    parser.add_argument(
        "--output", required=True, metavar="DATASET", help="folder that millrace prepare made"
    )
    _add_workers(parser)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=number(int, 0, 1024),
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default one a core); 0: none beside this one",
    )


def main(words: Sequence[str] | None = None) -> int:
    """Make a data set, or do what the subcommand says."""
    words = list(sys.argv[1:] if words is None else words)
    name, rest = _subcommand(words)
    if name == "verify":
        return verify_data_set(build_verify_parser().parse_args(rest))
    if name == "cache":
        from millrace.engine import cache

        return cache.main(rest)
    if any(word.partition("=")[0] == "--captions" for word in words):
        return recaption_data_set(build_captions_parser().parse_args(words))
    return make_data_set(build_parser().parse_args(rest))


def _subcommand(words: list[str]) -> tuple[str, list[str]]:
    """The subcommand and its arguments. `--verify DATASET` and `--cache KINDS` are its former spelling."""
    if words[:1] == ["verify"]:
        return "verify", words[1:]
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--verify", "--cache"):
            return flag[2:], words[:i] + ([value] if equals else []) + words[i + 1 :]
    return "", words


def verify_data_set(arguments: argparse.Namespace) -> int:
    """Compare a data set with its manifest. Raises UserError with one line per problem."""
    require_path("dataset", arguments.dataset)
    root = Path(arguments.dataset)

    from millrace.engine.data.latent_cache import cache_problems
    from millrace.engine.data.prepare.verify import verify

    problems = verify(root, arguments.workers) + cache_problems(root)
    if problems:
        raise UserError("\n".join(problems))
    print(f"{root}: every file is as its manifest says")
    return 0


def recaption_data_set(arguments: argparse.Namespace) -> int:
    """Give a data set other captions, and print what became of them."""
    require_path("--captions", arguments.captions)
    require_local("--output", arguments.output)

    from millrace.engine.data.prepare.recaptioning import recaption

    output = Path(arguments.output)
    done = recaption(output, Path(arguments.captions), arguments.workers)
    print(f"{output}: {done.changed:,} of {done.manifest.samples:,} samples have other captions than before")
    for line in done.notes:
        print(f"  {line}")
    return 0


def make_data_set(arguments: argparse.Namespace) -> int:
    """Make a data set of shards, and print what became of the inputs."""
    remote = is_url(arguments.input)
    if not remote:
        require_path("--input", arguments.input)
    require_local("--output", arguments.output)

    from millrace.engine.data.prepare.settings import Settings
    from millrace.engine.data.prepare.shard_job import prepare

    settings = Settings(
        resolution=arguments.resolution,
        patch=arguments.patch,
        aspect=arguments.aspect,
        shard_bytes=arguments.shard_bytes,
        store=arguments.store,
        quality=arguments.quality,
        upscale=arguments.upscale,
        picture_column=arguments.picture_column,
        caption_columns=tuple(arguments.caption_column.split(",")) if arguments.caption_column else (),
    )
    output, workers = Path(arguments.output), arguments.workers
    source = arguments.input if remote else Path(arguments.input)
    manifest, notes = prepare(source, output, settings, workers, arguments.max_bad_share)
    for line in [*notes, *summary(output, manifest)]:
        print(line)
    return 0


def summary(output: Path, manifest: "Manifest") -> list[str]:
    """Lines for people."""
    samples, seen = manifest.counts["samples"], manifest.counts["seen"]
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    lines = [
        f"{output}: {samples:,} of {seen:,} inputs in {len(manifest.shards)} shards of "
        f"{len(manifest.buckets)} buckets, {size:,.1f} MiB"
    ]
    for reason, n in manifest.rejects.items():
        remedy = "; --upscale takes such pictures" if reason == "too_small" else ""
        lines.append(f"  rejected {n:,} {reason}, such as {manifest.reject_examples[reason][0]}{remedy}")
    if manifest.rejects:
        lines.append(f"  {output / 'rejects.jsonl'} names them all")
    lines.append(f"look at {output / 'contact_sheet.png'} and {output / 'caption_lengths.png'}")
    lines.append(f"train with: {training_command(output, manifest)}")
    return lines


def training_command(output: Path, manifest: "Manifest") -> str:
    """A command that trains on the data set, each picture at the size of its bucket.

    The model is the small one of the quickstart, with the patches that the buckets are multiples of; the same
    data settings go with any other configuration whose tokens divide these.
    """
    changes = {
        "data.source": "shards",
        "data.path": output,
        "data.resolution": manifest.resolution,
        "data.aspect": "bucket",
        "data.crop": "center",
        "model.patch_size": manifest.patch,
    }
    if manifest.settings.get("upscale"):
        changes["data.upscale"] = "true"
    words = ["millrace", "train", "--config", "quickstart"]
    for name, value in changes.items():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)


if __name__ == "__main__":
    run_command(main)
