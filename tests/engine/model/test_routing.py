"""What policies draw, and TREAD: rows that bypass a span are untouched, others see only each other."""

import pytest
import torch

from millrace.engine.config import Config, Model, Routing
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.guidance_branches import Branch
from millrace.engine.model.layout import LayoutCache
from millrace.engine.model.routing import (
    Dense,
    RoutedSpan,
    Sprint,
    Tread,
    branch_span,
    describe,
    require_grid,
    routing_policy,
)
from millrace.engine.util.errors import UserError

MODULATION = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate")

CONFIG = Model(width=32, depth=5, heads=2, in_channels=4, context_dim=12)
UNIFORM, MIXED = [(4, 4)] * 3, [(4, 4), (2, 5), (3, 3)]
TEXT = [3, 1, 4]
INDEX = torch.tensor([11, 5, 900])


def _batch(grids):
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(CONFIG)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    offsets = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    layout = denoiser.layouts.layout(grids, offsets, max(TEXT))
    tokens = torch.randn(sum(layout.lengths), 16, generator=generator)
    text = torch.randn(sum(TEXT), 12, generator=generator)
    return denoiser, (tokens, torch.rand(3, generator=generator), text, layout)


def _block_inputs(denoiser, inputs, span=None):
    """The arguments of every block in one forward pass, and x as the final layer gets it."""
    seen, handles = [], []
    for block in denoiser.blocks:
        handles.append(block.register_forward_pre_hook(lambda _block, args: seen.append(args)))
    final = []
    handles.append(denoiser.final_layer.register_forward_pre_hook(lambda _layer, args: final.append(args[0])))
    with torch.no_grad():
        denoiser(*inputs, span=span)
    for handle in handles:
        handle.remove()
    return seen, final[0]


