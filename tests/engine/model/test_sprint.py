"""SPRINT in the denoiser against its definition: a dense concatenation, a linear layer, sample by sample."""

import pytest
import torch

from millrace.engine.config import Model, Routing
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import RoutedSpan, Sprint

MODULATION = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate")

CONFIG = Model(width=32, depth=5, heads=2, in_channels=4, context_dim=12)
PRX = Routing(policy="sprint", start=1, end=3)
PAPER = Routing(
    policy="sprint",
    start=2,
    end=3,
    structured=True,
    fuse_order="deep_dense",
    mask_token="frozen",
    path_drop=0.5,
)
UNIFORM, MIXED = [(4, 4)] * 3, [(4, 4), (2, 5), (3, 3)]
TEXT = [3, 1, 4]
INDEX = torch.tensor([11, 5, 900])
CASES = {"prx": (PRX, UNIFORM), "prx, mixed": (PRX, MIXED), "paper": (PAPER, UNIFORM)}
CASE = pytest.mark.parametrize(("routing", "grids"), CASES.values(), ids=CASES)


def sprint(routing):
    return Sprint(routing.start, routing.end, routing.drop, routing.structured, routing.path_drop)


def random_denoiser(routing):
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(CONFIG, routing).double()
    with torch.no_grad():
        for tensor in denoiser.state_dict().values():
            tensor.copy_(torch.empty_like(tensor).normal_(std=0.3, generator=generator))
    return denoiser


def batch(denoiser, grids):
    generator = torch.Generator().manual_seed(1)
    layout = denoiser.layouts.layout(grids, torch.tensor([0, 3, 4, 8], dtype=torch.int32), max(TEXT))
    tokens = torch.randn(sum(layout.lengths), 16, generator=generator, dtype=torch.float64)
    text = torch.randn(sum(TEXT), 12, generator=generator, dtype=torch.float64)
    return tokens, torch.rand(3, generator=generator, dtype=torch.float64), text, layout


def by_hand(denoiser, routing, inputs, span):
    """(prediction, output of block end) of the definition, from the parts of the denoiser, one by one.

    What the blocks get besides their tokens is recorded from a pass of the same network without SPRINT.
    """
    plain = Denoiser(CONFIG).double()
    own = dict(denoiser.named_parameters())
    arguments, final = [], []
    handles = [
        block.register_forward_pre_hook(lambda _block, args: arguments.append(args)) for block in plain.blocks
    ]
    handles.append(plain.final_layer.register_forward_pre_hook(lambda _layer, args: final.append(args)))
    shared = {name: own[name] for name, _ in plain.named_parameters()}
    torch.func.functional_call(plain, shared, inputs)
    for handle in handles:
        handle.remove()

    layout, fusion = inputs[3], denoiser.fusion
    before, offsets = arguments[routing.start][0], layout.cu_seqlens.tolist()
    padded, deep = [], []
    for b in range(len(layout.grids)):
        first, end = offsets[b], offsets[b + 1]
        rows = range(first, end)
        if span is not None:
            rows = [row for row in span.route.index.tolist() if first <= row < end]
        x = before[list(rows)]
        text_rows = slice(sum(TEXT[:b]), sum(TEXT[: b + 1]))
        for i in range(routing.start, routing.end + 1):
            read = arguments[i][1]
            lengths = [torch.tensor([0, n], dtype=torch.int32) for n in (len(x), TEXT[b])]
            own = read._replace(
                **{name: getattr(read, name)[b : b + 1] for name in MODULATION},
                text_kv=read.text_kv[text_rows],
                positions=layout.positions[list(rows)],
                cu_seqlens=lengths[0],
                max_seqlen=len(x),
                cu_seqlens_text=lengths[1],
                max_seqlen_text=TEXT[b],
            )
            x = denoiser.blocks[i](x, own)
        deep.append(x)
        ran = dict(zip(rows, x, strict=True))
        if span is not None and span.dropped is not None and span.dropped[b]:
            ran = {}
        padded += [ran.get(row, fusion.mask_token) for row in range(first, end)]
    dense_first = routing.fuse_order == "dense_deep"
    pair = (before, torch.stack(padded)) if dense_first else (torch.stack(padded), before)
    x = torch.cat(pair, dim=1) @ fusion.weight.T + fusion.bias
    for i in range(routing.end + 1, CONFIG.depth):
        x = denoiser.blocks[i](x, *arguments[i][1:])
    return denoiser.final_layer(x, *final[0][1:]), torch.cat(deep)


