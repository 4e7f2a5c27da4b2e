"""Whole runs whose moments take little of the device, in 8 bits or on the host, beside AdamW's.

The losses of 60 steps, exact resumption, other numbers of processes and ZeRO stages.
"""

import pytest
import torch

from millrace.engine.config.loading import parse_config
from millrace.engine.distributed.zero_shards import masters
from millrace.engine.optim.adamw_8bit import CODES, SCALES
from millrace.engine.planning.step_memory import held_bytes, shape_of
from millrace.engine.trainer import Trainer
from tests.engine.run_states import assert_equal_states, copy_until, newest, tensors

pytest.importorskip("torchao")
pytestmark = pytest.mark.slow

STEPS, LATE = 60, 50
"""Of a run, and those that are done when it is stopped."""
LONG = {
    "run": {"steps": STEPS},
    "model": {"width": 64},
    "data": {"micro_batch": 4},
    "checkpoint": {"every_steps": LATE, "keep": 20},
}
STATES = ("adamw", "adamw_8bit", "adamw_offload")
LAYOUTS = ((1, 0), (2, 2))
"""Processes, and the ZeRO stage."""


def changes(kind, stage=0, *more):
    zero = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    return (LONG, {"optimizer": {"kind": kind, "weight_decay": 0.1}}, zero, *more)


def losses(runs, run):
    found = torch.tensor([record["loss"] for record in runs.log(run)], dtype=torch.float64)
    assert len(found) == STEPS
    return found


def furthest(found, wanted):
    """Largest relative difference of a step's losses."""
    return float(((found - wanted).abs() / wanted).max())


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """Folder of runs `<processes>-<stage>-<kind>`."""
    root = tmp_path_factory.mktemp("trained")
    for ranks in (1, 2):
        jobs = [
            runs.job(root / f"{ranks}-{stage}-{kind}", *changes(kind, stage))
            for count, stage in LAYOUTS
            for kind in STATES
            if count == ranks
        ]
        results = runs.forked(jobs, ranks=ranks)
        assert {result.error for each in results.values() for result in each} == {None}
    return root


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_losses_are_those_of_float32_state(runs, trained, ranks, stage):
    """On the host they are the same bits. Rounding the moments moved a step's loss by 0.22 % at most and the
    mean of the last ten by 0.04 %; the bounds are five times that."""
    wanted, quantized, host = (losses(runs, trained / f"{ranks}-{stage}-{kind}") for kind in STATES)
    assert torch.equal(host, wanted)
    assert_equal_states(trained / f"{ranks}-{stage}-adamw_offload", trained / f"{ranks}-{stage}-adamw")
    assert wanted[-10:].mean() < 0.8 * wanted[:10].mean()  # there is something to learn
    assert 0 < furthest(quantized, wanted) < 0.01
    assert float(quantized[-10:].mean()) == pytest.approx(float(wanted[-10:].mean()), rel=2e-3)


@pytest.mark.parametrize("kind", STATES[1:])
def test_two_processes_equal_one(runs, trained, kind):
    """To the rounding of sums over processes, which 8 bits show where a moment rounds the other way."""
    one, two = (losses(runs, trained / f"{name}-{kind}") for name in ("1-0", "2-2"))
    assert furthest(two, one) < (1e-5 if kind == "adamw_offload" else 1e-3)


@pytest.mark.parametrize("kind", STATES[1:])
def test_zero_3_equals_zero_0(runs, tmp_path, kind):
    """Where a master is a sub-group of shards, and each is updated by a step of its own."""
    sharded = {"stage3_param_persistence_threshold": 100, "sub_group_size": 10_000}
    section = {"deepspeed": {"zero_optimization": sharded}, "run": {"steps": 3}}
    assert runs.here(tmp_path / "one", *changes(kind, 0, {"run": {"steps": 3}})).error is None
    (results,) = runs.forked([runs.job(tmp_path / "two", *changes(kind, 3, section))], ranks=2).values()
    assert [result.error for result in results] == [None, None]
    one, two = ([record["loss"] for record in runs.log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5 if kind == "adamw_offload" else 1e-3)
    one, two = (tensors(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_a_stopped_run_resumes_bit_for_bit(runs, trained, tmp_path, ranks, stage):
    jobs = []
    for kind in STATES[1:]:
        run = copy_until(trained / f"{ranks}-{stage}-{kind}", LATE, tmp_path / kind)
        jobs.append(runs.job(run, *changes(kind, stage), resume="auto"))
    results = runs.forked(jobs, ranks=ranks)
    assert {result.error for each in results.values() for result in each} == {None}
    for kind in STATES[1:]:
        assert_equal_states(tmp_path / kind, trained / f"{ranks}-{stage}-{kind}")


@pytest.mark.parametrize("kind", STATES[1:])
def test_what_two_processes_wrote_one_goes_on_with(runs, trained, tmp_path, kind):
    run = copy_until(trained / f"2-2-{kind}", LATE, tmp_path / "run")
    assert runs.here(run, *changes(kind), resume="auto").error is None
    bound = 1e-5 if kind == "adamw_offload" else 1e-3
    assert furthest(losses(runs, run), losses(runs, trained / f"2-2-{kind}")) < bound


def test_the_host_takes_over_within_a_run(runs, trained, tmp_path):
    """AdamW's state is the same wherever it lies, so nothing is lost."""
    run = copy_until(trained / "1-0-adamw", LATE, tmp_path / "run")
    assert runs.here(run, *changes("adamw_offload"), resume="auto").error is None
    assert_equal_states(run, trained / "1-0-adamw")


def test_moments_change_to_8_bits_between_stages_alone(runs, trained, tmp_path, capfd):
    run = copy_until(trained / "1-0-adamw", LATE, tmp_path / "refused")
    error = runs.here(run, *changes("adamw_8bit"), resume="auto").error
    assert "not the optimizer state of this configuration" in error
    short = {"run": {"steps": 4}, "stages": [{"at": 2, "optimizer": {"kind": "adamw_8bit"}}]}
    assert runs.here(tmp_path / "run", *changes("adamw", 1, short)).error is None
    assert "optimizer state that starts at zero: exp_avg_8bit of" in capfd.readouterr().err


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", STATES[1:])
def test_what_is_held_is_what_the_planner_says(runs, tmp_path, capfd, kind, stage):
    values = runs.values(tmp_path, *changes(kind, stage, {"run": {"steps": 2}}))
    trainer = Trainer(parse_config(values, "test"))
    trainer.train()
    flats, shape = masters(trainer.shards), shape_of(trainer.config)
    state = [v for flat in flats for v in trainer.optimizer.state[flat].values() if v.dim()]
    size = sum(v.numel() * v.element_size() for v in state)
    planned = held_bytes(trainer.config, stage, 1, shape)
    trainer.release()
    found = {name.partition("/")[0]: newest(tmp_path).dtype(name) for name in newest(tmp_path).names()}
    lines = [" ".join(line.split()) for line in capfd.readouterr().err.splitlines()]
    (row,) = (line for line in lines if line.startswith("optimizer state (this rank)"))
    told = {"adamw_8bit": "uint8 and a float32 scale", "adamw_offload": "in the memory of the host"}[kind]
    assert told in row
    assert row.endswith("at the first step")
    if kind == "adamw_offload":
        assert shape.host_state == size
        assert not any("moment" in name for name in planned)
        assert found.keys() == {"master", "ema", "exp_avg", "exp_avg_sq"}
        return
    assert planned["8-bit Adam moments"] == size
    assert {found[kind] for kind in CODES} == {torch.uint8}
    assert {found[kind] for kind in SCALES} == {found["master"]} == {torch.float32}
