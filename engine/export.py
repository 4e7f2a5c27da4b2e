"""Export the weights of a run for diffusers or Photoroom/PRX.

millrace export --checkpoint runs/latent_256 --output prx-latent-256 --dtype bfloat16
millrace export --checkpoint runs/latent_256 --output prx-latent-256 --format prx
millrace export --checkpoint runs/latent_256 --pipeline prx-256 --dtype bfloat16
millrace export --checkpoint runs/repa_e_tuning --autoencoder tuned-vae
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millrace.engine.cli import command_parser, require_path, run_command

if TYPE_CHECKING:
    from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
    from millrace.engine.checkpoint.weight_formats import from_diffusers, to_diffusers

__all__ = ["from_diffusers", "to_diffusers"]


def __getattr__(name: str) -> Any:
    """`from_diffusers` and `to_diffusers`, imported when asked for: the command's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from millrace.engine.checkpoint import weight_formats

    return getattr(weight_formats, name)


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = command_parser(__doc__, "millrace export")
    parser.add_argument("--checkpoint", required=True, help="run folder (newest checkpoint) or checkpoint")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="FOLDER", help="folder to create, of the model alone")
    where.add_argument(
        "--pipeline",
        metavar="FOLDER",
        help="folder to create of a whole pipeline, for diffusers' PRXPipeline or PRXPixelPipeline",
    )
    where.add_argument(
        "--autoencoder",
        metavar="FOLDER",
        help="folder to create for the autoencoder that the run tuned, in FP32, for diffusers",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "ema2", "model"),
        default="auto",
        help="auto: EMA where there is one; ema2: that of ema.second_decay; model: without averaging",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the file (default float32)"
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "prx"),
        default="diffusers",
        help="diffusers: folder for PRXTransformer2DModel (default); prx: state dict of Photoroom/PRX",
    )
    parser.add_argument(
        "--components",
        choices=("copy", "reference"),
        default="copy",
        help="of a pipeline: copy its frozen networks (default), or name where they are",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Read the weights of a checkpoint and write them."""
    arguments = build_parser().parse_args(words)
    require_path("--checkpoint", arguments.checkpoint)

    from millrace.engine.checkpoint.model_weights import pinned_checkpoint
    from millrace.engine.checkpoint.sharded_tensors import CheckpointReader

    with pinned_checkpoint(arguments.checkpoint) as folder:
        _export(arguments, CheckpointReader(folder))
    return 0


def _export(arguments: argparse.Namespace, reader: "CheckpointReader") -> None:
    import torch

    from millrace.engine.checkpoint import weight_formats
    from millrace.engine.checkpoint.model_weights import (
        checkpoint_config,
        choose_weights,
        describe_checkpoint,
        read_weights,
    )
    from millrace.engine.checkpoint.weight_meaning import as_metadata

    config = checkpoint_config(reader)
    if arguments.autoencoder:
        from millrace.engine.repa_e.tuned_autoencoder import save_autoencoder

        folder = weight_formats.new_folder(arguments.autoencoder)
        print(f"{folder}: {save_autoencoder(reader.folder, config, folder)}")
        return
    weights = choose_weights(reader, arguments.weights)
    dtype = getattr(torch, arguments.dtype)
    state, origin = read_weights(reader, weights), describe_checkpoint(reader, weights)
    metadata = as_metadata(config, origin)
    if arguments.pipeline:
        from millrace.engine.publishing.pipeline_folder import pipeline_class, save_pipeline

        frozen = save_pipeline(
            state, config, arguments.pipeline, reader.folder, arguments.components, dtype, metadata
        )
        print(f"{arguments.pipeline}: {origin}, in {arguments.dtype}, for diffusers.{pipeline_class(config)}")
        for component in frozen:
            how = "copied from" if arguments.components == "copy" else "not in it, load it from"
            print(f"{component.name}: {how} {component.source}")
        return
    save = weight_formats.save_diffusers if arguments.format == "diffusers" else weight_formats.save_prx
    save(state, config.model, arguments.output, dtype=dtype, metadata=metadata)
    print(f"{arguments.output}: {origin}, in {arguments.dtype}, format {arguments.format}")
    space, size = config.conditioning.autoencoder.kind, config.data.resolution
    print(
        f"it predicts the {config.objective.prediction}, on {space} (conditioning.autoencoder.kind), "
        f"trained at {size} px"
    )


if __name__ == "__main__":
    run_command(main)