@CASE
def test_training_is_the_definition_with_every_gradient(routing, grids):
    denoiser = random_denoiser(routing)
    inputs = batch(denoiser, grids)
    span = sprint(routing).draw(inputs[3], 42, INDEX)
    if routing is PAPER:
        assert span.dropped.tolist() == [True, False, True]  # otherwise the case would test nothing
    results = []
    tapped = denoiser(*inputs, span=span, taps=(routing.end,))
    for prediction, deep in (
        (tapped.prediction, *tapped.features),
        by_hand(denoiser, routing, inputs, span),
    ):
        named = dict(denoiser.named_parameters())
        gradients = torch.autograd.grad(prediction.square().sum(), list(named.values()))
        results.append({"prediction": prediction, "deep": deep, **dict(zip(named, gradients, strict=True))})
    found, wanted = results
    assert ("fusion.mask_token" in wanted) == (routing is PRX)
    for name, value in wanted.items():
        assert value.abs().max() > 1e-3, name
        assert (found[name] - value).abs().max() <= 1e-9 * value.abs().max(), name


@CASE
def test_sampling_runs_all_tokens_and_fuses(routing, grids):
    denoiser = random_denoiser(routing).eval()
    inputs = batch(denoiser, grids)
    with torch.no_grad():
        found = denoiser(*inputs).prediction
        wanted, _ = by_hand(denoiser, routing, inputs, None)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        denoiser.fusion.mask_token.add_(1)
        assert torch.equal(denoiser(*inputs)[0], found)


def test_a_dropped_path_leaves_nothing_of_the_span():
    """Blocks of the span get no gradient from dropped samples, and do not change their prediction."""
    denoiser = random_denoiser(PRX)
    inputs = batch(denoiser, MIXED)
    route = sprint(PRX).draw(inputs[3], 42, INDEX).route
    start, end = inputs[3].cu_seqlens[1:3].tolist()

    def predict(dropped):
        return denoiser(*inputs, span=RoutedSpan(route, 1, 3, torch.tensor(dropped)))[0]

    predict([False, True, False])[start:end].square().sum().backward()
    assert all(not p.grad.any() for p in denoiser.blocks[2].parameters())
    assert denoiser.blocks[0].qkv.weight.grad.any()
    with torch.no_grad():
        whole, partly = predict([False, False, False]), predict([False, True, False])
        assert not torch.allclose(partly[start:end], whole[start:end])
        torch.testing.assert_close(partly[:start], whole[:start], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(partly[end:], whole[end:], rtol=1e-12, atol=1e-12)
        denoiser.blocks[2].down.weight.zero_()
        torch.testing.assert_close(predict([False, True, False])[start:end], partly[start:end])


@pytest.mark.parametrize("grids", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_all_tokens_run_and_paths_are_dropped(grids):
    """The fine-tune: of a dropped sample every row counts as not run, of the others none."""
    denoiser = random_denoiser(PRX)
    inputs = batch(denoiser, grids)
    span = Sprint(1, 3, 0.0, path_drop=0.5).draw(inputs[3], 42, INDEX)
    assert span.dropped.tolist() == [True, False, True]
    with torch.no_grad():
        found = denoiser(*inputs, span=span).prediction
        wanted, _ = by_hand(denoiser, PRX, inputs, span)
        whole = denoiser(*inputs).prediction
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    start, end = inputs[3].cu_seqlens[1:3].tolist()
    torch.testing.assert_close(found[start:end], whole[start:end], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[:start], whole[:start])


def test_initial_fusion():
    """PyTorch's default of a linear layer, and the mask token of each kind; the rest as without SPRINT."""
    wide = CONFIG.model_copy(update={"width": 512})
    found = {}
    for kind in ("learned", "frozen"):
        denoiser = Denoiser(wide, Routing(policy="sprint", mask_token=kind, end=3))
        denoiser.init_weights(7)
        fusion = found[kind] = denoiser.fusion
        for parameter in (fusion.weight, fusion.bias):
            unit = parameter.detach() * 1024**0.5
            assert unit.abs().max() <= 1
            assert abs(unit.square().mean() - 1 / 3) < 2.4 / unit.numel() ** 0.5
    assert isinstance(found["learned"].mask_token, torch.nn.Parameter)
    assert not found["learned"].mask_token.any()
    frozen = found["frozen"].mask_token
    assert not isinstance(frozen, torch.nn.Parameter)
    assert frozen.std() == pytest.approx(0.02, rel=0.15)
    plain = Denoiser(wide)
    plain.init_weights(7)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(denoiser.state_dict()[name], tensor), name


def test_new_layer_has_finite_weights_before_any_initialisation():
    assert all(tensor.isfinite().all() for tensor in Denoiser(CONFIG, PAPER).state_dict().values())


def test_sixteen_bit():
    """Under autocast as in training, and with weights in 16 bit as in sampling: close to float64."""
    denoiser = random_denoiser(PRX)
    tokens, t, text, layout = batch(denoiser, UNIFORM)
    span = sprint(PRX).draw(layout, 42, INDEX)
    with torch.no_grad():
        wanted = denoiser(tokens, t, text, layout, span).prediction
        denoiser = denoiser.float()
        with torch.autocast("cpu", torch.bfloat16):
            autocast = denoiser(tokens.float(), t.float(), text.float(), layout, span).prediction
        denoiser = denoiser.bfloat16()
        low = denoiser(tokens.bfloat16(), t.float(), text.bfloat16(), layout, span).prediction
    for found in (autocast, low):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 0.05 * wanted.norm()
