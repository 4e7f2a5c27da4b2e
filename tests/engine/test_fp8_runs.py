"""Whole runs whose blocks multiply in FP8: every ZeRO stage, techniques, checkpoints that BF16 runs take."""

import shutil

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier

pytestmark = pytest.mark.slow

STEPS = 6
BF16 = {"precision": {"compute": "bfloat16"}}
FP8 = {"precision": {"compute": "bfloat16", "fp8": {"backend": "auto"}}}
TREAD = {"model": {"depth": 3}, "routing": {"policy": "tread", "start": 1, "end": 1}}
SPRINT = {"model": {"depth": 3}, "routing": {"policy": "sprint", "start": 1, "end": 1, "path_drop": 0.3}}
FULL = {"run": {"activation_checkpointing": {"policy": "full"}}}
SELECTIVE = {"run": {"activation_checkpointing": {"policy": "selective"}}}
MUON = {"optimizer": {"kind": "muon"}}
MIXED = {"data": {"aspect": "mixed", "resolution": 24}}


def stage(number):
    section = {"stage": number}
    if number:
        section |= {"reduce_bucket_size": 20_000}
    if number == 3:
        section |= {"stage3_param_persistence_threshold": 100}
    return {"deepspeed": {"zero_optimization": section}}


def variants(folder):
    """Changes of each run by name; all but the first few in FP8."""
    teacher = folder / "teacher"
    torch.manual_seed(0)
    save_classifier(SmallClassifier(classes=3, width=4), teacher)
    network = {"kind": "classifier", "path": str(teacher), "dtype": "float32"}
    repa = {"alignment": {"kind": "repa", "block": 1, "teacher": network}}
    return {
        "plain": [BF16],
        "plain-tread": [BF16, TREAD, MUON],
        "plain-sprint": [BF16, SPRINT, repa],
        "plain-mixed": [BF16, MIXED],
        "zero0": [FP8],
        "zero1": [FP8, stage(1)],
        "zero2": [FP8, stage(2), SELECTIVE],
        "zero3": [FP8, stage(3), FULL],
        "tread": [FP8, TREAD, MUON, stage(3)],
        "sprint": [FP8, SPRINT, repa, FULL, stage(2)],
        "mixed": [FP8, MIXED],
    }


@pytest.fixture(scope="module")
def one(runs, tmp_path_factory):
    """(folder of the runs, result of each)."""
    root = tmp_path_factory.mktemp("one")
    found = {}
    for name, changes in variants(root).items():
        found[name] = runs.here(root / name, *changes)
        assert found[name].error is None, name
    return root, found


def forget(run, after):
    """Remove the checkpoints of later steps."""
    for step, folder in list_checkpoints(run / "checkpoints"):
        if step > after:
            shutil.rmtree(folder)


def losses(runs, folder):
    return torch.tensor([record["loss"] for record in runs.log(folder)], dtype=torch.float64)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "tread", "sprint", "mixed"])
def test_trains_as_bf16_does(runs, one, name):
    """Differently, but by little; masters, moments and average stay FP32."""
    root, found = one
    plain = {"tread": "plain-tread", "sprint": "plain-sprint", "mixed": "plain-mixed"}.get(name, "plain")
    mine, wanted = losses(runs, root / name), losses(runs, root / plain)
    assert len(mine) == STEPS
    assert 0 < (mine / wanted - 1).abs().max() < 0.02
    assert all(kinds <= {torch.float32} for kinds in found[name].dtypes.values())


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_stages_agree(runs, one, name):
    root, _ = one
    torch.testing.assert_close(losses(runs, root / name), losses(runs, root / "zero0"), rtol=2e-3, atol=0)


def test_a_checkpoint_is_that_of_a_bf16_run(runs, one):
    """The same names, shapes and dtypes."""
    root, _ = one
    _, plain = runs.state_of(root / "plain")
    _, fast = runs.state_of(root / "zero3")
    described = [
        {name: (value.shape, value.dtype) for name, value in state.items()} for state in (plain, fast)
    ]
    assert described[0] == described[1]


@pytest.mark.parametrize(("first", "then"), [(BF16, FP8), (FP8, BF16)], ids=["to-fp8", "to-bf16"])
def test_a_run_goes_on_in_the_other_arithmetic(runs, one, tmp_path, first, then):
    """From its checkpoint, by resuming and as a stage; either way with the same bits."""
    root, _ = one
    half = {"checkpoint": {"every_steps": 3}}
    assert runs.here(tmp_path / "run", first, half).error is None
    forget(tmp_path / "run", after=3)
    assert runs.here(tmp_path / "run", then, half, resume="auto").error is None
    backend = then["precision"].get("fp8", {"backend": "none"})
    staged = {"stages": [{"at": 3, "name": "other", "precision": {"fp8": backend}}]}
    assert runs.here(tmp_path / "staged", first, staged).error is None
    resumed, staged = (losses(runs, tmp_path / name) for name in ("run", "staged"))
    assert torch.equal(resumed, staged)
    alone = losses(runs, root / ("plain" if first is BF16 else "zero0"))
    assert torch.equal(resumed[:3], alone[:3])
    assert 0 < (resumed[3:] / alone[3:] - 1).abs().max() < 0.02


def test_a_resumed_run_has_the_bits_of_one_that_went_through(runs, one, tmp_path):
    """There is no state that a checkpoint would have to hold."""
    root, _ = one
    assert runs.here(tmp_path / "run", FP8, {"checkpoint": {"every_steps": 2}}).error is None
    forget(tmp_path / "run", after=2)
    assert runs.here(tmp_path / "run", FP8, {"checkpoint": {"every_steps": 2}}, resume="auto").error is None
    runs.assert_same_bits(tmp_path / "run", root / "zero0")


def test_a_sample_that_is_not_finite_is_noticed(runs, tmp_path):
    """It is not saturated into a number: the step is skipped, and no weight changes."""
    result = runs.here(tmp_path / "run", FP8, spoiled_losses=(1,), spoiled_gradients=(3,))
    assert result.error is None
    assert result.unchanged == {step: step in (1, 3) for step in range(STEPS)}
    records = runs.log(tmp_path / "run")
    assert [record["applied"] for record in records] == [True, False, True, False, True, True]


def test_two_processes(runs, one, tmp_path):
    """At stages 0 and 3."""
    root, _ = one
    jobs = [
        runs.job(tmp_path / "zero0", FP8),
        runs.job(tmp_path / "zero3", FP8, stage(3), FULL),
    ]
    found = runs.forked(jobs, ranks=2)
    for name in ("zero0", "zero3"):
        assert [result.error for result in found[name]] == [None, None]
        mine = losses(runs, tmp_path / name)
        torch.testing.assert_close(mine, losses(runs, root / "zero0"), rtol=2e-3, atol=0)
        (_, folder), *_ = reversed(list_checkpoints(tmp_path / name / "checkpoints"))
        assert CheckpointReader(folder).meta["step"] == STEPS


def test_says_what_is_done_in_fp8(runs, tmp_path, capsys):
    assert runs.here(tmp_path / "run", FP8, {"run": {"steps": 1}}).error is None
    line = "FP8 matrix products              qkv, attn_out, gate_up, down, text_kv (torch, tensorwise)"
    assert line in capsys.readouterr().err
