"""One run of the logbook in a process of its own: train, then look at its checkpoints.

python benchmarks/quality/ablations_run.py JOB.json RESULT.json

Started by `ablations.py`. JOB is `{"config": ..., "judge": folder or null, "curated": file or null,
"weights_at": [steps]}`; RESULT gets the learning curve and, at each of those steps, the held-out loss that
the run has logged and the quality of samples.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.cli import run_command
from millrace.engine.config import Config, Data
from millrace.engine.config.loading import parse_config
from millrace.engine.data import evaluation_view, open_source
from millrace.engine.data.sources.digits import DigitsSource
from millrace.engine.data.sources.held_out_split import split
from millrace.engine.distributed import process_group
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.small_classifier import SmallClassifier, load_classifier
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.evaluation.digit_judge import quality
from millrace.engine.evaluation.recall import recall
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.run_log.logs import VALIDATION, set_up_logging
from millrace.engine.sampling.grids import save_picture
from millrace.engine.sampling.sampler import Sampler, filled_denoiser
from millrace.engine.trainer import train
from millrace.engine.util.errors import UserError

POINTS = 40
"""Points of a learning curve."""
HORIZON = 0.04
"""Share of the run over which the loss of a learning curve is averaged."""
LOOK_SEED = 20_240
"""Of the noise from which samples start: the same for every run."""
SHOWN = 20
"""Pictures of a run that are kept to be looked at."""


def main() -> int:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_up_logging()
    job = json.loads(arguments.job.read_text())
    config = parse_config(job["config"], str(arguments.job))
    began = time.perf_counter()
    train(config, "auto")
    trained = time.perf_counter() - began
    if not list_checkpoints(Path(config.run.output_dir) / "checkpoints")[-1][0] == config.run.steps:
        raise UserError("the run was asked to stop before its end; start again to continue it")
    if process_group.rank() == 0:
        result = learning(config) | {"train_seconds": trained}
        judge = load_classifier(job["judge"], "judge") if job["judge"] else None
        result["looks"] = looks(config, judge, job["weights_at"], job["curated"])
        result["look_seconds"] = time.perf_counter() - began - trained
        arguments.result.write_text(json.dumps(result))
        if job["judge"]:
            shutil.rmtree(Path(config.run.output_dir) / "checkpoints")  # small and many: the log stays
    process_group.wait_for_all()
    return 0


def learning(config: Config) -> dict[str, Any]:
    """Curve of the flow term, steps that were skipped, and speed, from the run's log."""
    lines = (Path(config.run.output_dir) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    terms = sorted({term for record in records for term in record.get("losses", {"flow": None})})
    losses = [record.get("losses", {}).get("flow", record["loss"]) for record in records]
    smooth = averages(losses, max(1, round(HORIZON * len(losses))))
    every = max(1, len(losses) // POINTS)
    kept = range(every - 1, len(losses), every)
    seconds = [record["step_seconds"] for record in records][len(records) // 10 :]
    return {
        "loss_steps": [records[i]["step"] for i in kept],
        "loss": [round(smooth[i], 6) for i in kept],
        "terms": terms,
        "skipped": sum(not record["applied"] for record in records),
        "images_per_second": config.data.global_batch / statistics.median(seconds),
    }


def averages(values: list[float], horizon: int) -> list[float]:
    """Exponential moving averages of decay 1 - 1/horizon, corrected for their start; values that are not
    finite are passed over."""
    decay, total, weight, found = 1 - 1 / horizon, 0.0, 0.0, []
    for value in values:
        if value == value and abs(value) != float("inf"):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        found.append(total / weight if weight else float("nan"))
    return found


def looks(
    config: Config, judge: SmallClassifier | None, steps: list[int], curated: str | None
) -> list[dict[str, Any]]:
    """The held-out loss and the quality of samples at each of the steps, which all have a checkpoint."""
    folder = Path(config.run.output_dir)
    found = dict(list_checkpoints(folder / "checkpoints"))
    source, own = compared_with(config)
    losses = held_out_losses(config)
    results = []
    for step in steps:
        weights, saved = checkpoint_state(found[step], "auto")
        sampler = build_sampler(saved, weights)
        captions = prompts(source, config.data)
        result: dict[str, Any] = {"step": step}
        if step in losses:
            record = losses[step]
            result["held_out_loss"] = record["loss"]
            if step == steps[-1]:  # what pairs the pictures of two runs
                result["held_out_set"] = record["set"]
                result["held_out_losses"] = [round(loss, 5) for loss in record["losses"]]
        if judge is not None or config.data.source == "builtin":
            size = (config.data.resolution, config.data.resolution)
            pictures = sampler(captions, size, config.sampling, LOOK_SEED)
            save_picture(torch.cat(tuple(pictures[:SHOWN]), dim=-1), folder / "samples.png")
            if judge is None:
                result["recall"] = recall(pictures, own, torch.arange(len(own)))
            else:
                labels = torch.tensor([source.label(i) for i in range(len(source))])
                result["accuracy"], result["frechet"] = quality(judge, pictures, labels, own)
                if curated is not None:
                    chosen = open_source(config.data.model_copy(update={"keys": curated}))
                    real = views(chosen, config.data)
                    result["frechet_curated"] = quality(judge, pictures, labels, real).frechet
        results.append(result)
    return results


def held_out_losses(config: Config) -> dict[int, dict[str, Any]]:
    """Records of validation.jsonl by step, of the EMA weights where the run has them, else of the model's;
    empty for a run without held-out pictures."""
    file = Path(config.run.output_dir) / VALIDATION
    if not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    kind = "ema" if config.ema.enabled else "model"
    return {record["step"]: record for record in records if record["weights"] == kind}


def compared_with(config: Config) -> tuple[Any, Tensor]:
    """What samples are compared with: of digits the pictures never trained on, else those trained on. The
    source, and its pictures (N, 3, h, w) in [-1, 1]."""
    data = config.data
    if data.source == "digits":
        source = DigitsSource("test")
    else:
        source = split(open_source(data), config.validation, data).train
    return source, views(source, data)


def views(source: Any, data: Data) -> Tensor:
    """All pictures of a source as evaluation sees them, (N, 3, h, w) in [-1, 1]."""
    square = data.model_copy(update={"aspect": "square"})
    return torch.stack(
        [evaluation_view(source.image(i), square, 1, source.key(i)) for i in range(len(source))]
    )


def prompts(source: Any, data: Data) -> list[str]:
    """The captions that the run was mostly trained with."""
    share = data.long_caption if isinstance(data.long_caption, float) else data.long_caption[-1][1]
    return [source.captions(i).long if share >= 0.5 else source.captions(i).short for i in range(len(source))]


def build_sampler(config: Config, weights: dict[str, Tensor]) -> Sampler:
    """The trained denoiser with the frozen networks of its run."""
    device = process_group.choose_device(config.run.device)
    compute = getattr(torch, config.precision.compute)
    autoencoder = open_autoencoder(config.conditioning.autoencoder, device)
    return Sampler(
        filled_denoiser(config, weights.items(), device),
        FlowMatching(config.objective, config.run.seed, edge=autoencoder.factor * config.model.patch_size),
        autoencoder,
        open_text_encoder(config.conditioning.text, config.model.context_dim, device, compute),
        device,
        compute,
    )


if __name__ == "__main__":
    run_command(main)
