"""The routing benchmark: its arithmetic, the order of its rounds, memory that is known, and a tiny run."""

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from millrace.benchmarks.report import routing_report as report
from millrace.benchmarks.step import routing
from millrace.benchmarks.step import training_steps as steps
from millrace.engine.model.flops import training_flops
from millrace.engine.util.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


CPU = torch.device("cpu")


def contestant(forward=None, flops=1.0):
    return routing.Contestant(forward, [], flops)


def test_rows_are_arithmetic_on_the_samples():
    found = {
        (side, variant): contestant(flops=flops)
        for side in ("ours", "peer")
        for variant, flops in (("dense", 100.0), ("tread", 60.0))
    }
    clock = {
        ("ours", "dense"): [1.0, 2.0, 9.0],
        ("ours", "tread"): [1.0, 1.4, 1.4],
        ("peer", "dense"): [4.0, 4.0, 4.0],
        ("peer", "tread"): [3.2, 3.2, 3.2],
    }
    user = dict(zip(found, (3.0, 2.4, 6.0, 3.0), strict=True))
    samples = {name: [routing.Sample(s, user[name], 7) for s in clock[name]] for name in found}
    bytes_of = dict(zip(found, (10, 8, 20, 10), strict=True))
    ours, our_tread, peer, peer_tread = routing.summarise(found, samples, bytes_of)
    assert ours["seconds_median"] == 2.0
    assert ours["time_ratio_to_peer"] == pytest.approx(0.5)
    assert ours["saved_time_per_saved_flops"] is None
    assert our_tread["flop_ratio"] == pytest.approx(0.6)
    # 30 % of the time for 40 % of the FLOPs, and 20 % of it.
    assert our_tread["saved_time_per_saved_flops"] == pytest.approx(0.3 / 0.4)
    assert peer_tread["saved_time_per_saved_flops"] == pytest.approx(0.2 / 0.4)
    assert our_tread["time_ratio_to_peer"] == pytest.approx(1.4 / 3.2)
    assert (our_tread["memory_ratio_to_peer"], peer["memory_ratio_to_peer"]) == (0.8, 1.0)
    # 20 % of the user time for 40 % of the FLOPs.
    assert our_tread["user_saved_per_saved_flops"] == pytest.approx(0.2 / 0.4)
    assert our_tread["user_ratio_to_peer"] == pytest.approx(2.4 / 3)
    lines = report.table([ours, our_tread, peer, peer_tread]).text().splitlines()
    dense = "dense ours 1.000 2000.0 (1400.0-6200.0) 0.500 - 3000.0 0.500 - 7 0.0 0.500"
    assert lines[1].split() == dense.split()
    routed = "tread peer 0.600 3200.0 (3200.0-3200.0) 0.50 3000.0 1.25 7 0.0"
    assert lines[4].split() == routed.split()


def test_rounds_alternate_and_warm_up_is_discarded(monkeypatch):
    clock, order = iter(range(1000)), []

    def step(name):
        def forward():
            order.append(name)
            return torch.zeros((), requires_grad=True)

        return forward

    monkeypatch.setattr(routing.time, "perf_counter", lambda: next(clock))
    usage = types.SimpleNamespace(ru_utime=10.0, ru_minflt=3)
    monkeypatch.setattr(routing.resource, "getrusage", lambda _who: usage)
    found = {(name, "dense"): contestant(step(name)) for name in "abc"}
    samples = routing.time_rounds(found, rounds=2, warmup=1, device=CPU)
    assert "".join(order) == "abccbaabc"
    assert samples == {(name, "dense"): [(1, 0.0, 0)] * 2 for name in "abc"}


def test_peak_counts_what_lives_at_once():
    """4 MB that backward keeps, and 8 MB beside them for a moment."""
    weight = nn.Parameter(torch.ones(1_000_000))

    def forward():
        kept = weight * 2
        torch.ones(2_000_000).sum()
        return (kept * kept).sum()

    peak = routing.peak_bytes(forward, [weight], CPU)
    assert 12_000_000 <= peak < 12_100_000
    assert torch.equal(weight.grad, torch.full((1_000_000,), 8.0))


def test_peak_leaves_out_gradients_that_stay():
    """The gradient of a sum is one number expanded: all that is ever made is that number and the sum."""
    weight = nn.Parameter(torch.ones(1_000_000))
    peak = routing.peak_bytes(lambda: weight.sum(), [weight], CPU)
    assert peak < 1000


def test_network_has_the_proportions_of_prx():
    model = routing.network(1792, 16).model
    assert (model.heads, model.head_dim, model.context_dim, model.mlp_width) == (28, 64, 2304, 6272)
    with pytest.raises(UserError, match="multiple of 64"):
        routing.network(100, 4)


OPTIONS = {
    "width": 64,
    "depth": 7,
    "batch": 2,
    "image_tokens": 16,
    "text_tokens": 8,
    "compile": False,
    "variants": list(steps.VARIANTS),
    "device": CPU,
    "dtype": torch.float32,
}


def test_both_sides_count_the_model_without_padding():
    found = routing.contestants(SimpleNamespace(**OPTIONS))
    assert list(found) == [(side, variant) for variant in steps.VARIANTS for side in routing.SIDES]
    config = steps.variant_config(routing.network(64, 7), "sprint")
    for side in routing.SIDES:
        assert found[side, "sprint"].flops == sum(training_flops(config, 16, n) for n in (2, 6))


def test_sides_that_differ_are_not_compared(monkeypatch):
    def biased(denoiser, config):
        peer = build(denoiser, config)
        with torch.no_grad():
            peer.model.final_layer.linear.bias.add_(1)
        return peer

    build = steps.build_peer
    monkeypatch.setattr(routing.steps, "build_peer", biased)
    with pytest.raises(RuntimeError, match="losses differ"):
        routing.contestants(SimpleNamespace(**OPTIONS | {"variants": ["dense"]}))


def test_image_tokens_must_be_a_square():
    with pytest.raises(UserError, match="square number"):
        routing.contestants(SimpleNamespace(**OPTIONS | {"image_tokens": 15}))


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    sizes = {"rounds": 2, "warmup": 1, "width": 64, "depth": 7, "batch": 2, "image-tokens": 16}
    options = ["--text-tokens", "8"]
    for name, value in sizes.items():
        options += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", ["routing.py", *options, "--output", str(output)])
    assert routing.main() == 0
    printed, found = capsys.readouterr().out, json.loads(output.read_text())
    assert found["threads"] == torch.get_num_threads()
    assert [(row["side"], row["variant"]) for row in found["rows"]] == [
        (side, variant) for variant in steps.VARIANTS for side in routing.SIDES
    ]
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert row["peak_bytes"] > 0
        assert f"{row['seconds_median'] * 1e3:.1f}" in printed
