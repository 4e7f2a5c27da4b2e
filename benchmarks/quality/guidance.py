"""What does each guidance do to the pictures of trained models, and what does it cost?

python -m benchmarks guidance --run tread=runs/digits_tread --run sprint=runs/digits_sprint
python -m benchmarks guidance --run sprint=runs/digits_sprint --scale 1.5 --scale 3 --pictures 500
python -m benchmarks guidance --costs                                       # the table of docs/guidance.md

Samples every run with every guidance that its training allows, from the same captions and noise, and has the
pictures judged. On digits (`data.source` digits) the captions are those of the held-out pictures, and a
classifier trained on the training pictures tells how many show the digit that was asked for, and the Frechet
distance of its features to those of the held-out pictures. On the built-in pictures the captions are those of
the training, and recall tells how many give a picture whose nearest training picture is their own.

FLOPs are those of the denoiser for one picture, by `engine/model/flops.py`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.benchmarks.report import recording
from millrace.benchmarks.report.tables import Table
from millrace.engine.checkpoint.model_weights import checkpoint_folder, checkpoint_state
from millrace.engine.cli import command_parser, run_command
from millrace.engine.config import Config, Sampling
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.data.sources.digits import NAMES, DigitsSource
from millrace.engine.distributed.process_group import choose_device
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.evaluation.digit_judge import quality, train_classifier
from millrace.engine.evaluation.recall import recall
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.flops import sampling_flops
from millrace.engine.model.guidance_branches import evaluations
from millrace.engine.sampling.sampler import Sampler, filled_denoiser
from millrace.engine.util.errors import UserError

SCALES = (1.5, 2.0, 3.0)
"""Of the guidance; Sparse Guidance's paper has 1.3 to 1.9, SPRINT's and PRX's classifier-free 1.5 to 5."""
INTERVAL = (0.0, 0.7)
"""Times of the guided rows that have an interval: REPA's and CFM's upper end, 0.65 to 0.7."""
JUDGE_SEED = 1
PRX = {"model": {"depth": 16}, "sampling": {"steps": 28}}
"""PRX-1.2B, which is the default model, in the table of costs."""


class Judge(NamedTuple):
    """What is asked of a model, and what the answers are worth."""

    prompts: list[str]
    measure: Callable[[Tensor], dict[str, float]]
    """Of pictures (len(prompts), 3, h, w), by name."""


