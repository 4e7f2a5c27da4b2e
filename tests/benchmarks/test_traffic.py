"""The traffic ledger: bytes that can be counted by hand, where they belong, sums and roofline."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from millrace.benchmarks.models import ledger as ledgers
from millrace.benchmarks.models import ledger_operators as operators
from millrace.benchmarks.models import traffic
from millrace.benchmarks.report import traffic_report as report
from millrace.benchmarks.step import training_steps as steps
from millrace.engine.config.loading import parse_config
from millrace.engine.util.errors import UserError
from millrace.kernels import fp8_linear, gather_fuse, gather_tokens, norm_modulate, scatter_tokens
from millrace.kernels.support.rows import sum_launch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


Cost, Entry = operators.Cost, ledgers.Entry


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def costs_of(function, **options):
    ledger = ledgers.Ledger(**options)
    with ledger:
        function()
    return [entry.cost for entry in ledger.entries]


X, Y = meta(6, 8), meta(6, 8)
WIDE = meta(6, 8, dtype=torch.float32)
ROWS = torch.empty(3, dtype=torch.int64, device="meta")

# The bytes of X are 6 * 8 * 2 = 96.
COUNTED = {
    "add": (lambda: X + Y, Cost("other", 192, 96)),
    "one tensor twice is read once": (lambda: X * X, Cost("other", 96, 96)),
    "two views of one tensor": (lambda: torch.cat((X[:4], X[2:])), Cost("other", 96, 128)),
    "in place": (lambda: X.add_(Y), Cost("other", 192, 96)),
    "a slice": (lambda: X[:, :2] + 1, Cost("other", 24, 24)),
    "expanded rows are read once": (lambda: X[:1].expand(6, 8) + Y, Cost("other", 16 + 96, 96)),
    "cast": (lambda: X.float(), Cost("other", 96, 192)),
    "product": (lambda: X @ Y.t(), Cost("gemm", 192, 72, 1, 2 * 6 * 6 * 8)),
    "linear with bias": (
        lambda: F.linear(X, meta(5, 8), meta(5)),
        Cost("gemm", 96 + 80 + 10, 60, 1, 2 * 6 * 8 * 5),
    ),
    "rows looked up": (lambda: X.index_select(0, ROWS), Cost("other", 3 * 16 + 24, 48)),
    "zeros like": (lambda: torch.zeros_like(X), Cost("other", 0, 96)),
    "overwritten": (lambda: X.copy_(WIDE), Cost("other", 192, 96)),
    "rows written": (lambda: X.index_copy_(0, ROWS, meta(3, 8)), Cost("other", 24 + 48, 48)),
    "rows written to a copy": (
        lambda: X.index_copy(0, ROWS, meta(3, 8)),
        Cost("other", 96 + 24 + 48, 96 + 48, 2),
    ),
    "rows added": (lambda: X.index_add_(0, ROWS, meta(3, 8)), Cost("other", 24 + 48 + 48, 48)),
    "elements scattered": (
        lambda: X.scatter_(0, ROWS[:, None].expand(3, 8), meta(3, 8)),
        Cost("other", 24 + 48, 48),
    ),
    "our gather": (lambda: gather_tokens(X, ROWS), Cost("other", 48 + 24, 48)),
    "softmax in FP32": (lambda: WIDE.softmax(-1), Cost("other", 192, 192)),
}


@pytest.mark.parametrize("case", COUNTED)
def test_bytes_of_one_operator(case):
    function, expected = COUNTED[case]
    assert costs_of(function) == [expected]


@pytest.mark.parametrize(
    "free",
    [
        lambda: X.view(8, 6),
        lambda: X.t().unsqueeze(0).expand(5, -1, -1),
        lambda: X.split(2),
        lambda: X.unbind(1),
        lambda: torch.empty_like(X),
        lambda: X.detach(),
        lambda: torch.zeros(100) + 1,
    ],
    ids=["view", "expand", "split", "unbind", "empty", "detach", "work on the host"],
)
def test_metadata_costs_nothing(free):
    assert costs_of(free) == []


def test_select_backward_fills_and_copies():
    x = meta(6, 8).requires_grad_()
    ledger = ledgers.Ledger()
    with ledger:
        ledger.backward((x[:, 0] * 1).sum())
    (cost,) = [e.cost for e in ledger.entries if e.operator == "aten::select_backward"]
    assert cost == Cost("other", 12, 96 + 12, 2)


def test_masked_select_needs_its_number():
    mask = meta(6, 8, dtype=torch.bool)
    assert costs_of(lambda: X.masked_select(mask), selected=10) == [Cost("other", 96 + 48, 20, 3)]
    with pytest.raises(RuntimeError, match="masked_select"):
        costs_of(lambda: X.masked_select(mask))


def test_attention_is_the_operator_of_a_gpu():
    """Four heads of 16 over 6 queries and 10 keys: 2 products of 6 x 10 x 16 each forward, 5 backward."""
    q, k = (meta(2, 4, n, 16).requires_grad_() for n in (6, 10))
    for mask in (None, meta(2, 1, 1, 10, dtype=torch.bool)):
        ledger = ledgers.Ledger()
        with ledger:
            ledger.backward(F.scaled_dot_product_attention(q, k, k, attn_mask=mask).sum())
        found = [e for e in ledger.entries if e.cost.kind == "attention"]
        pair = 2 * 2 * 4 * 6 * 10 * 16
        assert [(e.phase, e.cost.flops) for e in found] == [("forward", 2 * pair), ("backward", 5 * pair)]
        assert not [e for e in ledger.entries if e.cost.kind == "gemm"], "attention was spelt out"
        k.grad = q.grad = None


def test_our_backward_counts_its_partial_sums():
    """norm_modulate reads x, shift, scale; backward adds two gradients (B, C) from sums of chunks of rows."""
    samples, length, width = 4, 4096, 64
    total = samples * length
    x, shift, scale = meta(total, width), meta(samples, width), meta(samples, width)
    offsets = torch.empty(samples + 1, dtype=torch.int32, device="meta")
    tensors = [t.requires_grad_() for t in (x, shift, scale)]
    ledger = ledgers.Ledger()
    with ledger:
        ledger.backward(norm_modulate(*tensors, offsets, 1e-6, length).sum())
    forward, *_ = (e.cost for e in ledger.entries if e.operator == "millrace::norm_modulate")
    row, statistics = total * width * 2, 2 * total * 4
    vectors = 2 * samples * width
    assert forward == Cost("other", row + 2 * vectors + 4 * 5, row + statistics)
    backward, sums = (e.cost for e in ledger.entries if e.operator == "millrace::norm_modulate_backward")
    chunks = sum_launch(x, samples, length).grid[0]
    assert chunks > 1
    # The gradient of sum() is one number expanded, so only x, scale, offsets and statistics are read.
    assert backward.read == 2 + row + vectors + 4 * 5 + statistics
    assert sums == Cost("other", 2 * samples * chunks * width * 4, 2 * samples * chunks * width * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_casts_cost_what_their_file_says(dtype):
    """Beside the products, which read one byte of a value: the largest magnitude, the cast, its transpose."""
    rows, inner, outer = 64, 32, 48
    x = meta(rows, inner, dtype=dtype).requires_grad_()
    weight = meta(outer, inner, dtype=torch.float32).requires_grad_()

    def step():
        y = fp8_linear(x, weight, dtype=dtype)
        torch.autograd.grad(y, (x, weight), meta(rows, outer, dtype=dtype))

    found = costs_of(step)
    b, w, number = dtype.itemsize, 4, 4
    casts = sum(cost.moved for cost in found if cost.kind == "other")
    numbers = 3 * number + 4 * 2 * number  # three magnitudes; four casts read one and write a unit
    stated = (2 * b + 2) * inner * rows + (2 * b + 2) * outer * rows + (3 * w + 2) * inner * outer
    assert casts == stated + numbers
    products = [cost for cost in found if cost.kind == "gemm"]
    assert [cost.flops for cost in products] == 3 * [2 * rows * inner * outer]
    read = sum(cost.read for cost in products)
    assert read == 2 * (rows * inner + inner * outer + rows * outer) + 6 * number
    assert sum(cost.written for cost in products) == b * rows * (inner + outer) + w * inner * outer


def test_scatter_moves_rows_only():
    base, update = meta(6, 8), meta(3, 8)
    moved = costs_of(lambda: scatter_tokens(base, update, ROWS, inplace=True))
    assert moved == [Cost("other", 48 + 24, 48)]


def test_fusion_makes_products_of_kept_rows_only():
    total, kept, width = 40, 10, 16
    arguments = (
        meta(total, width),
        meta(kept, width),
        ROWS.new_empty(kept),
        meta(width),
        meta(width, 2 * width),
    )
    found = costs_of(lambda: gather_fuse(*arguments, meta(width)))
    products = [c for c in found if c.kind == "gemm"]
    assert sum(c.flops for c in products) == 2 * (total + kept + 1) * width**2
    (update,) = [c for c in found if c.kind == "other"]
    assert (update.read, update.written) == (2 * kept * width * 2 + 8 * kept, kept * width * 2)


class Tower(nn.Module):
    """Two blocks with something before, between and after them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x):
        x = self.blocks[0](x.sin())
        x = self.blocks[1](x.cos())
        return x.exp().sum()


