"""The whole road, once: from img2dataset's tars to a fine-tuned pipeline, by the commands of the docs.

Every piece has tests of its own. Here each takes what the one before it left on the disk, and what flows
between them is compared. `pytest -s tests/test_road.py` prints the commands with their seconds.

`walk` has the steps in order, `check_...` what must hold between two of them, and the last tests plant a
fault between two pieces and see that the same checks find it.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import tarfile
import time
import types
from collections import Counter
from contextlib import chdir
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from millrace.benchmarks.models.scaling_worker import allocations, mark
from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.checkpoint.weight_formats import load_weights
from millrace.engine.config.loading import load_config
from millrace.engine.config.stages import resolve_stages, stage_at
from millrace.engine.data import SampleStream, evaluation_view, open_source
from millrace.engine.data.formats.shard_index import read_manifest
from millrace.engine.data.latent_cache import LatentCache, TextCache
from millrace.engine.data.sources.builtin import BuiltinSource
from millrace.engine.data.sources.held_out_split import split
from millrace.engine.data.sources.shards import ShardsSource
from millrace.engine.encoders.autoencoder import autoencoder_entry, open_autoencoder
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.encoders.text_encoder import open_text_encoder, text_encoder_entry
from millrace.engine.evaluation.features import tiny_features, tiny_networks
from millrace.engine.planning.cpu_device import this_machine
from millrace.engine.planning.search import Planner
from millrace.engine.planning.step_memory import gigabytes, saved_bytes
from millrace.engine.sampling.trained_model import open_sampler
from millrace.engine.trainer import Trainer
from tests.engine.conftest import Runs
from tests.engine.forks import ForkServer, run_script, run_train_until
from tests.programs import ROOT

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EDGE = 16
"""Pixels of a token: patches of 2 in latents of FLUX.1's factor 8."""
SMALL, LARGE = 64, 128
"""Pixels of the two stages."""
BOUNDARY, LAST, STOPPED, KILLED = 6, 12, 3, 9
"""Steps: of the stages' boundary and the end; after which SIGTERM came, and kill -9."""
BATCH, MICRO = 8, 2
PROMPT = "a cup of coffee beside a spoon"


class Road:
    """A folder that the commands run in, and what they said."""

    def __init__(self, root, runs):
        self.root, self.runs = root, runs
        self.said = {}
        """Output of each command by its name."""
        self.seconds = {}

    def __truediv__(self, path):
        return self.root / path

    def step(self, name, page, line, code=0, **how):
        """Run a command of a page of the docs, in forks that have imported the engine."""
        words = shlex.split(line)
        require_printed(page, words)
        if words[0] == "torchrun":
            ranks, script, words = int(words[2]), ROOT / words[3], words[4:]
        else:
            ranks, script, words = 1, ROOT / "engine" / f"{words[1]}.py", words[2:]
        begun = time.perf_counter()
        done = self.runs.script(script, *words, ranks=ranks, cwd=self.root, **how)
        self.told(name, time.perf_counter() - begun, line)
        assert done.returncode == code, (line, done.stdout, done.stderr)
        self.said[name] = done.stdout + done.stderr
        return self.said[name]

    def told(self, name, seconds, line=""):
        self.seconds[name] = seconds
        print(f"{seconds:6.1f} s  {name:<24} {line}", flush=True)

    def log(self, run):
        """Records of the steps of a run, and its evaluations by step."""
        records = [json.loads(line) for line in (self / run / "log.jsonl").read_text().splitlines()]
        evaluations = {r["step"]: r["evaluation"] for r in records if "evaluation" in r}
        return [r for r in records if "evaluation" not in r], evaluations

    def newest(self, run):
        """Its last checkpoint."""
        return CheckpointReader(list_checkpoints(self / run / "checkpoints")[-1][1])


