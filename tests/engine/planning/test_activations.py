"""The trace against what PyTorch's allocator sees when the same step runs."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import routing_policy
from millrace.engine.model.working_weights import WorkingWeights
from millrace.engine.planning.activations import trace

CHANGES = {
    "plain": {},
    "routed": {"model": {"depth": 6}, "routing": {"policy": "tread", "start": 1, "end": 4}},
    "full": {"run": {"activation_checkpointing": {"policy": "full"}}},
    "selective": {"run": {"activation_checkpointing": {"policy": "selective"}}},
    "bf16": {"precision": {"compute": "bfloat16"}},
}


def counted(config, samples, edge, text_tokens):
    """Most bytes allocated at once beyond weights and inputs, in a real step."""
    denoiser = Denoiser(config.model, config.routing)
    denoiser.init_weights(0)
    denoiser.checkpoint_activations(config.run.activation_checkpointing)
    if config.precision.compute == "bfloat16":
        WorkingWeights(denoiser, torch.bfloat16).refresh()
    flow = FlowMatching(config.objective, 0)
    offsets = torch.arange(samples + 1, dtype=torch.int32) * text_tokens
    layout = denoiser.layouts.layout([(edge, edge)] * samples, offsets, text_tokens)
    features = config.model.in_channels * config.model.patch_size**2
    clean, index = torch.randn(samples * edge * edge, features), torch.arange(samples)
    low = config.precision.compute == "bfloat16"
    text = torch.randn(samples * text_tokens, config.model.context_dim).to(
        torch.bfloat16 if low else torch.float32
    )

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            t = flow.time(index)
            noisy, noise = flow.noisy(clean, index, t, layout)
            prediction = denoiser(
                noisy, t, text, layout, routing_policy(config).draw(layout, 0, index)
            ).prediction
        loss = flow.loss(prediction, clean, noise, t, layout).mean()
        del prediction
        loss.backward()

    step()
    for parameter in denoiser.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("name", CHANGES)
def test_the_trace_is_what_the_allocator_sees(runs, tmp_path, name):
    wide = {"model": {"width": 128, "heads": 2, "depth": 4}, "data": {"resolution": 64}}
    config = runs.config(tmp_path, wide, CHANGES[name])
    traced, found = trace(config, 2, 16, 8), counted(config, 2, 16, 8)
    # On a CPU operators are several passes, with temporaries of their own: at most two of the widest size.
    widest = 2 * 16 * 16 * 2 * config.model.mlp_width * 4
    assert 0.99 * traced.peak <= found <= traced.peak + 2 * widest
    assert traced.kept <= traced.peak_without_gradients <= traced.peak


def test_recomputation_keeps_less(runs, tmp_path):
    wide = {"model": {"width": 64, "heads": 2, "depth": 8}}
    kept = [
        trace(runs.config(tmp_path, wide, CHANGES[name]), 2, 16, 8).kept
        for name in ("plain", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_traffic_grows_with_the_batch(runs, tmp_path):
    config = runs.config(tmp_path)
    one, two, four = (trace(config, samples, 8, 4).moved for samples in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_casts_are_those_of_the_gradients_and_without_copies_of_the_weights(runs, tmp_path):
    """2 bytes read and 4 written of each weight that is in a product; at ZeRO 3 the same on the way there."""
    assert trace(runs.config(tmp_path), 2, 8, 4).casts == 0
    config = runs.config(tmp_path, CHANGES["bf16"])
    again = runs.config(tmp_path, CHANGES["bf16"], CHANGES["full"])
    matrices = sum(p.numel() for p in Denoiser(config.model).parameters() if p.dim() == 2)
    parameters = sum(p.numel() for p in Denoiser(config.model).parameters())
    for stage, each in ((0, 6), (3, 12)):
        one, two = (trace(config, samples, 8, 4, stage) for samples in (1, 2))
        assert one.casts == two.casts
        assert 0.95 * each * matrices <= one.casts <= each * parameters
        recomputed = trace(again, 1, 8, 4, stage).casts
        assert recomputed == one.casts if stage == 0 else one.casts < recomputed <= 1.5 * one.casts