def test_operators_are_entered_where_they_belong():
    with torch.device("meta"):
        tower, x = Tower(), torch.empty(4, 8, requires_grad=True)
    ledger = ledgers.Ledger()
    ledger.watch(tower.blocks)
    with ledger:
        ledger.backward(tower(x))
    places = {
        (phase, operator): {e.place for e in ledger.entries if (e.phase, e.operator) == (phase, operator)}
        for phase in ("forward", "backward")
        for operator in ("aten::sin", "aten::cos", "aten::exp", "aten::mm")
    }
    assert places == {
        ("forward", "aten::sin"): {"input"},
        ("forward", "aten::mm"): {"block 0", "block 1"},
        ("forward", "aten::cos"): {"between"},
        ("forward", "aten::exp"): {"output"},
        # The derivative of sin is cos and of cos sin; that of exp takes exp's result.
        ("backward", "aten::cos"): {"input"},
        ("backward", "aten::mm"): {"block 0", "block 1"},
        ("backward", "aten::sin"): {"between"},
        ("backward", "aten::exp"): set(),
    }
    products = [e for e in ledger.entries if e.operator == "aten::mm" and e.place == "block 1"]
    assert [e.phase for e in products] == ["forward", "backward", "backward"]


def entry(kind, phase="forward", place="block 0", read=0, written=0, flops=0, kernels=1):
    return Entry(f"aten::{kind}", phase, place, Cost(kind, read, written, kernels, flops))


