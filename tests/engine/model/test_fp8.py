"""Denoisers whose blocks multiply in FP8: the same parameters, nearly the same values, and what cannot be."""

import contextlib
import importlib
import sys
import types
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from millrace.engine.config import ActivationCheckpointing, Adapter, Config, Fp8, Model, Routing
from millrace.engine.config.loading import parse_config
from millrace.engine.config.precision import MULTIPLE, fp8_shapes
from millrace.engine.distributed import deepspeed_engine
from millrace.engine.model import fp8 as module
from millrace.engine.model.adapters import AdaptedLinear, add_adapter
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.fp8 import Fp8Linear, use_fp8
from millrace.engine.model.routing import RoutedSpan, Sprint, Tread
from millrace.engine.model.working_weights import WorkingLinear, WorkingWeights
from millrace.engine.util.errors import UserError
from millrace.kernels import Route, fp8_linear

CPU = torch.device("cpu")
MODEL = Model(width=32, depth=3, heads=2, in_channels=3, patch_size=4, context_dim=12)
EMULATED = pytest.mark.parametrize("backend", ["torch", "torchao"])


@pytest.fixture(autouse=True)
def _needs_torchao(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "torchao":
        pytest.importorskip("torchao")


def denoiser_of(config=MODEL, routing=None, **fp8):
    """Every parameter drawn; without `fp8` its products are not FP8."""
    denoiser = Denoiser(config, routing)
    generator = torch.Generator().manual_seed(3)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    use_fp8(denoiser, Fp8(**fp8), CPU)
    return denoiser


def batch(denoiser, lengths=(4, 6), text=(3, 5)):
    """Inputs of pictures of 1 x N tokens; none of the row counts is a multiple of 16."""
    generator = torch.Generator().manual_seed(4)
    features = denoiser.config.in_channels * denoiser.config.patch_size**2
    offsets = torch.tensor(list(accumulate(text, initial=0)), dtype=torch.int32)
    layout = denoiser.layouts.layout([(1, n) for n in lengths], offsets, max(text))
    tokens = torch.randn(sum(lengths), features, generator=generator)
    words = torch.randn(sum(text), denoiser.config.context_dim, generator=generator)
    return tokens, torch.rand(len(lengths), generator=generator), words, layout


def evaluate(denoiser, span=None, **sizes):
    """Prediction and gradients of all parameters under autocast, as in training."""
    with torch.autocast("cpu", torch.bfloat16):
        prediction = denoiser(*batch(denoiser, **sizes), span).prediction
    parameters = dict(denoiser.named_parameters())
    found = torch.autograd.grad(prediction.float().square().mean(), parameters.values(), allow_unused=True)
    return prediction.detach().float(), dict(zip(parameters, found, strict=True))


def distance(found, wanted):
    """Root mean square of the error over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


@EMULATED
def test_parameters_are_those_of_the_bf16_model(backend):
    plain, fast = Denoiser(MODEL), Denoiser(MODEL)
    before = {name: id(parameter) for name, parameter in fast.named_parameters()}
    use_fp8(fast, Fp8(backend=backend), CPU)
    assert {name: id(parameter) for name, parameter in fast.named_parameters()} == before
    shapes = [(name, value.shape, value.dtype) for name, value in plain.state_dict().items()]
    assert [(name, value.shape, value.dtype) for name, value in fast.state_dict().items()] == shapes
    assert dict(fast.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    fast.load_state_dict(plain.state_dict())


@EMULATED
@pytest.mark.parametrize("layers", [("qkv", "attn_out", "gate_up", "down", "text_kv"), ("down", "text_kv")])
def test_only_the_named_layers_change(backend, layers):
    fast = denoiser_of(backend=backend, layers=layers)
    changed = {name.rpartition(".")[2] for name, part in fast.named_modules() if isinstance(part, Fp8Linear)}
    assert changed == set(layers)
    count = sum(isinstance(part, Fp8Linear) for part in fast.modules())
    assert count == sum(1 if name == "text_kv" else MODEL.depth for name in layers)
    for name, part in fast.named_modules():
        if isinstance(part, Fp8Linear):
            assert tuple(part.weight.shape) == fp8_shapes(MODEL)[name.rpartition(".")[2]]


def test_none_changes_nothing():
    assert not any(isinstance(part, Fp8Linear) for part in denoiser_of(backend="none").modules())


@EMULATED
@pytest.mark.parametrize("route", ["dense", "tread", "sprint", "skip"])
def test_values_and_gradients_are_near_those_of_bf16(backend, route):
    """Whatever the numbers of rows: 10 image tokens, 8 text tokens, some of them on a route, or none."""
    routing = Routing(policy="sprint", start=1, end=1) if route in ("sprint", "skip") else None
    plain, fast = denoiser_of(routing=routing), denoiser_of(routing=routing, backend=backend)
    span = None
    if route in ("tread", "sprint"):
        policy = (Tread if route == "tread" else Sprint)(1, 1, 0.5)
        span = policy.draw(batch(plain)[3], 5, torch.arange(2))
        assert span.route.index.shape[0] % MULTIPLE
    elif route == "skip":
        nothing = torch.zeros(3, dtype=torch.int32)
        span = RoutedSpan(Route(nothing[:0].long(), nothing, 0), 1, 1, skip=True)
    wanted, wanted_gradients = evaluate(plain, span)
    found, gradients = evaluate(fast, span)
    assert 1e-3 < distance(found, wanted) < 0.1
    for name, want in wanted_gradients.items():
        if want is None:
            assert gradients[name] is None
            continue
        assert gradients[name].dtype == torch.float32
        assert distance(gradients[name], want) < 0.35, name


@EMULATED
def test_a_sample_without_text(backend):
    """No text row at all is no rows of the text product."""
    prediction, gradients = evaluate(denoiser_of(backend=backend), lengths=(5,), text=(0,))
    assert prediction.isfinite().all()
    assert not gradients["text_kv.weight"].any()


def test_torchao_computes_what_torch_does():
    """Recipes differ in the scale alone, which for own products is a power of two: both err by as much."""
    pytest.importorskip("torchao")
    wanted, _ = evaluate(denoiser_of())
    mine, theirs = (evaluate(denoiser_of(backend=name))[0] for name in ("torch", "torchao"))
    assert distance(theirs, wanted) / 2 < distance(mine, wanted) < 2 * distance(theirs, wanted)
    by_row, _ = evaluate(denoiser_of(backend="torchao", recipe="rowwise"))
    high, _ = evaluate(denoiser_of(backend="torchao", recipe="rowwise_with_gw_hp"))
    assert distance(by_row, wanted) < 0.1
    assert distance(high, wanted) < 0.1


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputed_activations_give_the_same_bits(policy):
    plain, recomputed = denoiser_of(backend="torch"), denoiser_of(backend="torch")
    recomputed.checkpoint_activations(ActivationCheckpointing(policy=policy))
    (wanted, gradients), (found, again) = evaluate(plain), evaluate(recomputed)
    assert torch.equal(found, wanted)
    assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def test_selective_recomputation_keeps_the_products():
    flops = {}
    for policy in ("none", "selective", "full"):
        denoiser = denoiser_of(backend="torch")
        denoiser.checkpoint_activations(ActivationCheckpointing(policy=policy))
        with FlopCounterMode(display=False) as counter:
            evaluate(denoiser)
        flops[policy] = counter.get_flop_counts()["Global"][torch.ops.millrace.fp8_product]
    assert flops["selective"] == flops["none"] < flops["full"]


@EMULATED
def test_compiled_blocks(backend):
    plain, compiled = denoiser_of(backend=backend), denoiser_of(backend=backend)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    (wanted, gradients), (found, again) = evaluate(plain), evaluate(compiled)
    assert distance(found, wanted) < 0.01
    assert all(distance(again[name], gradients[name]) < 0.05 for name in gradients if gradients[name].any())


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"torchao is not installed: pip install torchao==\S+, or take torch"):
        use_fp8(Denoiser(MODEL), Fp8(backend="torchao"), CPU)
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=r"transformer_engine is not installed: pip install .*, or take torch"
    ):
        use_fp8(Denoiser(MODEL), Fp8(backend="transformer_engine"), torch.device("cuda"))


def test_transformer_engine_needs_cuda():
    with pytest.raises(UserError, match=r"transformer_engine runs on CUDA alone, this is cpu; take torch"):
        use_fp8(Denoiser(MODEL), Fp8(backend="transformer_engine"), CPU)


@EMULATED
def test_a_gpu_without_fp8(backend, monkeypatch):
    monkeypatch.setattr(module, "missing", lambda device: "FP8 products need another GPU")
    with pytest.raises(UserError, match=r"precision.fp8: FP8 products need another GPU; set .* to none"):
        use_fp8(Denoiser(MODEL), Fp8(backend=backend), torch.device("cuda"))


def test_transformer_engine_is_given_the_parameter_and_padded_rows(monkeypatch):
    """By a stand-in for the library: the layer's own weight, a multiple of 16 rows, its autocast around each
    call with the recipe, and nothing of it in the model's tree."""
    seen = []

    class Linear(nn.Module):
        def __init__(self, inner, outer, bias, params_dtype, device):
            super().__init__()
            assert not bias
            self.weight = nn.Parameter(torch.empty(outer, inner, dtype=params_dtype, device=device))

        def forward(self, x):
            seen.append((self.weight, x.shape[0], active[-1]))
            return x @ self.weight.t().to(x.dtype)

    active = [None]

    @contextlib.contextmanager
    def autocast(enabled, recipe):
        assert enabled
        active.append(recipe)
        yield
        active.pop()

    recipes = types.SimpleNamespace(
        Float8CurrentScaling=lambda: "current", Float8BlockScaling=lambda: "block"
    )
    pytorch, common = types.ModuleType("pytorch"), types.ModuleType("common")
    pytorch.Linear, pytorch.autocast, common.recipe = Linear, autocast, recipes
    root = types.ModuleType("transformer_engine")
    root.pytorch, root.common = pytorch, common
    for name, value in (("", root), (".pytorch", pytorch), (".common", common)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", value)
    monkeypatch.setattr(module, "missing", lambda device: None)
    plain, fast = denoiser_of(), denoiser_of()
    names = list(fast.state_dict())
    use_fp8(fast, Fp8(backend="transformer_engine", recipe="blockwise"), torch.device("cuda"))
    assert list(fast.state_dict()) == names
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]
    (wanted, gradients), (found, again) = evaluate(plain), evaluate(fast)
    assert distance(found, wanted) < 0.02
    assert all(distance(again[name], gradients[name]) < 0.1 for name in gradients)
    assert {(rows % MULTIPLE, recipe) for _, rows, recipe in seen} == {(0, "block")}
    own = {id(part.weight) for part in fast.modules() if isinstance(part, Fp8Linear)}
    assert {id(weight) for weight, *_ in seen} == own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"fp8": {"backend": "torch", "recipe": "rowwise"}},
            "precision.fp8: recipe rowwise is none of the backend torch, which has tensorwise",
        ),
        (
            {"fp8": {"backend": "auto", "recipe": "blockwise"}},
            "precision.fp8: recipe blockwise is none of the backend torch, which has tensorwise",
        ),
        (
            {"compute": "float32", "fp8": {"backend": "torch"}},
            "precision.fp8 needs precision.compute bfloat16, which is float32",
        ),
        ({"fp8": {"backend": "te"}}, "precision.fp8.backend"),
        ({"fp8": {"backend": "torch", "layers": ["modulation"]}}, "precision.fp8.layers"),
        ({"fp8": {"backend": "torch", "layers": []}}, "precision.fp8: layers is empty; set backend to none"),
    ],
)
def test_settings_that_are_refused(changes, said):
    with pytest.raises(UserError, match=r"^x: ") as refused:
        parse_config({"precision": changes}, "x")
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_weights_without_fp8_products():
    model = {"width": 40, "heads": 2, "mlp_ratio": 3.2}
    values = {"model": model, "precision": {"fp8": {"backend": "torch"}}}
    with pytest.raises(
        UserError, match=r"multiples of 16, the weight of qkv is 120 x 40; change model.width"
    ):
        parse_config(values, "x")
    values = {
        "model": {"width": 32, "heads": 2, "mlp_ratio": 3.3},
        "precision": {"fp8": {"backend": "torch"}},
    }
    with pytest.raises(UserError, match=r"the weight of gate_up is 210 x 32; .* leave it out of"):
        parse_config(values, "x")
    values["precision"]["fp8"]["layers"] = ["qkv", "attn_out", "text_kv"]
    assert parse_config(values, "x").precision.fp8.active