@pytest.mark.parametrize("grids", [UNIFORM, MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize(("start", "end"), [(1, 2), (0, 3), (2, 4)])
def test_span_runs_the_kept_rows_alone_and_leaves_the_others(grids, start, end):
    denoiser, inputs = _batch(grids)
    denoiser.double()  # two orders of the same sums, through random weights: FP32 would show its rounding
    inputs = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    layout = inputs[3]
    span = Tread(start, end, drop=0.5).draw(layout, 42, INDEX)
    dense, _ = _block_inputs(denoiser, inputs)
    routed, final = _block_inputs(denoiser, inputs, span)
    after = final if end == CONFIG.depth - 1 else routed[end + 1][0]

    before = dense[start][0]
    kept = torch.zeros(len(before), dtype=torch.bool)
    kept[span.route.index] = True
    assert 0 < kept.sum() < len(before)
    assert torch.equal(after[~kept], before[~kept])

    # Each sample by itself through the span: its kept tokens, their positions, its own text.
    offsets, text_offsets = layout.cu_seqlens.tolist(), layout.cu_seqlens_text.tolist()
    for b in range(len(grids)):
        rows = span.route.index[(span.route.index >= offsets[b]) & (span.route.index < offsets[b + 1])]
        x = before[rows]
        for i in range(start, end + 1):
            read = dense[i][1]
            text = read.text_kv[text_offsets[b] : text_offsets[b + 1]]
            lengths = [torch.tensor([0, len(part)], dtype=torch.int32) for part in (x, text)]
            own = read._replace(
                **{name: getattr(read, name)[b : b + 1] for name in MODULATION},
                text_kv=text,
                positions=layout.positions[rows],
                cu_seqlens=lengths[0],
                max_seqlen=len(x),
                cu_seqlens_text=lengths[1],
                max_seqlen_text=len(text),
            )
            with torch.no_grad():
                x = denoiser.blocks[i](x, own)
        torch.testing.assert_close(after[rows], x, rtol=1e-4, atol=1e-4)


def test_blocks_outside_the_span_see_all_rows():
    denoiser, inputs = _batch(MIXED)
    layout = inputs[3]
    span = Tread(1, 2, drop=0.5).draw(layout, 42, INDEX)
    seen, final = _block_inputs(denoiser, inputs, span)
    total, kept = sum(layout.lengths), len(span.route.index)
    assert [len(args[0]) for args in seen] == [total, kept, kept, total, total]
    assert [args[1].cu_seqlens is layout.cu_seqlens for args in seen] == [True, False, False, True, True]
    assert torch.equal(seen[1][1].positions, layout.positions[span.route.index])
    assert len(final) == total


def test_a_route_of_all_rows_changes_nothing():
    denoiser, inputs = _batch(MIXED)
    layout = inputs[3]
    span = Tread(1, 3, drop=0.5).draw(layout, 42, INDEX)
    everything = span.route._replace(
        index=torch.arange(sum(layout.lengths)), cu_seqlens=layout.cu_seqlens, max_seqlen=layout.max_seqlen
    )
    with torch.no_grad():
        routed = denoiser(*inputs, span=RoutedSpan(everything, 1, 3)).prediction
        dense = denoiser(*inputs).prediction
    assert torch.equal(routed, dense)


def test_gradients_flow_past_and_through_the_span():
    denoiser, inputs = _batch(MIXED)
    span = Tread(1, 2, drop=0.5).draw(inputs[3], 42, INDEX)
    tokens = inputs[0].requires_grad_()
    denoiser(*inputs, span=span)[0].square().sum().backward()
    assert (tokens.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in denoiser.parameters())


def test_taps_inside_the_span_have_the_kept_rows():
    denoiser, inputs = _batch(UNIFORM)
    span = Tread(1, 2, drop=0.5).draw(inputs[3], 42, INDEX)
    with torch.no_grad():
        outside, inside = denoiser(*inputs, span=span, taps=(0, 2)).features
        after = _block_inputs(denoiser, inputs, span)[0][3][0]
    assert len(outside) == 48
    assert torch.equal(inside, after[span.route.index])


@pytest.mark.parametrize("start", [1, 3])
def test_taps_before_the_span_are_what_went_into_it(start):
    """Also where rows are put back in place: the tapped tensor is the one that bypasses."""
    denoiser, inputs = _batch(MIXED)
    span = Tread(start, 3, drop=0.5).draw(inputs[3], 42, INDEX)
    with torch.no_grad():
        (tapped,) = denoiser(*inputs, span=span, taps=(start - 1,)).features
        (wanted,) = denoiser(*inputs, taps=(start - 1,)).features
    assert torch.equal(tapped, wanted)


def test_route_belongs_to_the_sample():
    denoiser, (_, _, _, mixed) = _batch(MIXED)
    policy = Tread(1, 2, drop=0.25)
    route = policy.draw(mixed, 42, INDEX).route
    assert torch.equal(policy.draw(mixed, 42, INDEX).route.index, route.index)
    assert not torch.equal(policy.draw(mixed, 43, INDEX).route.index, route.index)
    # 16, 10 and 9 tokens, of which 4, 2 (half to even) and 2 bypass.
    assert route.cu_seqlens.tolist() == [0, 12, 20, 27]
    for b in range(3):
        own = route.index[route.cu_seqlens[b] : route.cu_seqlens[b + 1]] - mixed.cu_seqlens[b]
        assert (own.diff() > 0).all()
        assert own[0] >= 0
        assert own[-1] < mixed.lengths[b]
        alone = denoiser.layouts.layout([MIXED[b]], torch.tensor([0, 1], dtype=torch.int32), 1)
        assert torch.equal(policy.draw(alone, 42, INDEX[b : b + 1]).route.index, own)


def test_policy_follows_the_configuration():
    dense = routing_policy(Config())
    assert isinstance(dense, Dense)
    assert dense.draw(None, 0, INDEX) is None
    tread = routing_policy(Config.model_validate({"routing": {"policy": "tread", "drop": 0.3}}))
    assert (tread.start, tread.end, tread.drop) == (2, 12, 0.3)
    values = {"model": {"depth": 9}, "routing": {"policy": "tread", "start": 1, "end": 6}}
    tread = routing_policy(Config.model_validate(values))
    assert (tread.start, tread.end) == (1, 6)
    sprint = routing_policy(Config.model_validate({"routing": {"policy": "sprint"}}))
    assert isinstance(sprint, Sprint)
    assert vars(sprint) == {"start": 2, "end": 12, "drop": 0.75, "structured": False, "path_drop": 0.0}
    values = {"policy": "sprint", "drop": 0.625, "end": 13, "structured": True, "path_drop": 0.1}
    sprint = routing_policy(Config.model_validate({"routing": values}))
    assert vars(sprint) == {"start": 2, "end": 13, "drop": 0.625, "structured": True, "path_drop": 0.1}


def _layout(grids):
    offsets = torch.arange(len(grids) + 1, dtype=torch.int32)
    return LayoutCache((8, 8), 1e4).layout(grids, offsets, 1)


def test_sprint_draws_a_quarter_anywhere():
    """TREAD's route at its own share: the same keys, hence comparable runs."""
    layout = _layout(MIXED)
    span = Sprint(1, 3, 0.75).draw(layout, 42, INDEX)
    assert (span.start, span.end, span.dropped) == (1, 3, None)
    # 16, 10 and 9 tokens, of which 12, 8 (7.5, half to even) and 7 do not run.
    assert span.route.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert torch.equal(span.route.index, Tread(1, 3, 0.75).draw(layout, 42, INDEX).route.index)


@pytest.mark.parametrize(("drop", "edge", "kept"), [(0.75, 2, 1), (0.5, 2, 2), (0.625, 4, 6), (0.875, 4, 2)])
def test_structured_routes_keep_the_same_number_in_each_square(drop, edge, kept):
    layout = _layout([(8, 4)] * 3)
    route = Sprint(1, 3, drop, structured=True).draw(layout, 42, INDEX).route
    assert route.cu_seqlens.tolist() == [b * round(32 * (1 - drop)) for b in range(4)]
    for b in range(3):
        counts = torch.zeros(8 // edge, 4 // edge, dtype=torch.int64)
        rows = route.index[route.cu_seqlens[b] : route.cu_seqlens[b + 1]]
        assert (rows.diff() > 0).all()
        for row in (rows - 32 * b).tolist():
            counts[row // 4 // edge, row % 4 // edge] += 1
        assert (counts == kept).all()


def test_structured_routes_share_one_grid():
    with pytest.raises(ValueError, match=r"need one grid, the batch has \[\(2, 8\), \(4, 4\)\]"):
        Sprint(1, 3, 0.75, structured=True).draw(_layout([(4, 4), (2, 8), (4, 4)]), 42, INDEX)


def test_path_drop_belongs_to_the_sample_and_has_its_share():
    policy = Sprint(1, 3, 0.75, path_drop=0.1)
    index = torch.arange(4000)
    dropped = policy.draw(_layout([(2, 2)] * 4000), 42, index).dropped
    assert dropped.dtype == torch.bool
    assert abs(int(dropped.sum()) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    for chosen in ([17], [3999, 5, 170], [8, 9, 10, 11]):
        layout = _layout([(2, 2 + b) for b in range(len(chosen))])
        assert torch.equal(policy.draw(layout, 42, torch.tensor(chosen)).dropped, dropped[chosen])
    assert not torch.equal(policy.draw(_layout([(2, 2)] * 4000), 43, index).dropped, dropped)
    # Not the draw that decides the route: kept rows are spread evenly over both kinds of samples.
    route = policy.draw(_layout([(2, 2)] * 4000), 42, index).route
    first = (route.index - 4 * index == 0)[dropped].float().mean()
    assert abs(float(first) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize(
    ("drop", "resolution", "message"),
    [
        (0.75, 288, None),
        (0.75, 272, r"pictures of 272 pixels: grid is \(17, 17\), expected .* divisible by 2"),
        (0.625, 288, r"pictures of 288 pixels: grid is \(18, 18\), expected .* divisible by 4"),
        (0.625, 256, None),
    ],
)
def test_structured_needs_a_grid_that_divides(drop, resolution, message):
    routing = {"policy": "sprint", "structured": True, "drop": drop}
    config = Config.model_validate({"routing": routing, "data": {"resolution": resolution}})
    if message is None:
        require_grid(config, 16)
    else:
        with pytest.raises(UserError, match=message):
            require_grid(config, 16)
    require_grid(Config.model_validate({"data": {"resolution": 272}}), 16)


def test_nothing_dropped_runs_every_token():
    """The fine-tune on all tokens: TREAD is the dense model; SPRINT keeps its fusion layer and path drop."""
    tread = routing_policy(Config.model_validate({"routing": {"policy": "tread", "drop": 0}}))
    assert isinstance(tread, Dense)
    layout = _layout(MIXED)
    assert Sprint(1, 3, 0.0).draw(layout, 42, INDEX) == RoutedSpan(None, 1, 3)
    span = Sprint(1, 3, 0.0, path_drop=0.5).draw(layout, 42, INDEX)
    assert torch.equal(span.route.index, torch.arange(16 + 10 + 9))
    assert torch.equal(span.route.cu_seqlens, layout.cu_seqlens)
    assert span.route.max_seqlen == 16
    assert torch.equal(span.dropped, Sprint(1, 3, 0.75, path_drop=0.5).draw(layout, 42, INDEX).dropped)


def test_nothing_dropped_fits_any_grid():
    routing = {"policy": "sprint", "structured": True, "drop": 0}
    require_grid(Config.model_validate({"routing": routing, "data": {"resolution": 272}}), 16)


def test_branches_of_sampling():
    """A branch draws as the policy of its own drop does, whatever the training's path drop; or skips."""
    layout = _layout(UNIFORM)
    sprint = Routing(policy="sprint", structured=True, path_drop=0.5)
    assert branch_span(Branch(), sprint, 8, layout, 42, INDEX) is None
    span = branch_span(Branch(drop=0.5), sprint, 8, layout, 42, INDEX)
    wanted = Sprint(2, 4, 0.5, structured=True).draw(layout, 42, INDEX)
    assert (span.start, span.end, span.dropped, span.skip) == (2, 4, None, False)
    assert torch.equal(span.route.index, wanted.route.index)
    skipped = branch_span(Branch(skip=True), sprint, 8, layout, 42, INDEX)
    assert (skipped.start, skipped.end, skipped.skip) == (2, 4, True)
    assert skipped.route.index.shape == (0,)
    assert skipped.route.cu_seqlens.tolist() == [0, 0, 0, 0]


def test_descriptions():
    def said(**routing):
        return describe(Config.model_validate({"routing": routing}))

    assert said() == "routing: none"
    assert said(policy="tread") == "routing: tread, 0.5 of the tokens bypass blocks 2..12"
    assert said(policy="tread", drop=0) == "routing: tread, all tokens run through blocks 2..12"
    assert said(policy="sprint", drop=0, path_drop=0.1) == (
        "routing: sprint, all tokens run through blocks 2..12; "
        "unstructured, learned mask token, path drop 0.1"
    )
    assert said(policy="sprint", drop=0.875, structured=True, path_drop=0.1) == (
        "routing: sprint, 0.875 of the tokens bypass blocks 2..12; "
        "structured, learned mask token, path drop 0.1"
    )
