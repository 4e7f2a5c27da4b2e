"""Compare a model's samples with reference pictures: FID, CMMD and DINO-MMD.

python engine/evaluate.py --checkpoint runs/latent_256 --features.fid weights/inception.pth
python engine/evaluate.py --checkpoint runs/latent_256 --reference datasets/coco-val --metrics cmmd dino_mmd
python engine/evaluate.py --checkpoint runs/jit_1024_tread --guidance 1.5 --method self --output scores.json
python engine/evaluate.py --checkpoint runs/quickstart --smoke
deepspeed --num_gpus 8 engine/evaluate.py --checkpoint runs/latent_256 --steps 50 --guidance 3.5
torchrun --nproc-per-node 8 engine/evaluate.py --checkpoint prx-latent-256 --config configs/latent_256.json
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is searched first, and engine/ has names (data, config) that others use too.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, get_args

import torch

from millrace.engine.checkpoint.model_weights import checkpoint_folder
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config, guidance_warnings
from millrace.engine.config.loading import (
    merge,
    parse_config,
)
from millrace.engine.config.smoke import made_once
from millrace.engine.distributed import process_group
from millrace.engine.evaluation.evaluator import (
    TITLES,
    Evaluation,
    Scores,
)
from millrace.engine.evaluation.features import (
    MetricName,
    tiny_features,
    tiny_networks,
)
from millrace.engine.model.guidance_branches import describe
from millrace.engine.sampling.trained_model import (
    add_model_arguments,
    load_model,
    open_sampler,
    run_of,
)
from millrace.engine.util.errors import UserError
from millrace.engine.util.files import write_atomically

SMOKE_SAMPLES = 32


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--metrics", nargs="+", choices=get_args(MetricName), help="default evaluation.metrics"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="pictures to sample; default 10000")
    parser.add_argument(
        "--reference",
        metavar="FOLDER",
        help="pictures to compare with; default those of the configuration's data",
    )
    parser.add_argument(
        "--reference-samples", type=int, metavar="N", help="how many of them; default as many as samples"
    )
    parser.add_argument("--seed", type=int, help="of the samples' noise; default evaluation.seed")
    parser.add_argument("--cache", metavar="FOLDER", help="for statistics of the reference pictures")
    for metric in get_args(MetricName):
        parser.add_argument(
            f"--features.{metric}",
            dest=f"features_{metric}",
            metavar="PATH",
            help=f"network of {TITLES[metric]}",
        )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write everything there")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"try it: small random feature networks, {SMOKE_SAMPLES} samples; the values mean nothing",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output and arguments.output.suffix != ".json":
        parser.error(f"--output {arguments.output}: it is a JSON file, name it so")
    return arguments


def main() -> int:
    """Load the model, sample, compare, print a table."""
    arguments = parse()
    weights, config = load_model(arguments)
    config = _with_arguments(config, arguments)
    device = process_group.choose_device(config.run.device)
    if "RANK" in os.environ:
        process_group.initialize(device)
    leads = process_group.rank() == 0
    if leads and arguments.output:
        _require_writable(arguments.output)

    def say(line: str) -> None:
        if leads:
            print(line, file=sys.stderr, flush=True)

    sampler = open_sampler(weights, config, arguments.checkpoint, device)
    del weights
    evaluation = Evaluation(config, config.model.patch_size * sampler.autoencoder.factor, device)
    for line in guidance_warnings(config.sampling, config.routing, config.objective) + evaluation.describe():
        say(line)
    scores = evaluation(sampler, say)
    if leads:
        report = _report(arguments, config, evaluation, scores, device)
        print(_table(report))
        if arguments.output:
            write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")
            say(f"written to {arguments.output}")
    process_group.wait_for_all()
    return 0


def _with_arguments(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration with what the command says about the evaluation."""
    names = ("metrics", "samples", "reference", "reference_samples", "seed", "cache")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    features = {metric: getattr(arguments, f"features_{metric}") for metric in get_args(MetricName)}
    features = {metric: path for metric, path in features.items() if path is not None}
    if arguments.smoke:
        folder = Path(given.get("cache", config.evaluation.cache)) / "smoke"
        tiny = tiny_features(made_once(folder / "metrics", tiny_networks))
        given = {"samples": SMOKE_SAMPLES, **given, "cache": str(folder)}
        features = tiny | features
    values = merge(config.model_dump(mode="json"), {"evaluation": {**given, "features": features}})
    return parse_config(values, "evaluate.py")


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
    config: Config,
    evaluation: Evaluation,
    scores: Scores,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that the values depend on, beside them."""
    run = run_of(arguments.checkpoint)
    cuda = device.type == "cuda"
    return {
        "checkpoint": str(checkpoint_folder(run) if run else arguments.checkpoint),
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
    rows = [(TITLES[metric], f"{value:.6g}") for metric, value in report["metrics"].items()]
    rows += [
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
