"""Whole runs whose optimizer state is small on the device: 8-bit moments, beside FP32 ones.

The losses of 60 steps, exact resumption, and another number of processes or another ZeRO stage.
"""

import shutil

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config.loading import parse_config
from millrace.engine.optim.adamw_8bit import CODES, SCALES
from millrace.engine.planning.step_memory import held_bytes, saved_bytes, shape_of
from millrace.engine.trainer import Trainer

pytest.importorskip("torchao")
pytestmark = pytest.mark.slow

MODEL = {"model": {"width": 64}}
LONG = {"run": {"steps": 60}, "checkpoint": {"every_steps": 30, "keep": 20}, "data": {"micro_batch": 4}}
STATES = ("adamw", "adamw_8bit")


def changes(kind, stage=0):
    zero = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    return (MODEL, LONG, {"optimizer": {"kind": kind, "weight_decay": 0.1}}, zero)


def newest(run):
    return CheckpointReader(list_checkpoints(run / "checkpoints")[-1][1])


def tensors(run):
    reader = newest(run)
    return {name: reader.tensor(name) for name in reader.names()}


def copy_until(run, step, target):
    """A copy of a run as it stood at `step`."""
    shutil.copytree(run, target)
    for later, folder in list_checkpoints(target / "checkpoints"):
        if later > step:
            shutil.rmtree(folder)
    return target


def losses(runs, run):
    return torch.tensor([record["loss"] for record in runs.log(run)], dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """Folder of runs `<processes>-<kind>-<stage>`."""
    root = tmp_path_factory.mktemp("trained")
    for ranks, stages in ((1, (0,)), (2, (0, 1, 2))):
        jobs = [
            runs.job(root / f"{ranks}-{kind}-{stage}", *changes(kind, stage))
            for stage in stages
            for kind in STATES
            if kind != "adamw" or stage == 0
        ]
        results = runs.forked(jobs, ranks=ranks)
        assert {result.error for each in results.values() for result in each} == {None}
    return root


def test_print(runs, trained):
    for r in (1, 2):
        a, b = losses(runs, trained / f"{r}-adamw-0"), losses(runs, trained / f"{r}-adamw_8bit-0")
        print(
            r, a[[0, 1, 5, 20, 40, 59]], ((b - a).abs() / a)[[0, 1, 5, 20, 40, 59]], ((b - a).abs() / a).max()
        )
        for s in (0, 1, 2):
            if (trained / f"2-adamw_8bit-{s}").exists():
                c = losses(runs, trained / f"2-adamw_8bit-{s}")
                d = losses(runs, trained / f"1-adamw_8bit-0")
                print(s, ((c - d).abs() / d).max())
