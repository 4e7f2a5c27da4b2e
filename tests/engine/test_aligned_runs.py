"""Runs aligned with a teacher: what is added to the loss, at every ZeRO stage, resumed, and ended."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier
from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS = 4
BASE = {
    "run": {"steps": STEPS},
    "model": {"depth": 4, "heads": 2},
    "optimizer": {"eps": 1e-6, "lr": 3e-3},
    "data": {"global_batch": 4},
}
TREAD = {"routing": {"policy": "tread", "start": 1, "end": 2}}
HASTE = {"weight": 0.5, "blocks": [1, 3], "heads": 2}
RECOMPUTED = {"run": {"activation_checkpointing": {"policy": "full"}}}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Settings of a small convolutional teacher and of a small DINO."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    save_classifier(SmallClassifier(10, 4), root / "classifier")
    vision_entry("dinov3").tiny(root / "dinov3")
    return {
        kind: {"kind": kind, "path": str(root / kind), "dtype": "float32"}
        for kind in ("classifier", "dinov3")
    }


def aligned(teacher, kind="repa", **changes):
    return {"alignment": {"kind": kind, "block": 1, "teacher": teacher, **changes}}


def stage(number):
    section = {"stage": number}
    if number == 3:
        section |= {"stage3_param_persistence_threshold": 100}
    return {"deepspeed": {"zero_optimization": section}}


def tensors_of(run):
    reader = CheckpointReader(list_checkpoints(run / "checkpoints")[-1][1])
    return {name: reader.tensor(name) for name in reader.names()}


@pytest.mark.parametrize("route", [{}, TREAD], ids=["dense", "tread"])
def test_terms_of_the_loss(runs, tmp_path, teachers, route):
    """Those of a run in progress, from the modules by hand; samples one by one."""
    attention = HASTE | {"blocks": [1], "teacher_layers": [2]}
    changes = [BASE, route, aligned(teachers["dinov3"], weight=0.3, attention=attention)]
    trainer = Trainer(runs.config(tmp_path, *changes))
    trainer.train_step()
    trainer.train_step()
    trainer.batch_encoder.keep_images = True
    batch = trainer.next_batch()
    terms, t = trainer.sample_losses(batch)
    assert set(terms) == {"flow", "repa", "attention"} == set(trainer.loss_fn.names)

    layout, denoiser = batch.layout, trainer.denoiser
    span = trainer.routing.draw(layout, 42, batch.sample_index)
    noisy, _ = trainer.flow.noisy(batch.clean, batch.sample_index, t, layout)
    with torch.no_grad():
        _, (features,), ((q, k),) = denoiser(
            noisy, t, batch.text, layout, span, taps=(1,), attention_taps=(1,), tapped_heads=2
        )
        projected = trainer.model.alignment.projector(features)
        larger = F.interpolate(torch.stack(batch.images), size=64, mode="bicubic", antialias=True)
        teacher, keys = trainer.batch_encoder.teacher.dino.tokens_and_attention(larger, (2,))
    start = 0
    for b, (length, own) in enumerate(zip(layout.lengths, teacher, strict=True)):
        inside = torch.arange(length)
        if route:
            index = span.route.index
            inside = index[(index >= b * length) & (index < (b + 1) * length)] - b * length
        rows = slice(start, start + len(inside))
        start += len(inside)
        cosine = F.cosine_similarity(projected[rows], own[inside], dim=1).mean()
        torch.testing.assert_close(terms["repa"][b], -0.3 * cosine, rtol=1e-4, atol=1e-5)
        student = torch.einsum("nhd,mhd->hnm", q[rows], k[rows]) / 16**0.5
        theirs = [x[b, inside, :2] for x in keys[0]]
        wanted = (torch.einsum("nhd,mhd->hnm", *theirs) / 8**0.5).softmax(-1)
        entropy = -(wanted * student.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(terms["attention"][b], 0.5 * entropy, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def stages(runs, teachers, tmp_path_factory):
    """One aligned run at each ZeRO stage, with everything that can interfere."""
    root = tmp_path_factory.mktemp("stages")
    alignment = aligned(teachers["dinov3"], "irepa", projector="attention", attention=HASTE)
    for number in range(4):
        result = runs.here(root / str(number), BASE, TREAD, RECOMPUTED, alignment, stage(number))
        assert result.error is None
    return root


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_zero_stage_trains_the_same(runs, stages, number):
    for first, other in zip(runs.log(stages / "0"), runs.log(stages / str(number)), strict=True):
        assert other["losses"] == pytest.approx(first["losses"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    first, other = tensors_of(stages / "0"), tensors_of(stages / str(number))
    assert first.keys() == other.keys()
    assert any(name.startswith("master/alignment.projector.") for name in first)
    for name, value in first.items():
        if name.startswith("master/"):
            assert (other[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_the_projector_is_no_part_of_the_model(stages):
    weights, _ = checkpoint_state(stages / "0", "model")
    assert not [name for name in weights if "alignment" in name]


def test_alignment_teaches(runs, tmp_path, teachers):
    """The cosine between features and teacher rises, and the denoiser moves other than without."""
    quick = {"run": {"steps": 40}, "logging": {"every_steps": 10}}
    for name, changes in (("aligned", aligned(teachers["classifier"])), ("plain", {})):
        assert runs.here(tmp_path / name, BASE, quick, changes).error is None
    cosine = [-record["losses"]["repa"] / 0.5 for record in runs.log(tmp_path / "aligned")]
    assert sum(cosine[-5:]) / 5 > sum(cosine[:5]) / 5 + 0.2
    first, other = (checkpoint_state(tmp_path / name, "model")[0] for name in ("aligned", "plain"))
    assert (first["blocks.1.qkv.weight"] - other["blocks.1.qkv.weight"]).abs().max() > 1e-3


def test_resumed_is_bit_identical(runs, tmp_path, teachers):
    cached = teachers["classifier"] | {"cache": str(tmp_path / "cache")}
    still = {"data": {"crop": "center"}, "checkpoint": {"every_steps": 2}}
    changes = [BASE, TREAD, still, aligned(cached, "irepa", projector="attention")]
    assert runs.here(tmp_path / "whole", *changes).error is None
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(list_checkpoints(half / "checkpoints")[-1][1])
    assert runs.here(half, *changes, resume="auto").error is None
    whole, found = tensors_of(tmp_path / "whole"), tensors_of(half)
    assert whole.keys() == found.keys()
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []
    assert runs.log(half) == runs.log(tmp_path / "whole")


def test_until_ends_it_and_the_teacher_leaves(runs, tmp_path, teachers):
    changes = [BASE, aligned(teachers["classifier"], until=2)]
    assert runs.here(tmp_path, *changes).error is None
    records = runs.log(tmp_path)
    assert [set(record["losses"]) for record in records] == [{"flow", "repa"}] * 2 + [{"flow"}] * 2
    names = tensors_of(tmp_path)
    assert not [name for name in names if "alignment" in name]
    trainer = Trainer(runs.config(tmp_path, *changes), "2")
    assert trainer.batch_encoder.teacher is None
    assert trainer.model.alignment is None


@pytest.mark.parametrize("number", [0, 2, 3])
def test_alignment_comes_and_goes_with_a_setting(runs, tmp_path, teachers, number, capsys):
    """Resumed with other settings: the projector is let go, or begins anew, and the run says so."""
    run, with_teacher = tmp_path / "run", aligned(teachers["classifier"])
    half = {"run": {"steps": 2}}
    assert runs.here(run, BASE, with_teacher, stage(number), half).error is None
    assert any(".alignment." in f".{name.replace('/', '.')}" for name in tensors_of(run))
    assert runs.here(run, BASE, stage(number), {"run": {"steps": 3}}, resume="auto").error is None
    assert not any("alignment." in name for name in tensors_of(run))
    assert "parameters dropped since the checkpoint: " in capsys.readouterr().err
    other = aligned(teachers["classifier"], kind="irepa")
    assert runs.here(run, BASE, other, stage(number), resume="auto").error is None
    assert any("alignment." in name for name in tensors_of(run))
    assert "new parameters since the checkpoint: " in capsys.readouterr().err
    records = runs.log(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [len(record["losses"]) for record in records] == [2, 2, 1, 2]
