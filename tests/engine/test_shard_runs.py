"""Training from shards in buckets: what is consumed, also when it is killed again and again."""

import json
import os
import random
import signal
import time

import psutil
import pytest

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.data import open_source
from millrace.engine.data.sources.mixture import order_of
from millrace.engine.run_log.sample_log import keys_of_steps

STEPS = 60
BATCH = 16
COUNTS = {(16, 24): 21, (24, 16): 14, (20, 20): 18}
KILLS = 5


def changes(data, **sections):
    return {
        "run": {"steps": STEPS},
        "data": {
            "source": "shards",
            "path": str(data),
            "aspect": "bucket",
            "bucket_run": 8,
            "resolution": 20,
            "global_batch": BATCH,
            "micro_batch": 4,
            "workers": 2,
        },
        "model": {"width": 160, "depth": 4, "heads": 5, "context_dim": 128},
        "checkpoint": {"every_steps": 7, "keep": 2},
        "logging": {"sample_keys": True},
        **sections,
    }


@pytest.fixture(scope="module")
def shards(write_shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, COUNTS, patch=4)
    return root


def by_the_order(config):
    """The keys of every step, from the order alone."""
    source = open_source(config.data)
    order = order_of(source, config.data, config.run.seed, 0)
    return {
        step + 1: [source.key(order.picture(place)[0]) for place in range(step * BATCH, (step + 1) * BATCH)]
        for step in range(config.run.steps)
    }


def test_a_run_consumes_the_order_and_says_which_loader_it_took(runs, shards, tmp_path, capsys):
    short = changes(shards, run={"steps": 4}, checkpoint={"every_steps": 100})
    assert runs.here(tmp_path / "run", short).error is None
    said = capsys.readouterr().err
    (loader,) = [line for line in said.splitlines() if line.startswith("loader: ")]
    assert loader.startswith(("loader: NVIDIA DALI", "loader: Pillow, 2 threads"))
    assert keys_of_steps(tmp_path / "run") == by_the_order(runs.config(tmp_path / "run", short))


def test_the_python_loader_trains_to_the_same_bits(runs, shards, tmp_path):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    for loader in ("dali", "python"):
        short = changes(shards, run={"steps": 3}, checkpoint={"every_steps": 100})
        short["data"]["loader"] = loader
        assert runs.here(tmp_path / loader, short).error is None
    runs.assert_same_bits(tmp_path / "dali", tmp_path / "python")


def test_unreadable_pictures_are_in_the_rejects(runs, write_shards, tmp_path):
    write_shards(tmp_path / "data", COUNTS, patch=4)
    tar = tmp_path / "data" / "20x20" / "00000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1  # inside the first picture
    tar.write_bytes(damaged)
    tolerant = changes(tmp_path / "data", run={"steps": 8}, checkpoint={"every_steps": 100})
    tolerant["data"]["max_bad_share"] = 0.05
    assert runs.here(tmp_path / "run", tolerant).error is None
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert line["key"] == "20x20/00000.tar#0"
    assert "CRC-32" in line["reason"]
    consumed = [key for keys in keys_of_steps(tmp_path / "run").values() for key in keys]
    assert line["key"] not in consumed

    strict = changes(tmp_path / "data", run={"steps": 8}, checkpoint={"every_steps": 100})
    assert "cannot be read" in runs.here(tmp_path / "strict", strict).error
    (line,) = [json.loads(text) for text in (tmp_path / "strict" / "rejects.jsonl").read_text().splitlines()]
    assert line["key"] == "20x20/00000.tar#0"


def kill_all(process):
    """kill -9 for the command and everything that it started."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()
    psutil.wait_procs(family, timeout=30)


def steps_done(run):
    path = run / "keys" / "rank-00000.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_at_random_and_resumed_with_one_two_and_one_processes(runs, shards, tmp_path):
    """Nothing is lost and nothing comes twice, whoever consumed it."""
    wanted = by_the_order(runs.config(tmp_path / "whole", changes(shards)))
    rng, run, reached = random.Random(11), tmp_path / "run", []
    # Anywhere, but one in each fifth of the run.
    targets = [STEPS // KILLS * k + rng.randrange(2, 9) for k in range(KILLS)]
    for target, ranks in zip([*targets, None], (1, 2, 1, 2, 1, 1), strict=True):
        command = runs.command(run, changes(shards), ranks=ranks, arguments=("--resume", "auto"))
        process = runs.start(command)
        try:
            if target is None:
                _, said = process.communicate(timeout=120)
                assert process.returncode == 0, said
                break
            deadline = time.monotonic() + 120
            while steps_done(run) < target and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            assert process.poll() is None, process.communicate()
            kill_all(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        saved = [step for step, _ in list_checkpoints(run / "checkpoints")]
        reached.append((saved[-1] if saved else 0, steps_done(run)))
        # Also what was consumed after the last checkpoint, and will be consumed again, is the order.
        for step, keys in readable(run).items():
            assert keys == wanted[step]
    assert keys_of_steps(run) == wanted
    assert len({saved for saved, _ in reached}) >= 3, reached
    assert any(done > saved for saved, done in reached), reached
    print(f"checkpoint and steps told at each kill: {reached}")


def readable(run):
    """The keys of the steps that every process of a killed run has told."""
    files = sorted((run / "keys").glob("rank-*.jsonl"))
    steps = {}
    for path in files:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                steps.setdefault(record["step"], []).extend(record["keys"])
    return {step: keys for step, keys in steps.items() if len(keys) == BATCH}
