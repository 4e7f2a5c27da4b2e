"""What runs at a reduced scale share: the judge of samples, the teacher, curated and held-out pictures."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from millrace.benchmarks.quality.ablations_run import views
from millrace.benchmarks.quality.ablations_scales import Assets, Scale, data_source
from millrace.benchmarks.report.recording import ROOT
from millrace.engine.config.loading import parse_config
from millrace.engine.data.sources.digits import DigitsSource, most_typical
from millrace.engine.encoders.small_classifier import save_classifier
from millrace.engine.evaluation.digit_judge import accuracy, embeddings, train_classifier
from millrace.engine.evaluation.frechet import frechet_distance, moments

JUDGE_SEED, TEACHER_SEED = 1, 2
JUDGE_WIDTH, TEACHER_WIDTH = 8, 16
"""Two networks that differ, so that alignment does not train towards the judge."""

Result = dict[str, Any]


def make_assets(
    scale: Scale | None, source: str | None, work: Path, quick: bool
) -> tuple[Result | None, Assets | None]:
    """Train the judge and the teacher, choose the curated pictures and write the held-out ones, where the
    source has labels; and how well the judge does."""
    if scale is None:
        return None, None
    assets = Assets(_from_root(work / "teacher"), _from_root(work / "curated.txt"), None)
    if source != "digits":
        return None, assets
    assets = assets._replace(held_out=_from_root(work / "held_out"))
    data = parse_config({"data": {**data_source(source), "resolution": scale.edge}}, "digits").data
    parts = [DigitsSource(part) for part in ("train", "test")]
    train, test = (views(part, data) for part in parts)
    labels, wanted = (torch.tensor([part.label(i) for i in range(len(part))]) for part in parts)
    began = time.perf_counter()
    steps = {"steps": 30} if quick else {}
    judge = train_classifier(train, labels, classes=10, seed=JUDGE_SEED, width=JUDGE_WIDTH, **steps)
    seconds = time.perf_counter() - began
    teacher = train_classifier(train, labels, classes=10, seed=TEACHER_SEED, width=TEACHER_WIDTH, **steps)
    save_classifier(judge, work / "judge")
    save_classifier(teacher, work / "teacher")
    curated = most_typical(parts[0], scale.curated)
    (work / "curated.txt").write_text("\n".join(curated) + "\n")
    write_pictures(parts[1], work / "held_out")
    floor = frechet_distance(*(moments(embeddings(judge, pictures)) for pictures in (train, test)))
    return {
        "seed": JUDGE_SEED,
        "width": JUDGE_WIDTH,
        "seconds": round(seconds, 1),
        "accuracy": accuracy(judge, test, wanted),
        "frechet_of_training_pictures": floor,
        "training_pictures": len(train),
        "held_out_pictures": len(test),
        "teacher": {
            "seed": TEACHER_SEED,
            "width": TEACHER_WIDTH,
            "accuracy": accuracy(teacher, test, wanted),
        },
        "curated_pictures": len(curated),
    }, assets


def write_pictures(source: DigitsSource, folder: Path) -> None:
    """A source as a folder of pictures with captions, each named by its key."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(source)):
        name = source.key(index).replace("/", "-")
        captions = source.captions(index)
        source.image(index).save(folder / f"{name}.png")
        texts = {"long": captions.long, "short": captions.short}
        (folder / f"{name}.json").write_text(json.dumps(texts))


def _from_root(path: Path) -> Path:
    """As results may name it: where the repository lies is no property of a run."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
