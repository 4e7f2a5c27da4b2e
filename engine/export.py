"""Export the weights of a run for diffusers or Photoroom/PRX.

millrace export --checkpoint runs/latent_256 --output prx-latent-256 --dtype bfloat16
millrace export --checkpoint runs/latent_256 --output prx-latent-256 --format prx
millrace export --checkpoint runs/latent_256 --pipeline prx-256 --dtype bfloat16
millrace export --checkpoint runs/latent_256 --pipeline prx-256 --license apache-2.0 --push me/prx-256
millrace export --checkpoint runs/sft_alchemist_lora --output alchemist-lora --adapter
millrace export --checkpoint runs/repa_e_tuning --autoencoder tuned-vae
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace.engine.cli import command_parser, require_path, run_command
from millrace.engine.util.errors import UserError
from millrace.engine.util.hub import is_hub_name, push_folder

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
    parser.add_argument(
        "--license", metavar="NAME", help="of the weights, as the hub spells it (apache-2.0), for the card"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to the hub, as a private repository if it is new",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="the adapter alone, as peft reads it; without this it is merged into the weights",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Read the weights of a checkpoint and write them."""
    arguments = build_parser().parse_args(words)
    require_path("--checkpoint", arguments.checkpoint)
    if arguments.pipeline and arguments.format == "prx":
        raise UserError("--format prx is a state dict, which a pipeline does not hold; leave it out")
    if arguments.push is not None and not is_hub_name(arguments.push):
        raise UserError(f"--push {arguments.push}: write it as OWNER/NAME")

    from millrace.engine.checkpoint.model_weights import pinned_checkpoint
    from millrace.engine.checkpoint.sharded_tensors import CheckpointReader

    with pinned_checkpoint(arguments.checkpoint) as folder:
        origin = _export(arguments, CheckpointReader(folder))
    if arguments.push:
        written = arguments.pipeline or arguments.output or arguments.autoencoder
        print(f"pushed to {push_folder(written, arguments.push, f'Millrace: {origin}')}")
    return 0


def _export(arguments: argparse.Namespace, reader: "CheckpointReader") -> str:
    """Write what was asked for; returns what it was made of."""
    import torch

    from millrace.engine.checkpoint import weight_formats
    from millrace.engine.checkpoint.model_weights import (
        checkpoint_config,
        choose_weights,
        describe_checkpoint,
        read_weights,
    )
    from millrace.engine.checkpoint.weight_meaning import as_metadata
    from millrace.engine.publishing import model_card

    config = checkpoint_config(reader)
    if arguments.adapter:
        from millrace.engine.checkpoint.adapter_files import export_adapter

        line = export_adapter(reader, arguments)
        print(line)
        kind = "PRXPixelPipeline" if config.conditioning.autoencoder.kind == "pixels" else "PRXPipeline"
        where, base = arguments.push or arguments.output, str(config.run.init_from)
        use = model_card.adapter_use(where, base, kind, arguments.dtype)
        name = arguments.push or Path(arguments.output).name
        origin = line.partition(": ")[2]
        model_card.write_card(Path(arguments.output), name, config, reader, origin, use, arguments.license)
        return line
    if arguments.autoencoder:
        from millrace.engine.repa_e.tuned_autoencoder import save_autoencoder

        folder = weight_formats.new_folder(arguments.autoencoder)
        identity = save_autoencoder(reader.folder, config, folder)
        print(f"{folder}: {identity}")
        return identity
    weights, dtype = choose_weights(reader, arguments.weights), getattr(torch, arguments.dtype)
    state, origin = read_weights(reader, weights), describe_checkpoint(reader, weights)
    metadata, folder = as_metadata(config, origin), Path(arguments.pipeline or arguments.output)
    name = arguments.push or folder.name
    if arguments.pipeline:
        from millrace.engine.publishing.pipeline_folder import noise_scale, pipeline_class, save_pipeline

        copied = arguments.components == "copy"
        frozen = save_pipeline(state, config, folder, reader.folder, arguments.components, dtype, metadata)
        kind = pipeline_class(config)
        where, apart = arguments.push or str(folder), [] if copied else frozen
        use = model_card.pipeline_use(where, kind, config, apart, arguments.dtype)
        print(f"{folder}: {origin}, in {arguments.dtype}, for diffusers.{kind}")
        if config.objective.noise_scale == "resolution":
            scale, edge = noise_scale(config), config.data.resolution
            print(f"noise_scale is {scale:g}, for pictures of {edge} px; for others set edge / 256")
        for component in frozen:
            how = "copied from" if copied else "not in it, load it from"
            licence = model_card.licence_of(component.source)
            print(f"{component.name}: {how} {component.source} (licence: {licence})")
    else:
        frozen, use = [], model_card.transformer_use(arguments.push or str(folder))
        if arguments.format == "prx":
            use = f"# millrace train --set run.init_from={arguments.push or folder}"
        save = weight_formats.save_prx if arguments.format == "prx" else weight_formats.save_diffusers
        save(state, config.model, folder, dtype=dtype, metadata=metadata)
        print(f"{folder}: {origin}, in {arguments.dtype}, format {arguments.format}")
        space, size = config.conditioning.autoencoder.kind, config.data.resolution
        print(
            f"it predicts the {config.objective.prediction}, on {space} (conditioning.autoencoder.kind), "
            f"trained at {size} px"
        )
    model_card.write_card(
        folder, name, config, reader, origin, use, arguments.license, frozen, arguments.components
    )
    return origin


if __name__ == "__main__":
    run_command(main)