@pytest.mark.parametrize("backend", ["torchao", "transformer_engine"])
def test_libraries_that_keep_weights_do_not_go_with_zero_3(backend):
    config = Config.model_validate(
        {"precision": {"fp8": {"backend": backend}}, "deepspeed": {"zero_optimization": {"stage": 3}}}
    )
    with pytest.raises(UserError, match=rf"backend {backend} keeps whole weights .* take torch, or stage 2"):
        deepspeed_engine.deepspeed_config(config)


def test_gradients_of_fp8_layers_are_reduced_as_those_of_others():
    """DeepSpeed asks whether a module's class is one of those named."""
    found = set()
    for name in deepspeed_engine._LINEAR:
        package, _, attribute = name.rpartition(".")
        found.add(getattr(importlib.import_module(package), attribute))
    assert found == {nn.Linear, AdaptedLinear, Fp8Linear, WorkingLinear}
    denoiser = denoiser_of(backend="torch")
    kinds = {type(part) for part in denoiser.modules() if isinstance(part, nn.Linear)}
    WorkingWeights(denoiser, torch.bfloat16)
    adapted = denoiser_of(backend="none")
    add_adapter(adapted, Adapter(kind="lora"), 0)
    parts = (*denoiser.modules(), *adapted.modules())
    assert kinds | {type(part) for part in parts if isinstance(part, nn.Linear)} == found


def test_auto_is_torch():
    assert Fp8(backend="auto").chosen == "torch"
    fast = denoiser_of(backend="auto")
    assert fast.blocks[0].qkv.multiply is fp8_linear