def require_printed(page, words):
    """The page of the docs has this command with these options; files and settings are the reader's own."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    command = " ".join(words[:2]) if words[0] == "millrace" else "torchrun --nproc-per-node"
    lacking = [part for part in (command, *(w for w in words if w.startswith("--"))) if part not in text]
    assert not lacking, f"docs/{page}.md does not print {lacking}"


# ---------------------------------------------------------------------------------------------- the material


def write_tars(folder):
    """What img2dataset leaves (`--output_format webdataset`): numbered samples with caption and metadata,
    three crops of each of twelve built-in pictures, upright and wide. And its records beside the tars."""
    folder.mkdir(parents=True)
    pictures = BuiltinSource()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * 18, shard * 18 + 18):
                number, crop = divmod(i, 3)
                caption = pictures.captions(number).short
                picture = cropped(pictures.image(number), crop)
                metadata = {"caption": caption, "url": f"https://example.org/{i}.jpg", "key": f"{i:09d}"}
                metadata |= {"status": "success", "width": picture.width, "height": picture.height}
                file = io.BytesIO()
                picture.save(file, "JPEG", quality=95)
                add(tar, f"{i:09d}.jpg", file.getvalue())
                add(tar, f"{i:09d}.txt", caption.encode())
                add(tar, f"{i:09d}.json", json.dumps(metadata).encode())
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 18, "successes": 18}))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


def cropped(picture, crop):
    """Of about 160 pixels: a square from the left, a wide piece, an upright one."""
    shape = [(160, 160), (208, 128), (128, 208)][crop]
    scale = max(shape[0] / picture.width, shape[1] / picture.height)
    size = tuple(max(round(edge * scale), wanted) for edge, wanted in zip(picture.size, shape, strict=True))
    return picture.convert("RGB").resize(size).crop((0, 0, *shape))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_photos(folder):
    """Twenty other pictures with caption files: two crops of each of the built-in pictures that are left."""
    folder.mkdir(parents=True)
    pictures = BuiltinSource()
    for i in range(20):
        number = 12 + i // 2
        cropped(pictures.image(number), 1 + i % 2).save(folder / f"{i:04d}.jpg", quality=95)
        (folder / f"{i:04d}.txt").write_text(pictures.captions(number).short)


def write_networks(root):
    """Small random instances of the real classes: T5Gemma, AutoencoderKL, DINOv2, and the metrics'."""
    text_encoder_entry("t5gemma").tiny(16, root / "t5gemma")
    autoencoder_entry("flux1").tiny(root / "flux1")
    vision_entry("dinov2").tiny(root / "dinov2")
    tiny_networks(root / "metrics")


