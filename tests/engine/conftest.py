"""Tiny training runs for the tests of the engine: in this process, on two ranks, or as the real command."""

import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Config
from millrace.engine.config.loading import merge, parse_config
from millrace.engine.data import Captions
from millrace.engine.data.formats.shard_index import Manifest
from millrace.engine.data.formats.shard_writer import StoredSample, sample_record, write_manifest, write_shard
from tests.engine.forks import Child, ForkServer, run_script, wait_for
from tests.engine.jobs import Job, Result, run, run_all, run_counted
from tests.programs import ROOT, environment

TRAIN = ROOT / "engine" / "train.py"
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


class Runs:
    """The fixture `runs`: tiny training runs, and the commands around them.

    A run is described by an output folder and changes to `TINY`, a configuration of seconds:

        result = runs.here(tmp_path, {"run": {"steps": 2}})       in this process; `Result` in jobs.py
        result = runs.here(tmp_path, spoiled_losses=(1,))         with something done to it; `Job` in jobs.py
        results = runs.forked([runs.job(tmp_path / "a", changes), ...], ranks=2)["a"]   each rank a process
        done = runs.train(tmp_path, arguments=("--resume", "auto"))     train.py in a fork: code and texts
        done = runs.script("plan", "--config", path)                    likewise any other command
        process = runs.start(runs.command(tmp_path, ranks=2))           the real thing, under `deepspeed`

    Then `runs.log(tmp_path)` has the records of log.jsonl, `runs.state_of(tmp_path)` the newest checkpoint.
    """

    environment = staticmethod(environment)

    def __init__(self, forks: ForkServer) -> None:
        self.forks = forks

    def values(self, output: Path, *changes: dict) -> dict:
        """TINY with `changes` laid on it, as plain values."""
        values = merge(TINY, {"run": {"output_dir": str(output)}})
        for change in changes:
            values = merge(values, change)
        return values

    def config(self, output: Path, *changes: dict) -> Config:
        return parse_config(self.values(output, *changes), "test")

    def job(self, output: Path, *changes: dict, **options: object) -> Job:
        """A run that is named as its folder."""
        return Job(output.name, self.values(output, *changes), **options)

    def here(self, output: Path, *changes: dict, **options: object) -> Result:
        """Train in this process."""
        return run(self.job(output, *changes, **options))

    def forked(self, jobs: list[Job], ranks: int = 1) -> dict[str, list[Result]]:
        """Train jobs, those that are killed last; of the others the results of their ranks, by name."""
        whole, killed = [job for job in jobs if not job.killed], [job for job in jobs if job.killed]
        children = self._ended(ranks, 0, run_counted if killed else run_all, whole)
        results = zip(*(child.result() for child in children), strict=True)
        found = {job.name: list(result) for job, result in zip(whole, results, strict=True)}
        for job in killed:
            name, share = job.killed
            self._ended(ranks, -signal.SIGKILL, run_counted, [job], share * found[name][0].events)
        return found

    def apart(self, function: Callable, *arguments: object, ranks: int = 1) -> object:
        """What a function returns, on the first rank, that is called in processes of its own."""
        return self._ended(ranks, 0, function, *arguments)[0].result()

    def script(
        self,
        name: str | Path,
        *arguments: object,
        ranks: int = 1,
        cwd: Path = ROOT,
        function: Callable = run_script,
    ) -> subprocess.CompletedProcess:
        """Run engine/<name>.py, or the script of a path, in a fork on each rank; `function` runs it there."""
        path = name if isinstance(name, Path) else ROOT / "engine" / f"{name}.py"
        words = [str(word) for word in arguments]
        children = self._start(ranks, function, path, words, cwd=cwd)
        codes = wait_for(children)
        out, err = ("".join(child.text(stream) for child in children) for stream in ("out", "err"))
        return subprocess.CompletedProcess([str(path), *words], max(codes, key=abs), out, err)

    def train(self, output: Path, *changes: dict, arguments: tuple = ()) -> subprocess.CompletedProcess:
        """Run train.py in a fork on this configuration, which is written beside `output`."""
        return self.script("train", "--config", self._written(output, *changes), *arguments)

    def _ended(self, ranks: int, code: int, function: Callable, *arguments: object) -> list[Child]:
        """The processes of a function, when they have ended with this code."""
        children = self._start(ranks, function, *arguments)
        codes = wait_for(children)
        assert codes == [code] * ranks, (codes, *(child.text("err") for child in children))
        return children

    def _start(self, ranks: int, function: Callable, *arguments: object, **options: object) -> list[Child]:
        if ranks == 1:
            return [self.forks.start(function, *arguments, **options)]
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return [
            self.forks.start(function, *arguments, **options, **shared, RANK=str(r), LOCAL_RANK=str(r))
            for r in range(ranks)
        ]

    def _written(self, output: Path, *changes: dict) -> Path:
        path = output.with_suffix(".json")
        path.write_text(json.dumps(self.values(output, *changes)))
        return path

    def command(self, output: Path, *changes: dict, ranks: int = 1, arguments: tuple = ()) -> list[str]:
        """Words of the real command for this configuration, which is written beside `output`."""
        words = [str(TRAIN), "--config", str(self._written(output, *changes)), *arguments]
        if ranks == 1:
            return [sys.executable, *words]
        return [str(DEEPSPEED), "--num_gpus", str(ranks), "--master_port", str(_free_port()), *words]

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


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    forks = ForkServer()
    yield Runs(forks)
    forks.close()


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
