"""Bytes that samples during training need: the weights once where they are gathered, none at stage 0."""

import gc
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from millrace.engine.config import Model, Routing
from millrace.engine.evaluation import run_samples
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.planning.activations import Holder, Traced
from millrace.engine.planning.step_memory import memory_of, shape_of
from millrace.engine.sampling.sampler import filled_denoiser
from tests.engine.jobs import run

CPU = torch.device("cpu")
NOTHING = Traced(0, 0, 0, 0)


class Stored(Holder):
    """Of the storages that have memory."""

    def _note(self, storage):
        if storage.device.type != "meta":
            super()._note(storage)


def watched(jobs):
    """For each job: bytes beside all that was there, at most until the drawing begins, then, and afterwards.

    Storages are counted from when they are made to when they are freed, and no collector runs in between.
    """
    found = []
    make, draw = run_samples.RunSamples.make, run_samples.draw_grid

    def watched_make(samples, step, seen, weights, what=None):
        gc.unfreeze()
        known = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        gc.disable()
        with Stored(known, ()) as holder:
            del known
            numbers = {}

            def watched_draw(*arguments):
                numbers.update(until=holder.peak, drawing=holder.held)
                draw(*arguments)

            with mock.patch.object(run_samples, "draw_grid", watched_draw):
                make(samples, step, seen, weights, what)
            found.append({"peak": holder.peak, **numbers, "after": holder.held})
        gc.enable()

    with mock.patch.object(run_samples.RunSamples, "make", watched_make):
        errors = [run(job).error for job in jobs]
    return errors, found


@pytest.mark.slow
@pytest.mark.parametrize("ema", [True, False])
def test_one_copy_of_the_weights_while_samples_are_drawn(runs, tmp_path, ema):
    drawn = {"run": {"steps": 1}, "sampling": {"every_steps": 1, "steps": 1, "count": 1}}
    sections = [{"stage": stage} for stage in range(3)]
    sections.append({"stage": 3, "stage3_param_persistence_threshold": 100})
    jobs = [
        runs.job(
            tmp_path / f"zero{section['stage']}",
            drawn | {"ema": {"enabled": ema}, "deepspeed": {"zero_optimization": section}},
        )
        for section in sections
    ]
    first, second = (child.result() for child in runs._ended(2, 0, watched, jobs))
    assert first[0] == second[0] == [None] * 4
    config = runs.config(tmp_path, drawn)
    shape = shape_of(config)
    for stage, (drawing, other) in enumerate(zip(first[1], second[1], strict=True)):
        planned = memory_of(config, stage, 2, NOTHING, shape).phases["sampling"]
        assert planned == (4 * shape.parameters if stage else 0)
        assert drawing["drawing"] == planned
        assert planned <= drawing["until"] <= planned + 4 * shape.largest
        assert drawing["peak"] > drawing["until"]  # activations of the drawing: something was drawn
        assert other["peak"] <= (8 * shape.largest if stage else 0)  # one tensor, and the next
        assert drawing["after"] == 0
        # gloo's threads may let go of the last tensor a little later.
        assert other["after"] <= 4 * shape.largest


@pytest.mark.parametrize(
    "routing", [Routing(), Routing(policy="sprint", start=1, end=1, mask_token="frozen")]
)
def test_a_filled_denoiser_is_its_weights(routing):
    """The same numbers as of a copy; the tensors themselves, and training's go on to have gradients."""
    model = Model(width=32, depth=3, heads=1, patch_size=1, in_channels=3, context_dim=16)
    trained = Denoiser(model, routing)
    trained.init_weights(0)
    state = dict(trained.state_dict(keep_vars=True)) | {"projector.weight": torch.ones(2)}
    filled = filled_denoiser(SimpleNamespace(model=model, routing=routing), iter(state.items()), CPU)
    assert not filled.training
    for name, tensor in filled.state_dict(keep_vars=True).items():
        assert tensor.data_ptr() == state[name].data_ptr()
        assert not tensor.requires_grad
    assert all(parameter.requires_grad for parameter in trained.parameters())
    copy = Denoiser(model, routing)
    copy.load_state_dict(trained.state_dict())
    images, text = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 16)
    with torch.no_grad():
        results = [one.predict(images, torch.tensor([0.2, 0.7]), text) for one in (filled, copy)]
    assert torch.equal(*results)


@pytest.mark.parametrize("obstacle", [None, "it is not installed"])
def test_liger_kernel_where_it_runs(obstacle, monkeypatch):
    """A model that was trained with it is sampled from without it, where it is not."""
    monkeypatch.setattr("millrace.engine.sampling.sampler.liger_obstacle", lambda _: obstacle)
    model = Model(
        width=32, depth=1, heads=1, patch_size=1, in_channels=3, context_dim=16, geglu_backend="liger"
    )
    state = Denoiser(model).state_dict()
    filled = filled_denoiser(SimpleNamespace(model=model, routing=Routing()), state.items(), CPU)
    assert filled.blocks[0].geglu_backend == ("auto" if obstacle else "liger")


def test_a_filled_denoiser_is_in_fp32():
    model = Model(width=32, depth=1, heads=1, patch_size=1, in_channels=3, context_dim=16)
    state = {name: tensor.bfloat16() for name, tensor in Denoiser(model).state_dict().items()}
    filled = filled_denoiser(SimpleNamespace(model=model, routing=Routing()), state.items(), CPU)
    assert {parameter.dtype for parameter in filled.parameters()} == {torch.float32}
    assert torch.equal(filled.txt_in.weight, state["txt_in.weight"].float())