ROAD = {
    "run": {"output_dir": "runs/road", "steps": LAST, "seed": 7, "device": "cpu"},
    "model": {
        "width": 96, "depth": 4, "heads": 3, "patch_size": 2, "in_channels": 16, "context_dim": 16
    },
    "objective": {"prediction": "velocity"},
    "routing": {"policy": "tread", "start": 1, "end": 2, "drop": 0.5},
    "alignment": {
        "kind": "repa", "weight": 0.5, "block": 1,
        "teacher": {"kind": "dinov2", "path": "networks/dinov2", "dtype": "float32"},
    },
    "conditioning": {
        "text": {"kind": "t5gemma", "path": "networks/t5gemma", "max_tokens": 40},
        "autoencoder": {"kind": "flux1", "path": "networks/flux1", "dtype": "float32"},
        "caption_drop": 0.2,
    },
    "data": {
        "source": "shards", "path": f"datasets/photos-{SMALL}", "resolution": SMALL, "aspect": "bucket",
        "crop": "center", "upscale": True, "cached": ["text"], "bucket_run": 4,
        "global_batch": BATCH, "micro_batch": MICRO, "workers": 0,
    },
    "optimizer": {"lr": 3e-3, "eps": 1e-8},
    "schedule": {"kind": "constant", "warmup": 2},
    "ema": {"enabled": True, "decay": 0.8, "every": 1},
    "precision": {"compute": "float32"},
    "checkpoint": {"every_steps": 2, "keep": 20},
    "logging": {"every_steps": 1, "sample_keys": True},
    "sampling": {"every_steps": BOUNDARY, "steps": 3, "guidance": 2.0, "times": "diffusers", "count": 4},
    "evaluation": {
        "every_steps": BOUNDARY, "samples": 12, "cache": "statistics",
        "features": tiny_features("networks/metrics"),
    },
    "validation": {"every_steps": 3, "share": 0.2, "times": 2},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "stages": [
        {
            "at": BOUNDARY, "name": "larger",
            "alignment": {"kind": "none"},
            "objective": {"time_shift": 2.0},
            "data": {
                "path": f"datasets/photos-{LARGE}", "resolution": LARGE, "cached": ["text", "latents"]
            },
        }
    ],
}  # fmt: skip
FINETUNE = {
    "extends": "road.json",
    "run": {"output_dir": "runs/finetune", "init_from": "road-pipeline", "steps": 4},
    "alignment": {"kind": "none"},
    "routing": {"policy": "none"},
    "objective": {"time_shift": 2.0},
    "data": {
        "source": "folder", "path": "photos", "resolution": LARGE, "aspect": "square", "cached": [],
    },
    "sampling": {"every_steps": 0},
    "evaluation": {"every_steps": 0},
    "validation": {"every_steps": 0, "share": 0.0},
    "stages": [],
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- the walk


def walk(road):
    """Every step in order."""
    begun = time.perf_counter()
    write_tars(road / "raw/photos-tars")
    write_photos(road / "photos")
    write_networks(road / "networks")
    for name, values in (("road", ROAD), ("finetune", FINETUNE)):
        (road / f"{name}.json").write_text(json.dumps(values, indent=4))
    road.told("material", time.perf_counter() - begun)

    for size in (SMALL, LARGE):
        said = road.step(
            f"prepare {size}",
            "data",
            f"millrace prepare --input raw/photos-tars --output datasets/photos-{size} --resolution {size} "
            f"--patch {EDGE} --upscale --workers 0",
        )
        assert "36 of 36" in said
    road.step(
        "cache text", "caches", f"millrace cache text --dataset datasets/photos-{SMALL} --config road.json"
    )
    road.step(
        "cache text,latents",
        "caches",
        f"millrace cache text,latents --dataset datasets/photos-{LARGE} --config road.json",
    )
    road.step("plan", "planning", "millrace plan --config road.json --device cpu --gpus 2")

    train = "millrace train --config road.json --set deepspeed.zero_optimization.stage=1"
    road.step(
        "train, SIGTERM",
        "quickstart",
        "torchrun --nproc-per-node 2 engine/train.py --config road.json",
        function=partial(run_train_until, STOPPED, signal.SIGTERM),
    )
    road.step(
        "resume, kill -9",
        "quickstart",
        f"{train} --resume auto",
        code=-signal.SIGKILL,
        function=partial(run_train_until, KILLED, signal.SIGKILL),
    )
    road.step("resume, finish", "quickstart", f"{train} --resume auto")
    road.step("evaluate", "evaluation", "millrace evaluate --checkpoint runs/road --output scores.json")
    road.step("replay", "comparing", f"millrace replay runs/road --step {LAST} --output replay.json")

    others = f"{train} --set evaluation.every_steps={LAST} --set sampling.every_steps=0"
    road.step("second seed", "quickstart", f"{others} --set run.output_dir=runs/seed-8 --set run.seed=8")
    road.step("other rate", "quickstart", f"{others} --set run.output_dir=runs/fast --set optimizer.lr=3e-2")
    road.step(
        "compare", "comparing", "millrace compare runs/road runs/seed-8 runs/fast --output road-or-fast"
    )

    road.step("export", "checkpoints", "millrace export --checkpoint runs/road --pipeline road-pipeline")
    ask = f"--prompt {shlex.quote(PROMPT)} --seed 3"
    road.step("sample", "quickstart", f"millrace sample --checkpoint runs/road {ask} --output of-run")
    road.step(
        "sample before",
        "quickstart",
        f"millrace sample --checkpoint road-pipeline --config finetune.json {ask} --output before",
    )
    begun = time.perf_counter()
    sample_with_diffusers(road)
    road.told("diffusers", time.perf_counter() - begun, "PRXPipeline.from_pretrained('road-pipeline')")
    road.step("fine-tune", "quickstart", "millrace train --config finetune.json")
    road.step(
        "sample after", "quickstart", f"millrace sample --checkpoint runs/finetune {ask} --output after"
    )
    print(f"{sum(road.seconds.values()):6.1f} s  in all", flush=True)
    return road


def sample_with_diffusers(road):
    """The picture of `sample` by diffusers' own pipeline, from the noise that belongs to its seed."""
    from diffusers import PRXPipeline
    from diffusers.pipelines.prx import pipeline_prx

    state, config = checkpoint_state(road / "runs/road")
    sampler = open_sampler(state, config, road / "runs/road", CPU)
    noise = sampler._start(torch.tensor([3]), [(16, LARGE // 8, LARGE // 8)], 0)
    pipeline = PRXPipeline.from_pretrained(road / "road-pipeline")
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:  # stands for ftfy, which this caption does not need
        patch.setattr(pipeline_prx, "ftfy", types.SimpleNamespace(fix_text=str), raising=False)
        picture = pipeline(
            PROMPT,
            num_inference_steps=config.sampling.steps,
            guidance_scale=config.sampling.guidance,
            latents=torch.stack(noise),
            use_resolution_binning=False,
        ).images[0]
    picture.save(road / "by-diffusers.png")


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    forks = ForkServer()
    root = tmp_path_factory.mktemp("road")
    with chdir(root):  # the files name each other by relative paths, as on the pages
        yield walk(Road(root, Runs(forks)))
    forks.close()


# ------------------------------------------------------------------------------------ what flows between them


def stages_of(run):
    """The stages of a run, by the file that it left."""
    return resolve_stages(load_config(run / "config.json"))


def check_terms(road, run):
    """The terms of each step's loss, and its name in the log, are those of the stage that it belongs to."""
    stages = stages_of(road / run)
    records, _ = road.log(run)
    assert [record["step"] for record in records] == list(range(1, LAST + 1)), "steps are missing or doubled"
    for record in records:
        stage = stage_at(stages, record["step"] - 1)
        wanted = {"flow"} | ({"repa"} if stage.config.alignment.active else set())
        where = f"step {record['step']} of stage {stage.number + 1}"
        assert set(record["losses"]) == wanted, f"{where} has the terms {sorted(record['losses'])}"
        assert record["stage"] == stage.name, where
        assert sum(record["losses"].values()) == pytest.approx(record["loss"], rel=1e-6), where


def check_samples(road, run):
    """Keys, captions and cuts that the run wrote down are those of the stream that its settings describe."""
    consumed = {}
    for path in (road / run / "keys").glob("rank-*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            consumed.setdefault(record["step"], Counter()).update(
                zip(record["keys"], record["captions"], strict=True)
            )
    records, _ = road.log(run)
    for stage in stages_of(road / run):
        config = stage.config
        source = split(open_source(config.data), config.validation, config.data).train
        stream = SampleStream(
            source,
            config.data,
            seed=config.run.seed,
            patch=EDGE,
            caption_drop=config.conditioning.caption_drop,
            rank=0,
            world_size=1,
            first_sample=stage.first * BATCH,
            origin=(stage.data_sample, stage.data_step),
        )
        tower = tower_of(config)
        for step in range(stage.first + 1, stage.last + 1):
            batches = [next(stream) for _ in range(BATCH // MICRO)]
            wanted = Counter(pair for batch in batches for pair in zip(batch.keys, batch.which, strict=True))
            assert consumed[step] == wanted, f"step {step} consumed other samples than its settings say"
            captions = [caption for batch in batches for caption in batch.captions]
            cut = tower.encode(captions).truncated
            assert records[step - 1]["captions_cut"] == cut, f"step {step}: captions cut"


def tower_of(config):
    return open_text_encoder(config.conditioning.text, config.model.context_dim, CPU, torch.float32)


def check_cache(stage, dataset):
    """Rows and posteriors beside the shards are what the run's networks make of captions and pictures."""
    config, source, manifest = stage.config, ShardsSource(dataset), read_manifest(Path(dataset))
    tower, autoencoder = tower_of(config), open_autoencoder(config.conditioning.autoencoder, CPU)
    text = TextCache(Path(dataset), manifest)
    latents = LatentCache(Path(dataset), manifest) if "latents" in config.data.cached else None
    for i in range(len(source)):
        place, caption = source.place(i), source.captions(i).long
        for rows, words in ((text.rows(place, "long").rows, caption), (text.empty.rows, "")):
            wanted = tower.encode([words]).embeddings
            close = rows.shape == wanted.shape and torch.allclose(rows.float(), wanted, 2**-8, 1e-3)
            assert close, f"{dataset}: the cached rows of {words!r} are not those of the run's text encoder"
        if latents is not None:
            height, width = source.buckets[source.bucket_of[i]]
            view = evaluation_view(source.image(i), config.data, EDGE)
            assert view.shape[1:] == (height, width)
            mean = autoencoder.posterior(view[None]).mean[0]
            assert torch.allclose(latents.moments(place)[0].float(), mean, rtol=2**-7, atol=1e-4), i


def check_exported(reader, pipeline):
    """A pipeline's transformer is the checkpoint's average to the last bit, and not the weights beside it."""
    average = {name[4:]: reader.tensor(name) for name in reader.names() if name.startswith("ema/")}
    state, *_ = load_weights(pipeline, load_config(Path("road.json")).model)
    assert state.keys() == {name for name in average if not name.startswith("alignment.")}
    for name, tensor in state.items():
        assert torch.equal(tensor, average[name]), f"{pipeline}: {name} is not the EMA of {reader.folder}"
    moved = [name for name in state if not torch.equal(state[name], reader.tensor(f"master/{name}"))]
    assert len(moved) == len(state), "average and weights are the same: nothing tells them apart"


def levels(path):
    return np.asarray(Image.open(path), np.int16)


# -------------------------------------------------------------------------------------------------- the tests


def test_settings_are_those_asked_for(road):
    """In the run's file, in each checkpoint, and in the lines that people read."""
    zero = "deepspeed.zero_optimization.stage=1"
    asked = [load_config("road.json"), load_config("road.json", [zero])]
    assert load_config("runs/road/config.json") == asked[1]
    checkpoints = list_checkpoints(road / "runs/road/checkpoints")
    stopped = int(re.search(r"stopped at step (\d+) \(SIGTERM\)", road.said["train, SIGTERM"])[1])
    assert STOPPED <= stopped < BOUNDARY
    steps = [step for step, _ in checkpoints]
    assert steps == sorted({*range(2, LAST + 1, 2), stopped})
    for step, folder in checkpoints:
        wanted = asked[step > stopped].model_dump(mode="json")
        assert CheckpointReader(folder).meta["config"] == wanted, folder
        assert len(list(folder.glob("shard-*"))) == (1 if step > stopped else 2)
    first, second, third = (
        road.said[name] for name in ("train, SIGTERM", "resume, kill -9", "resume, finish")
    )
    assert "job: 2 process(es) on cpu, ZeRO 2, 2 x 2 samples" in first
    assert "job: 1 process(es) on cpu, ZeRO 1, 4 x 2 samples" in second
    assert f"resumed at step {stopped}, sample {stopped * BATCH}" in second
    assert "warning: changed since the checkpoint: deepspeed.zero_optimization.stage\n" in second
    resumed = int(re.search(r"resumed at step (\d+), sample", third)[1]) if "resumed" in third else BOUNDARY
    assert BOUNDARY <= resumed <= KILLED
    assert "changed since the checkpoint" not in third
    assert f"finished: {LAST} steps, {LAST * BATCH} samples, 0 steps skipped" in third
    assert "routing: tread" in first
    changed = "alignment.kind, data.cached, data.path, data.resolution, objective.time_shift"
    assert f"stage 2 of 2 (larger): steps {BOUNDARY + 1} to {LAST}; changed: {changed}\n" in second
    assert f"cached text (bfloat16): datasets/photos-{SMALL}" in first
    assert f"cached latents (float32): datasets/photos-{LARGE}" in second


def test_terms_of_the_loss_are_those_of_the_stage(road):
    check_terms(road, "runs/road")


def test_samples_and_captions_are_those_of_the_log(road):
    check_samples(road, "runs/road")


def test_caches_are_of_the_run_s_networks(road):
    for stage in stages_of(road / "runs/road"):
        check_cache(stage, stage.config.data.path)


def test_a_logged_step_is_made_again(road):
    found = json.loads((road / "replay.json").read_text())
    records, _ = road.log("runs/road")
    assert found["record"]["loss"] == found["logged"]["loss"] == records[-1]["loss"]
    assert found["same_keys"]


def test_evaluation_is_that_of_the_log(road):
    """Every digit, of the size and with the weights that the run evaluated."""
    report, (_, logged) = json.loads((road / "scores.json").read_text()), road.log("runs/road")
    assert sorted(logged) == [BOUNDARY, LAST]
    assert report["metrics"] == {name: logged[LAST][name] for name in ("fid", "cmmd", "dino_mmd")}
    assert (report["resolution"], logged[LAST]["weights"]) == (LARGE, "ema")
    assert report["model"].startswith("EMA weights of")
    assert report["model"].endswith(f"step {LAST}, stage 'larger'")


def test_the_comparison_is_of_what_the_runs_logged(road):
    report = json.loads((road / "road-or-fast/comparison.json").read_text())
    assert [[run["seed"] for run in setting["runs"]] for setting in report["settings"]] == [[7, 8], [7]]
    (found,) = report["comparisons"]
    assert found["differing"] == {"optimizer.lr": [3e-3, 3e-2]}
    rows = {row["quantity"]: row for row in found["rows"]}
    runs = {name: road / "runs" / name for name in ("road", "seed-8", "fast")}
    for weights, title in (("ema", "held-out loss, EMA"), ("model", "held-out loss, model")):
        last = {
            name: [
                record["loss"]
                for record in map(json.loads, (folder / "validation.jsonl").read_text().splitlines())
                if (record["step"], record["weights"]) == (LAST, weights)
            ]
            for name, folder in runs.items()
        }
        assert [len(losses) for losses in last.values()] == [1] * 3
        assert rows[title]["samples"] == LAST * BATCH
        assert rows[title]["first"] == pytest.approx((last["road"][0] + last["seed-8"][0]) / 2, rel=1e-12)
        assert rows[title]["second"] == pytest.approx(last["fast"][0], rel=1e-12)
    fid = {name: road.log(folder)[1][LAST]["fid"] for name, folder in runs.items()}
    assert rows["FID"]["first"] == pytest.approx((fid["road"] + fid["seed-8"]) / 2, rel=1e-12)
    assert rows["FID"]["second"] == pytest.approx(fid["fast"], rel=1e-12)


def test_ema_weights_are_those_exported_sampled_and_tuned(road):
    reader = road.newest("runs/road")
    check_exported(reader, "road-pipeline")
    for name in ("evaluate", "sample", "export"):
        assert f"EMA weights of runs/road/checkpoints/step-{LAST:08d}, step {LAST}" in road.said[name], name
    origin = f"(EMA weights of runs/road/checkpoints/step-{LAST:08d}, step {LAST}"
    assert f"init_from: weights of the diffusers pipeline road-pipeline {origin}" in road.said["fine-tune"]
    assert "vae: copied from networks/flux1 (licence: not known here)" in road.said["export"]
    assert "none left new" in road.said["fine-tune"]
    assert "warning" not in road.said["fine-tune"]


def test_pictures_before_and_after(road):
    """The run's and the pipeline's have the same pixels, diffusers' within a level; tuned ones differ."""
    ours, before, after = (levels(road / folder / "00000.png") for folder in ("of-run", "before", "after"))
    assert ours.shape == (LARGE, LARGE, 3)
    assert ours.std() > 1
    assert (before == ours).all()
    assert abs(levels(road / "by-diffusers.png") - ours).max() <= 1
    assert (after != before).mean() > 0.05
    (record, *_), _ = road.log("runs/finetune")
    assert record["losses"].keys() == {"flow"}
    keys = [
        key
        for line in (road / "runs/finetune/keys/rank-00000.jsonl").read_text().splitlines()
        for key in json.loads(line)["keys"]
    ]
    assert set(keys) <= {f"{i:04d}.jpg" for i in range(20)}


def measured(root, checkpoint, changes):
    """Bytes of training steps from a checkpoint on, in a process of its own."""
    os.chdir(root)
    config = load_config("road.json", changes)
    with allocations(CPU) as found:
        trainer = Trainer(config, checkpoint)
        for _ in range(3):
            mark()
            trainer.train_step()
    return found


def test_the_plan_s_memory_is_that_of_the_run(road):
    """What the command printed; what is held between two steps, and at their peak; what a checkpoint writes.

    Temporaries inside operators are not planned; of a model as small as this they are some percent.
    """
    printed = [line for line in road.said["plan"].splitlines() if line.startswith("as configured:")]
    machine = this_machine(1)  # its speed is no part of the memory
    for stage, line in zip(resolve_stages(load_config("road.json")), printed, strict=True):
        peak = Planner(stage.config, 2, machine).option(2, MICRO, "none").memory.peak
        assert line.startswith(
            f"as configured: ZeRO 2, micro-batch {MICRO}, checkpointing none: {gigabytes(peak)}"
        )

    changes = [f"{section}.every_steps=0" for section in ("sampling", "evaluation", "validation")]
    changes += ["deepspeed.zero_optimization.stage=1", "run.output_dir=runs/measured"]
    folders = dict(list_checkpoints(road / "runs/road/checkpoints"))
    found = road.runs.apart(measured, str(road.root), str(folders[LAST - 4]), changes)
    planner = Planner(resolve_stages(load_config("road.json", changes))[1].config, 1, machine)
    memory = planner.option(1, MICRO, "none").memory
    print(
        f"held {found['between_steps']:,} of {memory.held:,.0f}, peak {found['peak']:,} of {memory.peak:,.0f}"
    )
    assert found["between_steps"] == pytest.approx(memory.held, rel=0.005)
    assert found["peak"] == pytest.approx(memory.peak, rel=0.1)
    written = sum(piece.stat().st_size for piece in folders[LAST].glob("shard-*"))
    assert written == pytest.approx(saved_bytes(planner.config, 1, planner.shape), rel=0.005)


# -------------------------------------------------------------------------------------------- planted faults


def run_keeping_the_term(path, arguments):
    """train.py, whose second stage goes on with the alignment of the first."""
    from millrace.engine import trainer

    resolve = trainer.resolve_stages

    def keeping(config):
        first, second = resolve(config)
        data = second.config.data.model_copy(update={"cached": ("text",)})  # the teacher looks at pictures
        own = {"alignment": first.config.alignment, "data": data}
        return [first, second._replace(config=second.config.model_copy(update=own))]

    trainer.resolve_stages = keeping
    run_script(path, arguments)


def test_a_stage_that_keeps_its_loss_term_is_found(road):
    shutil.copytree(road / "runs/road", road / "runs/keeps")
    for step, folder in list_checkpoints(road / "runs/keeps/checkpoints"):
        if step > BOUNDARY:
            shutil.rmtree(folder)
    quiet = "--set evaluation.every_steps=0 --set sampling.every_steps=0 --set validation.every_steps=0"
    road.step(
        "planted: the term",
        "quickstart",
        f"millrace train --config road.json --set run.output_dir=runs/keeps {quiet} --resume auto",
        function=run_keeping_the_term,
    )
    with pytest.raises(AssertionError, match=rf"step {BOUNDARY + 1} of stage 2 has the terms .*repa"):
        check_terms(road, "runs/keeps")


def test_a_cache_of_another_tower_is_found(road):
    """By the run, which refuses it; and by the rows where the manifest claims to be of the run's tower."""
    shutil.copytree(road / "networks/t5gemma", road / "networks/other")
    weights = road / "networks/other/model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    right = road / f"datasets/photos-{SMALL}"
    shutil.copytree(right, road / "datasets/other")
    road.step(
        "planted: the tower",
        "caches",
        "millrace cache text --dataset datasets/other --config road.json --replace "
        "--set conditioning.text.path=networks/other",
    )
    said = road.step(
        "train from it",
        "caches",
        "millrace train --config road.json --set data.path=datasets/other --set run.output_dir=runs/other",
        code=2,
    )
    assert "datasets/other: its text cache was made by another network" in said
    manifest = road / "datasets/other/manifest.json"
    values, honest = json.loads(manifest.read_text()), json.loads((right / "manifest.json").read_text())
    values["caches"]["text"]["network"] = honest["caches"]["text"]["network"]
    manifest.write_text(json.dumps(values))
    with pytest.raises(AssertionError, match="not those of the run's text encoder"):
        check_cache(stages_of(road / "runs/road")[0], "datasets/other")


def test_an_export_of_the_wrong_weights_is_found(road):
    road.step(
        "planted: the weights",
        "checkpoints",
        "millrace export --checkpoint runs/road --pipeline wrong-pipeline --weights model",
    )
    with pytest.raises(AssertionError, match="is not the EMA of"):
        check_exported(road.newest("runs/road"), "wrong-pipeline")
