"""Compare a model's samples with reference pictures: FID, CMMD and DINO-MMD.

millrace evaluate --checkpoint runs/latent_256 --features.fid weights/inception.pth
millrace evaluate --checkpoint runs/latent_256 --reference datasets/coco-val --metrics cmmd dino_mmd
millrace evaluate --checkpoint runs/jit_1024_tread --guidance 1.5 --method self --output scores.json
millrace evaluate --checkpoint runs/quickstart --smoke
torchrun --nproc-per-node 8 engine/evaluate.py --checkpoint runs/latent_256 --steps 50 --guidance 3.5
torchrun --nproc-per-node 8 engine/evaluate.py --checkpoint prx-latent-256 --config configs/latent_256.json
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from millrace.engine.cli import command_parser, number, require_path, run_command
from millrace.engine.util.errors import UserError

if TYPE_CHECKING:
    import torch

    from millrace.engine.config import Config
    from millrace.engine.config.loading import Given
    from millrace.engine.evaluation.evaluator import Evaluation, Scores

SMOKE_SAMPLES = 32


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    from millrace.engine.config.evaluation import FEATURES_OF, TITLES, MetricName
    from millrace.engine.sampling.model_arguments import add_model_arguments

    parser = command_parser(__doc__, "millrace evaluate", launched=True)
    add_model_arguments(parser)
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=get_args(MetricName),
        help="what is computed; default evaluation.metrics",
    )
    parser.add_argument(
        "--samples", type=number(int, 2), metavar="N", help="pictures to sample; default evaluation.samples"
    )
    parser.add_argument(
        "--reference",
        metavar="FOLDER",
        help="pictures to compare with; default those of the configuration's data",
    )
    parser.add_argument(
        "--reference-samples",
        type=number(int, 2),
        metavar="N",
        help="how many of them; default as many as samples",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        metavar="N",
        help="of the samples' noise; default evaluation.seed",
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where statistics of reference pictures are kept for the next time; default evaluation.cache, "
        "else beside the pictures",
    )
    for metric, title in TITLES.items():
        if metric in FEATURES_OF:
            continue
        parser.add_argument(
            f"--features.{metric}",
            dest=f"features_{metric}",
            metavar="PATH",
            help=f"weights of the feature network of {title}: file, folder or hub id",
        )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write everything there")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"try it: small random feature networks, {SMOKE_SAMPLES} samples; the values mean nothing",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Load the model, sample, compare, print a table."""
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.output and arguments.output.suffix != ".json":
        parser.error(f"--output {arguments.output}: it is a JSON file, name it so")

    from millrace.engine.config import guidance_warnings
    from millrace.engine.config.loading import check_given
    from millrace.engine.sampling.model_arguments import check_model_arguments

    check_model_arguments(arguments)
    check_given(_given(arguments))
    if arguments.reference is not None:
        require_path("--reference", arguments.reference)

    from millrace.engine.distributed import process_group
    from millrace.engine.distributed.launchers import read_launcher
    from millrace.engine.evaluation.evaluator import Evaluation
    from millrace.engine.sampling.trained_model import load_model, model_config, open_sampler, pinned_model
    from millrace.engine.util.files import write_atomically

    launched = read_launcher()
    with pinned_model(arguments):
        device = process_group.choose_device(model_config(arguments).run.device)
        if launched:
            process_group.initialize(device)
        # A run that goes on may publish a newer one between two ranks' looks.
        arguments.checkpoint = process_group.lead(lambda: arguments.checkpoint)
        weights, config, origin = load_model(arguments)
        config = _with_arguments(config, arguments)
        leads = process_group.rank() == 0
        if leads and arguments.output:
            _require_writable(arguments.output)

        def say(line: str) -> None:
            if leads:
                print(line, file=sys.stderr, flush=True)

        sampler = process_group.leaders_first(
            partial(open_sampler, weights, config, arguments.checkpoint, device)
        )
        del weights
        process_group.wait_for_all()  # rank 0 holds the pin
    edge = config.model.patch_size * sampler.autoencoder.factor
    evaluation = process_group.leaders_first(
        lambda: Evaluation(config, edge, device, features_key="--features")
    )
    for line in guidance_warnings(config.sampling, config.routing, config.objective) + evaluation.describe():
        say(line)
    scores = evaluation(sampler, say)
    if leads:
        report = {"model": origin, **_report(arguments, config, evaluation, scores, device)}
        print(_table(report))
        if arguments.output:
            write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")
            say(f"written to {arguments.output}")
    process_group.wait_for_all()
    return 0