def test_roofline_is_arithmetic():
    assert report.seconds(entry("gemm", flops=790e12, read=4.3e12 / 2), 1, 1) == pytest.approx(1)
    assert report.seconds(entry("gemm", flops=79e12, read=4.3e12, written=4.3e12), 1, 1) == pytest.approx(2)
    assert report.seconds(entry("other", read=4.3e12, flops=1e18), 1, 1) == pytest.approx(1)
    assert report.seconds(entry("attention", flops=100e12, read=1e15), 50, 25) == pytest.approx(2)
    assert report.seconds(entry("attention", "backward", flops=100e12), 50, 25) == pytest.approx(4)


def test_summary_adds_up():
    entries = [
        entry("gemm", flops=int(790e12), read=10, written=5),
        entry("other", "backward", "block 1", read=int(4.3e12), kernels=2),
        entry("other", "forward", "block 1", read=7, written=1),
    ]
    row = report.summarise(entries, 989e12, 450, 420)
    assert row["roofline_seconds"]["step"] == pytest.approx(2)
    assert row["mfu_bound"] == pytest.approx(1 / 2)
    assert row["kernels"] == 4
    assert row["totals"]["other"]["bytes"] == int(4.3e12) + 8
    for group in report.GROUPS:
        found = report.grouped(entries, group)
        assert sum(row["bytes"] for row in found) == 15 + int(4.3e12) + 8
        assert found[0]["bytes"] == int(4.3e12), "heaviest first"
    peer = report.summarise(entries[1:] * 2, 1.0, 450, 420)
    report.compare(row, peer)
    assert row["other_bytes_to_peer"] == pytest.approx(0.5)
    assert row["time_to_peer"] == pytest.approx(1)


