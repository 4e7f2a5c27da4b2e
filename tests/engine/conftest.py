"""Tiny training runs for the tests of the engine: in this process, on two ranks, or as the real command."""

import importlib.util
import io
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Config
from millrace.engine.config.loading import (
    merge,
    parse_config,
)
from millrace.engine.data import Captions
from millrace.engine.data.formats.shard_index import Manifest
from millrace.engine.data.formats.shard_writer import (
    StoredSample,
    sample_record,
    write_manifest,
    write_shard,
)
from tests.programs import environment

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parents[1] / "engine" / "train.py"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"

TINY = {
    "run": {"steps": 6, "device": "cpu"},
    "model": {"width": 32, "depth": 2, "heads": 1, "patch_size": 4, "in_channels": 3, "context_dim": 16},
    "objective": {"prediction": "sample"},
    "conditioning": {"text": {"kind": "hash"}, "autoencoder": {"kind": "pixels"}},
    "data": {"resolution": 16, "global_batch": 8, "micro_batch": 2, "workers": 0},
    "optimizer": {"lr": 1e-3, "eps": 1e-8, "clip": 1.0},
    "schedule": {"kind": "cosine", "warmup": 2, "final": 0.05},
    "ema": {"enabled": True, "decay": 0.9, "every": 1},
    "precision": {"compute": "float32"},
    "checkpoint": {"every_steps": 100, "keep": 20},
    "logging": {"every_steps": 1, "tensorboard": False},
}
"""A run of seconds that uses accumulation, clipping, a schedule and EMA."""


@pytest.fixture
def write(tmp_path):
    """`write("name.json", {...})` -> path; text is written as it is."""

    def to_file(name, values):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return to_file


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _launch(ranks: int, script: Path, *arguments: object) -> list[str]:
    words = [str(script), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *words]
    return [str(DEEPSPEED), "--num_gpus", str(ranks), "--master_port", str(_free_port()), *words]


class Runs:
    """Makes configurations and runs them."""

    environment = staticmethod(environment)

    def __init__(self, jobs: ModuleType) -> None:
        self.jobs = jobs

    def values(self, output: Path, *changes: dict) -> dict:
        """TINY with `changes` laid on it, as plain values."""
        values = merge(TINY, {"run": {"output_dir": str(output)}})
        for change in changes:
            values = merge(values, change)
        return values

    def config(self, output: Path, *changes: dict) -> Config:
        return parse_config(self.values(output, *changes), "test")

    def here(self, output: Path, *changes: dict, **job: object) -> object:
        """Train in this process; the job's result."""
        return self.jobs.run(self.jobs.Job("job", self.values(output, *changes), **job))

    def elsewhere(self, folder: Path, jobs: list, ranks: int) -> dict[str, list]:
        """Results of each job that lived, by name and rank: two ranks under one launcher, or forks."""
        folder.mkdir(parents=True)
        torch.save(jobs, folder / "jobs.pt")
        done = subprocess.run(
            _launch(ranks, HERE / "jobs.py", folder / "jobs.pt", folder),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=1000,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {
            job.name: [
                self.jobs.Result(**torch.load(folder / f"{job.name}-{rank}.pt", weights_only=False))
                for rank in range(ranks)
            ]
            for job in jobs
            if job.killed is None
        }

    def command(self, output: Path, *changes: dict, ranks: int = 1, arguments: tuple = ()) -> list[str]:
        """Words of the real command for this configuration, which is written beside `output`."""
        path = output.with_suffix(".json")
        path.write_text(json.dumps(self.values(output, *changes)))
        return _launch(ranks, TRAIN, "--config", path, *arguments)

    def command_without_config(self) -> list[str]:
        return _launch(1, TRAIN)

    def start(self, command: list[str]) -> subprocess.Popen:
        """Start a command in a session of its own, so that nothing else receives its signals."""
        return subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)

    @staticmethod
    def log(output: Path) -> list[dict]:
        """Records of a run without those that tell of time."""
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        clocks = ("step_seconds", "images_per_second")
        return [{key: value for key, value in record.items() if key not in clocks} for record in records]

    @staticmethod
    def state_of(run: Path) -> tuple[dict, dict[str, torch.Tensor]]:
        """Counters and all tensors of a run's newest checkpoint."""
        reader = CheckpointReader(list_checkpoints(run / "checkpoints")[-1][1])
        counters = {name: reader.meta[name] for name in ("step", "samples", "skipped", "updates")}
        return counters, {name: reader.tensor(name) for name in reader.names()}

    def assert_same_bits(self, run: Path, whole: Path) -> None:
        """Every logged number and every stored bit of two runs agree."""
        assert self.log(run) == self.log(whole)
        (counters, tensors), (wanted_counters, wanted) = self.state_of(run), self.state_of(whole)
        assert counters == wanted_counters
        assert tensors.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []


def _load_jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("jobs", HERE / "jobs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["jobs"] = module  # jobs are pickled for the other processes by this name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runs() -> Runs:
    return Runs(_load_jobs())


def write_shards(root, counts, patch=16, per_shard=4, draw=None):
    """Write a small data set of shards to the folder `root`; returns its Manifest.

    Args:
        counts: samples of each bucket, {(h, w): n}. The stored pictures are 4 pixels wider than the bucket.
        per_shard: samples of a shard.
        draw: (number of the sample, h, w) -> (h, w, 3) uint8; noise where it is None.
    """
    shards, first = [], 0
    for (h, w), n in sorted(counts.items()):
        for number, start in enumerate(range(0, n, per_shard)):
            samples = []
            for i in range(first, first + min(per_shard, n - start)):
                if draw is None:
                    pixels = np.random.default_rng(i).integers(0, 255, (h, w + 4, 3), np.uint8)
                else:
                    pixels = draw(i, h, w + 4)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=95)
                captions = Captions(f"long caption of {i}", f"short {i}")
                record = sample_record(f"pictures/{i}.png", captions, w + 4, h)
                samples.append(StoredSample(file.getvalue(), record, w + 4, h))
            shards.append(write_shard(root, (h, w), number, samples, first))
            first += len(samples)
    manifest = Manifest(
        resolution=round(max(h * w for h, w in counts) ** 0.5),
        aspect="mixed",
        patch=patch,
        buckets=tuple(sorted(counts)),
        shards=tuple(shards),
    )
    write_manifest(root, manifest)
    return manifest


@pytest.fixture(scope="session", name="write_shards")
def _write_shards():
    return write_shards
