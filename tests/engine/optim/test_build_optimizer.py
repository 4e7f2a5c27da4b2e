"""Which parameter gets which optimizer, what is refused, and what is said about it."""

import itertools

import pytest
import torch
from torch import nn

from millrace.engine.config import Model, Muon, Optimizer, Routing
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.optim.build_optimizer import build_optimizer, describe_optimizer
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
MODEL = Model(width=16, depth=2, heads=2, patch_size=1, in_channels=4, context_dim=8, mlp_ratio=2)


def named(routing=None, head=False):
    found = list(Denoiser(MODEL, routing).named_parameters())
    if head:
        found += [(f"alignment.{name}", p) for name, p in nn.Linear(16, 4).named_parameters()]
    return found


def groups(parameters, **settings):
    optimizer = build_optimizer(parameters, Optimizer(**settings), CPU, MODEL)
    shapes = [(name, tuple(p.shape)) for name, p in parameters]
    return {
        "names": [group["names"] for group in optimizer.param_groups],
        "muon": [group["rate"] == "muon_lr" for group in optimizer.param_groups],
        "lines": describe_optimizer(shapes, optimizer),
        "optimizer": optimizer,
    }


def test_adamw_has_everything():
    parameters = named()
    found = groups(parameters)
    assert found["names"] == [[name for name, _ in parameters]]
    assert found["muon"] == [False]
    elements = sum(p.numel() for _, p in parameters)
    assert found["lines"] == [
        f"AdamW, lr 0.0001: everything, {len(parameters)} parameters, {elements:,} elements"
    ]


def test_muon_has_the_matrices_of_the_blocks():
    parameters = named(Routing(policy="sprint", start=0, end=0))
    found = groups(parameters, kind="muon", lr=1e-4, muon={"lr": 2e-3, "weight_decay": 0.1}, weight_decay=0.2)
    in_blocks = {
        f"blocks.{i}.{part}.weight" for i in range(2) for part in ("qkv", "attn_out", "gate_up", "down")
    }
    assert set(found["names"][0]) == in_blocks | {"modulation.weight", "text_kv.weight"}
    assert sorted(itertools.chain(*found["names"])) == sorted(name for name, _ in parameters)
    assert found["muon"] == [True, False]
    first, second = found["optimizer"].param_groups
    assert (first["lr"], first["weight_decay"]) == (2e-3, 0.1)
    assert (second["lr"], second["weight_decay"], second["betas"]) == (1e-4, 0.2, (0.9, 0.95))
    elements = sum(p.numel() for name, p in parameters if name in found["names"][0])
    # Text kv (2C x C), and gate and up (F x C), have one shape here: F = 2C.
    assert found["lines"][0] == (
        "Muon, lr 0.002, momentum 0.95, rms scale, bfloat16: 14 matrices (2 of 96 x 16, 6 of 32 x 16, "
        f"2 of 48 x 16, 2 of 16 x 16, 2 of 16 x 32), {elements:,} elements"
    )
    assert found["lines"][1].startswith("AdamW, lr 0.0001: the rest, ")
    assert len(found["lines"]) == 2


def test_chunks_are_counted():
    found = groups(named(), kind="muon", muon={"chunked": True})
    assert "30 matrices (24 of 16 x 16, 4 of 32 x 16, 2 of 16 x 32)" in found["lines"][0]


def test_heads_are_a_group_of_their_own():
    """Without Muon too: their count of updates begins when they come."""
    for kind, muon in (("adamw", [False, False]), ("muon", [True, False, False])):
        found = groups(named(head=True), kind=kind)
        assert found["muon"] == muon
        assert found["names"][-1] == ["alignment.weight", "alignment.bias"]
        assert found["lines"][-1] == "AdamW, lr 0.0001: heads, 2 parameters, 68 elements"


def test_frozen_parameters_are_left_out():
    parameters = named()
    parameters[0][1].requires_grad_(False)
    assert groups(parameters)["names"] == [[name for name, _ in parameters[1:]]]


def test_a_choice_of_matrices():
    found = groups(named(), kind="muon", muon={"parameters": ["blocks.*.weight"]})
    assert {name.partition(".")[0] for name in found["names"][0]} == {"blocks"}
    assert {"modulation.weight", "text_kv.weight"} <= set(found["names"][1])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.0.query_norm", "'blocks.0.query_norm' names blocks.0.query_norm, which is 1-dimensional"),
        (
            "blocks.*",
            "'blocks.*' names blocks.0.query_norm, which is 1-dimensional; Muon is for the matrices",
        ),
        ("modulation.bias", "which is 1-dimensional"),
        ("txt_in.weight", "'txt_in.weight' names txt_in.weight, which is no matrix of a block; Muon is for"),
        ("alignment.weight", "which is no matrix of a block; Muon is for the matrices of the blocks, leave"),
        ("blocks.7.qkv.weight", "'blocks.7.qkv.weight' is no parameter; names are such as img_in.weight, "),
    ],
)
def test_what_cannot_have_muon(pattern, message):
    with pytest.raises(UserError) as raised:
        groups(named(head=True), kind="muon", muon=Muon(parameters=(pattern,)))
    assert str(raised.value).startswith("optimizer.muon.parameters: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_model_is_needed():
    with pytest.raises(ValueError, match="needs the model's configuration"):
        build_optimizer(named(), Optimizer(kind="muon"), CPU)
