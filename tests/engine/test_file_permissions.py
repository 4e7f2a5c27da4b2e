"""Colleagues on a shared disk read what a run, its caches and its exports hold."""

import json
import os

import pytest
import torch

from millrace.engine import export
from millrace.engine.config import Teacher
from millrace.engine.data.sources.key_subset import write_keys
from millrace.engine.encoders.latent_cache_writer import write_caches
from millrace.engine.encoders.latent_statistics import save_statistics
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier
from millrace.engine.encoders.teacher import open_teacher
from millrace.engine.evaluation import reference_statistics
from millrace.engine.losses.contrastive import MeanTarget
from millrace.engine.util.files import TEMPORARY


@pytest.fixture
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_files_of_every_writer_are_readable_by_the_group(tmp_path, runs, write_shards):
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", {(16, 16): 8})
    shards = {"data": {"source": "shards", "path": str(tmp_path / "shards")}}
    write_caches(tmp_path / "shards", runs.config(tmp_path / "run", shards), ("text",), say=list)

    changes = {
        "run": {"steps": 2},
        "model": {"in_channels": 3},
        "sampling": {"every_steps": 2, "count": 1, "steps": 1},
        "logging": {"sample_keys": True},
    }
    assert runs.here(tmp_path / "run", shards, changes).error is None
    for form in ("diffusers", "prx"):
        export.main(
            ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / form), "--format", form]
        )

    identity = {"metric": "fid", "network": "none"}
    reference_statistics.write([tmp_path / "statistics.safetensors"], identity, {"mean": torch.zeros(2)})
    save_classifier(SmallClassifier(10, 4), tmp_path / "teacher")
    teacher = Teacher(kind="classifier", path=str(tmp_path / "teacher"), cache=str(tmp_path / "features"))
    open_teacher(teacher, torch.device("cpu")).features([torch.zeros(3, 16, 16)], [(4, 4)], ["a"])
    MeanTarget(torch.zeros(3, 1, 1), 1).save(tmp_path / "mean.safetensors")
    save_statistics(tmp_path, torch.ones(3, 1, 1), torch.zeros(3, 1, 1))
    write_keys(tmp_path / "keys.txt", ["a"])

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    closed = [str(path) for path in files if path.stat().st_mode & 0o044 != 0o044]
    assert closed == []
    assert [path for path in files if path.name.endswith(TEMPORARY)] == []
    kinds = json.dumps(sorted(str(path.relative_to(tmp_path)) for path in files))
    for name in (
        *(
            "manifest.sha256",
            "shard-00000-of-00001.safetensors",
            "log.jsonl",
            "config.json",
            "rank-00000.jsonl",
        ),
        *("step-00000002.png", "prompts.txt", "00000.tar", "00000.text.safetensors", "cache.json"),
        *("diffusion_pytorch_model.safetensors", "denoiser.safetensors", "statistics.safetensors"),
    ):
        assert name in kinds, kinds