TINY = {
    "model": {"width": 64, "depth": 5, "heads": 1, "context_dim": 32},
    "data": {"resolution": 64, "micro_batch": 2, "global_batch": 2},
    "conditioning": {"text": {"max_tokens": 8}},
    "routing": {"start": 1, "end": 3},
}


@pytest.mark.parametrize("variant", steps.VARIANTS)
@pytest.mark.parametrize("side", traffic.SIDES)
def test_tiny_model(side, variant):
    """The products of both sides are those of the definition, and what is counted is what the shapes say."""
    config = steps.variant_config(parse_config(TINY, "test"), variant)
    config = steps.with_values(config, {"model": {"attention_backend": "varlen"}})
    entries = traffic.record(config, side).entries
    places = {e.place for e in entries}
    assert {"input", "output", *(f"block {i}" for i in range(5))} <= places
    assert ("between" in places) == (variant != "dense")
    samples, tokens, width, hidden = 2, 16, 64, 224
    kept = {"dense": 16, "tread": 8, "sprint": 4}[variant]
    for block, count in ((0, tokens), (2, kept), (4, tokens)):
        mine = [e for e in entries if e.place == f"block {block}" and e.cost.kind == "gemm"]
        image = 2 * samples * count * (4 * width * width + 3 * width * hidden)
        # The peer also projects the padded text (S = 8) and the time vector inside each block.
        other = 2 * samples * (8 * 2 * width * width + 6 * width * width) if side == "peer" else 0
        for phase, times in (("forward", 1), ("backward", 2)):
            assert sum(e.cost.flops for e in mine if e.phase == phase) == times * (image + other)


def test_resolution_and_captions():
    config = parse_config(TINY, "test")
    assert traffic.side_of_grid(config) == 4
    assert traffic.caption_lengths(config) == [2, 6]
    with pytest.raises(UserError, match="multiple of 16"):
        traffic.side_of_grid(steps.with_values(config, {"data": {"resolution": 72}}))


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    config, output = tmp_path / "tiny.json", tmp_path / "out.json"
    config.write_text(json.dumps(TINY))
    options = ["--variant", "dense", "--attention-tflops", "500", "--by", "block", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--config", str(config), *options])
    assert traffic.main() == 0
    printed, found = capsys.readouterr().out, json.loads(output.read_text())
    assert found["ceilings"]["attention_backward_flops_per_second"] == 500e12
    assert [row["side"] for row in found["rows"]] == ["ours", "peer"]
    ours, peer = found["rows"]
    assert f"{ours['other_bytes_to_peer']:.3f}" in printed
    assert "block 4" in printed
    assert ours["totals"]["other"]["bytes"] < peer["totals"]["other"]["bytes"]
    assert ours["kernels"] < peer["kernels"]


@pytest.mark.parametrize("rates", [["0"], ["nan"], ["1", "2", "3"], ["fast"]])
def test_bad_rates_are_refused(rates, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--attention-tflops", *rates])
    with pytest.raises(SystemExit):
        traffic.parse()
    assert "--attention-tflops" in capsys.readouterr().err