def _given(arguments: argparse.Namespace) -> "list[Given]":
    """The settings that the command's own flags give."""
    from millrace.engine.config.evaluation import FeaturePaths
    from millrace.engine.config.loading import Given

    flags = {
        f"--{name.replace('_', '-')}": (name, getattr(arguments, name))
        for name in ("metrics", "samples", "reference", "reference_samples", "seed", "cache")
    }
    networks = FeaturePaths.model_fields
    flags |= {f"--features.{m}": (f"features.{m}", getattr(arguments, f"features_{m}")) for m in networks}
    return [
        Given(f"{flag} {' '.join(value) if flag == '--metrics' else value}", f"evaluation.{key}", value)
        for flag, (key, value) in flags.items()
        if value is not None
    ]


def _with_arguments(config: "Config", arguments: argparse.Namespace) -> "Config":
    """The configuration with what the command says about the evaluation."""
    from millrace.engine.config.loading import merge, parse_config

    values, given = config.model_dump(mode="json"), _given(arguments)
    if arguments.smoke:
        from millrace.engine.config.smoke import made_once
        from millrace.engine.distributed import process_group
        from millrace.engine.evaluation.features import tiny_features, tiny_networks

        folder = Path(arguments.cache) if arguments.cache else _run_folder(arguments.checkpoint)
        folder = folder / "evaluate-smoke"
        # The first rank: in a job, transformers saves nothing on any other.
        tiny = tiny_features(process_group.lead(lambda: made_once(folder / "metrics", tiny_networks)))
        values = merge(values, {"evaluation": {"samples": SMOKE_SAMPLES, "features": tiny}})
        given = [setting for setting in given if setting.key != "evaluation.cache"]
        values["evaluation"]["cache"] = str(folder)
    return parse_config(values, arguments.config or str(arguments.checkpoint), given)


def _run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint is of, or the folder that weights alone lie in."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _require_writable(path: Path) -> None:
    """Now, not after hours of sampling."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror}") from None


def _report(
    arguments: argparse.Namespace,
    config: "Config",
    evaluation: "Evaluation",
    scores: "Scores",
    device: "torch.device",
) -> dict[str, Any]:
    """Everything that the values depend on, beside them."""
    from dataclasses import asdict
    from importlib.metadata import version

    import torch

    from millrace.engine.distributed import process_group
    from millrace.engine.model.guidance_branches import describe

    cuda = device.type == "cuda"
    return {
        "checkpoint": str(arguments.checkpoint),
        "weights": arguments.weights,
        "guidance": describe(config),
        **asdict(scores),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json"),
        "resolution": config.data.resolution,
        "reference_name": evaluation.reference.name,
        "reference_identity": evaluation.reference.identity(),
        "networks": {
            metric: {
                "identity": network.identity,
                "source": network.source,
                "preprocessing": network.preprocessing,
                "published": network.published,
            }
            for metric, network in evaluation.networks.items()
        },
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processes": process_group.world_size(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
        "smoke": arguments.smoke,
    }


def _table(report: dict[str, Any]) -> str:
    """The values, and what people ask next."""
    from millrace.engine.config.evaluation import TITLES

    rows = [(TITLES[metric], f"{value:.6g}") for metric, value in report["metrics"].items()]
    rows += [
        ("model", f"{report['model']}; {report['resolution']} px"),
        ("samples", f"{report['samples']}, {report['guidance']}"),
        ("reference", f"{report['reference']} pictures of {report['reference_name']}"),
        (
            "sampling",
            f"{report['images_per_second']:.4g} images/s, {report['gflop_per_image']:,.4g} GFLOP each",
        ),
        ("MFU", "peak of this device is not known" if report["mfu"] is None else f"{report['mfu']:.1%}"),
        ("feature networks", f"{report['feature_seconds']:.1f} s"),
        ("device", f"{report['processes']} x {report['device']}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    run_command(main)