def settings(config: Config, scales: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """Every guidance that the training of `config` allows, as changes to `sampling`, by name."""
    routing = config.routing
    found: dict[str, dict[str, Any]] = {"none": {"method": "none"}}
    for scale in scales:
        kinds: dict[str, dict[str, Any]] = {"cfg": {"method": "cfg"}}
        if routing.policy != "none" and routing.drop:
            kinds["self"] = {"method": "self"}
            kinds["self, no caption"] = {"method": "self", "weak_unconditional": True}
            kinds["self, fixed route"] = {"method": "self", "weak_route": "fixed"}
        if routing.policy == "sprint":
            kinds["path_drop"] = {"method": "path_drop"}
        for name, change in kinds.items():
            found[f"{name} {scale:g}"] = change | {"guidance": scale}
            low, high = INTERVAL
            within = {"guidance": scale, "interval": INTERVAL}
            found[f"{name} {scale:g} in [{low:g}, {high:g}]"] = change | within
    return found


def sampling_config(config: Config, change: dict[str, Any], steps: int | None = None) -> Config:
    """`config` whose sampling is the defaults under `change`, with the run's own solver."""
    own = {"steps": steps or config.sampling.steps, "solver": config.sampling.solver}
    values = config.model_dump(mode="json")
    values["sampling"] = merge(Sampling().model_dump(mode="json"), own | change)
    return parse_config(values, "guidance")


def judge_of(config: Config, count: int | None) -> Judge:
    """The judge of the run's data; `count` captions at most."""
    if config.data.source == "digits":
        return _digits(config, count)
    if config.data.source == "builtin":
        return _builtin(config, count)
    raise UserError(f"data.source {config.data.source}: judges there are for digits and builtin only")


def _views(config: Config, source: Any) -> Tensor:
    edge = config.model.patch_size
    square = config.data.model_copy(update={"aspect": "square"})
    return torch.stack(
        [evaluation_view(source.image(i), square, edge, source.key(i)) for i in range(len(source))]
    )


def _digits(config: Config, count: int | None) -> Judge:
    train, test = DigitsSource("train"), DigitsSource("test")
    pictures, real = _views(config, train), _views(config, test)
    labels = torch.tensor([train.label(i) for i in range(len(train))])
    classifier = train_classifier(pictures, labels, classes=len(NAMES), seed=JUDGE_SEED)
    asked = range(min(count or len(test), len(test)))
    wanted = torch.tensor([test.label(i) for i in asked])

    def measure(generated: Tensor) -> dict[str, float]:
        found = quality(classifier, generated, wanted, real)
        return {"accuracy": found.accuracy, "frechet": found.frechet}

    return Judge([test.captions(i).long for i in asked], measure)


def _builtin(config: Config, count: int | None) -> Judge:
    source = open_source(config.data)
    views = _views(config, source)
    pairs = [(c, i) for i in range(len(source)) for c in dict.fromkeys(source.captions(i))][:count]
    own = torch.tensor([i for _, i in pairs])
    return Judge(
        [caption for caption, _ in pairs], lambda generated: {"recall": recall(generated, views, own)}
    )


def open_sampler(folder: Path, device: torch.device) -> tuple[Sampler, Config]:
    """The sampler of a run's newest checkpoint, with its average if it has one."""
    weights, config = checkpoint_state(checkpoint_folder(folder), "auto")
    autoencoder = open_autoencoder(config.conditioning.autoencoder, device)
    compute = getattr(torch, config.precision.compute)
    sampler = Sampler(
        filled_denoiser(config, weights.items(), device),
        FlowMatching(config.objective, config.run.seed, config.model.patch_size * autoencoder.factor),
        autoencoder,
        open_text_encoder(config.conditioning.text, config.model.context_dim, device, compute),
        device,
        compute,
    )
    return sampler, config


def measure_run(
    name: str, folder: Path, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each guidance of one run."""
    sampler, config = open_sampler(folder, device)
    judge = judge_of(config, arguments.pictures)
    edge = config.data.resolution
    tokens = (edge // (sampler.autoencoder.factor * config.model.patch_size)) ** 2
    texts = sampler.text_encoder.encode(judge.prompts).embeddings
    empty = len(sampler.text_encoder.encode([""]).embeddings)
    rows = []
    for label, change in settings(config, tuple(arguments.scale or SCALES)).items():
        chosen = sampling_config(config, change, arguments.steps)
        start = time.perf_counter()
        pictures = sampler(judge.prompts, (edge, edge), chosen.sampling, arguments.seed)
        seconds = time.perf_counter() - start
        row = {
            "run": name,
            "guidance": label,
            "sampling": chosen.sampling.model_dump(mode="json"),
            "flops_per_picture": sampling_flops(chosen, tokens, len(texts) / len(judge.prompts), empty),
            "seconds_per_picture": seconds / len(pictures),
            "pictures": len(pictures),
            **judge.measure(pictures),
        }
        rows.append(row)
        print(f"{name}: {label}: {_measures(row)}", file=sys.stderr)
    return rows


COMMON = ("run", "guidance", "sampling", "flops_per_picture", "seconds_per_picture", "pictures")
"""Keys of every row; the others are what its judge measured."""


def _measures(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in COMMON)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    names = list(dict.fromkeys(key for row in rows for key in row if key not in COMMON))
    lines = []
    alone = {row["run"]: row["flops_per_picture"] for row in rows if row["guidance"] == "none"}
    for row in rows:
        flops = row["flops_per_picture"]
        measures = [f"{row[name]:.4f}" if name in row else "" for name in names]
        share = f"{flops / alone[row['run']]:.2f}"
        lines.append([row["run"], row["guidance"], *measures, f"{flops / 1e9:.3f}", share])
    return Table(["run", "guidance", *names, "GFLOP/picture", "x none"], lines, left=2)


def costs() -> str:
    """FLOPs of each guidance on PRX-1.2B for a picture of 256 pixels (latents), as a table in Markdown."""
    lines = []
    cases = [
        ("any", {}, "none", {"method": "none"}),
        ("any", {}, "`cfg`", {"method": "cfg"}),
        ("any", {}, "`cfg`, `interval` [0.0, 0.7]", {"method": "cfg", "interval": (0.0, 0.7)}),
        ("TREAD 0.5", {"policy": "tread"}, "`self`", {"method": "self"}),
        ("TREAD 0.5", {"policy": "tread"}, "`self`, `weak_drop` 0.7", {"method": "self", "weak_drop": 0.7}),
        (
            "TREAD 0.5",
            {"policy": "tread"},
            "`self`, `strong_drop` 0.3, `weak_drop` 0.7",
            {"method": "self", "strong_drop": 0.3, "weak_drop": 0.7},
        ),
        ("SPRINT 0.75", {"policy": "sprint"}, "none", {"method": "none"}),
        ("SPRINT 0.75", {"policy": "sprint"}, "`cfg`", {"method": "cfg"}),
        ("SPRINT 0.75", {"policy": "sprint"}, "`self`", {"method": "self"}),
        ("SPRINT 0.75", {"policy": "sprint"}, "`path_drop`", {"method": "path_drop"}),
    ]
    alone = 0.0
    for training, routing, guidance, change in cases:
        config = sampling_config(parse_config(PRX | {"routing": routing}, "costs"), change)
        flops = sampling_flops(config, 256, 128)
        alone = flops if guidance == "none" else alone
        lines.append(
            [
                training,
                guidance,
                str(len(evaluations(config))),
                f"{flops / 1e12:.1f}",
                f"{flops / alone:.2f}",
            ]
        )
    head = ["training", "guidance", "evaluations", "TFLOP a picture", "times `none`"]
    return Table(head, lines).markdown()


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER", help="a trained model")
    parser.add_argument("--scale", action="append", type=float, help=f"of the guidance; default {SCALES}")
    parser.add_argument("--pictures", type=int, help="at most so many; default one for each caption")
    parser.add_argument("--steps", type=int, help="solver steps; default those of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, default=recording.RESULTS / "guidance.json")
    parser.add_argument("--costs", action="store_true", help="print the table of docs/guidance.md only")
    arguments = parser.parse_args()
    for run in arguments.run:
        if not all(run.partition("=")):
            parser.error(f"--run {run}: write it as NAME=FOLDER")
    if not arguments.run and not arguments.costs:
        parser.error("name at least one trained model: --run NAME=FOLDER")
    return arguments


def main() -> int:
    """Sample, judge, write."""
    arguments = parse()
    if arguments.costs:
        print(costs())
        return 0
    device = choose_device(arguments.device)
    rows = []
    for run in arguments.run:
        name, _, folder = run.partition("=")
        rows += measure_run(name, Path(folder), arguments, device)
    recording.write(
        arguments.output,
        {"benchmark": "guidance", **recording.environment(), "seed": arguments.seed, "rows": rows},
    )
    print(table(rows).text())
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
