"""Names and configurations of other formats: exact both ways, and every misfit named."""

import pytest
import torch
from diffusers import PRXTransformer2DModel

from millrace.engine.config import Model
from millrace.engine.model.conversion import (
    denoiser_state,
    diffusers_config,
    diffusers_state,
    expect_state,
    infer_model,
    model_config,
    prx_state,
)
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError

LATENT = Model(width=32, depth=3, heads=2, in_channels=16, patch_size=2, context_dim=12)
PIXEL = Model(
    width=48,
    depth=2,
    heads=3,
    mlp_ratio=2.0,
    in_channels=3,
    patch_size=16,
    bottleneck=10,
    context_dim=12,
    resolution_embedding=True,
)
MODELS = pytest.mark.parametrize("config", [LATENT, PIXEL], ids=["latent", "pixel"])


def _random_state(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in Denoiser(config).state_dict().items()
    }


def _assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rename", [diffusers_state, prx_state])
def test_round_trip_is_exact(config, dtype, rename):
    state = _random_state(config, dtype)
    _assert_equal(denoiser_state(rename(state, config), config), state)


@MODELS
def test_diffusers_names_and_shapes_are_those_of_the_class(config):
    with torch.device("meta"):
        theirs = PRXTransformer2DModel(**diffusers_config(config)).state_dict()
    found = diffusers_state(_random_state(config), config)
    assert {name: part.shape for name, part in found.items()} == {n: p.shape for n, p in theirs.items()}


def test_fused_rows_are_the_parts_in_order():
    state = _random_state(LATENT)
    theirs = diffusers_state(state, LATENT)
    assert torch.equal(theirs["blocks.1.modulation.lin.weight"], state["modulation.weight"][192:384])
    assert torch.equal(theirs["blocks.2.modulation.lin.bias"], state["modulation.bias"][384:])
    assert torch.equal(theirs["blocks.2.attention.txt_kv_proj.weight"], state["text_kv.weight"][128:])
    assert torch.equal(theirs["blocks.0.gate_proj.weight"], state["blocks.0.gate_up.weight"][:112])
    assert torch.equal(theirs["blocks.0.up_proj.weight"], state["blocks.0.gate_up.weight"][112:])


def test_photoroom_names():
    theirs = prx_state(_random_state(LATENT), LATENT)
    assert {name.removeprefix("blocks.1.") for name in theirs if name.startswith("blocks.1.")} == {
        "img_qkv_proj.weight",
        "attn_out.weight",
        "qk_norm.query_norm.scale",
        "qk_norm.key_norm.scale",
        "txt_kv_proj.weight",
        "k_norm.scale",
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
        "modulation.lin.weight",
        "modulation.lin.bias",
    }
    outside = {name for name in prx_state(_random_state(PIXEL), PIXEL) if not name.startswith("blocks.")}
    layers = (
        "img_in.0",
        "img_in.1",
        "txt_in",
        "time_in.in_layer",
        "time_in.out_layer",
        "resolution_embedder.mlp.in_layer",
        "resolution_embedder.mlp.out_layer",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    )
    assert outside == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_photoroom_norms_may_call_their_scale_weight():
    state = _random_state(LATENT)
    theirs = {name.replace(".scale", ".weight"): part for name, part in prx_state(state, LATENT).items()}
    assert "blocks.0.k_norm.weight" in theirs
    _assert_equal(denoiser_state(theirs, LATENT), state)


def test_a_tensor_under_two_names_is_refused():
    state = _random_state(LATENT)
    with pytest.raises(UserError, match="same tensor under a diffusers and a Photoroom/PRX name"):
        denoiser_state(diffusers_state(state, LATENT) | prx_state(state, LATENT), LATENT)


def test_every_misfit_is_in_one_error():
    theirs = diffusers_state(_random_state(LATENT), LATENT)
    for name in (
        "txt_in.bias",
        "blocks.0.up_proj.weight",
        "blocks.1.up_proj.weight",
        "blocks.2.up_proj.weight",
    ):
        del theirs[name]
    theirs["extra"] = torch.zeros(1)
    theirs["img_in.bias"] = torch.zeros(31)
    with pytest.raises(UserError) as caught:
        denoiser_state(theirs, LATENT)
    assert str(caught.value) == (
        "weights do not fit the model configuration: 4 missing (txt_in.bias, blocks.0.up_proj.weight, "
        "blocks.1.up_proj.weight, ...), 1 unexpected (extra), "
        "1 of another shape (img_in.bias (31,) instead of (32,))"
    )


def test_our_own_names_are_checked_too():
    state = _random_state(LATENT)
    expect_state(state, LATENT)
    del state["text_kv.weight"]
    for check in (expect_state, diffusers_state, prx_state):
        with pytest.raises(UserError, match=r"1 missing \(text_kv\.weight\)$"):
            check(state, LATENT)
    deeper = LATENT.model_copy(update={"depth": 4})
    with pytest.raises(UserError, match=r"modulation\.weight \(576, 32\) instead of \(768, 32\)"):
        expect_state(_random_state(LATENT), deeper)


@pytest.mark.parametrize("config", [LATENT, PIXEL, Model(), Model(rope_axes=(16, 48), rope_theta=7.5)])
def test_configuration_round_trip(config):
    values = diffusers_config(config)
    found = model_config({"_class_name": "PRXTransformer2DModel", "_diffusers_version": "0.42.1", **values})
    assert found == config.model_copy(update={"rope_axes": config.axes})
    assert diffusers_config(found) == values


def test_configuration_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        theirs = PRXTransformer2DModel().config
    options = {name: value for name, value in theirs.items() if not name.startswith("_")}
    assert diffusers_config(model_config({})) == options | {"axes_dim": [32, 32]}
    assert model_config(theirs) == model_config({})
    assert diffusers_config(model_config({})) == diffusers_config(Model())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel"),
        ({"guidance_embeds": True}, "does not know guidance_embeds"),
        ({"time_factor": 1.0}, r"time_factor is 1\.0, but the Denoiser is made for 1000\.0"),
        ({"time_max_period": 100}, "time_max_period is 100"),
        ({"num_heads": 5}, "width 1792 is not divisible by heads 5"),
        ({"depth": "deep"}, "model.depth"),
    ],
)
def test_configuration_that_cannot_be_used(values, message):
    with pytest.raises(UserError, match=message):
        model_config(values, "config.json")


@MODELS
@pytest.mark.parametrize("rename", [diffusers_state, prx_state])
def test_model_is_inferred_from_shapes(config, rename):
    assert infer_model(rename(_random_state(config), config)) == config


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"in_channels": 32},
        {"in_channels": 32, "patch_size": 1},
        {"in_channels": 3, "patch_size": 32, "bottleneck": 256},
        {"width": 3584, "depth": 24},
        {"in_channels": 3, "patch_size": 16, "bottleneck": 768, "context_dim": 2048},
    ],
)
def test_published_models_are_inferred(values):
    config = Model(**values)
    with torch.device("meta"):
        state = Denoiser(config).state_dict()
    assert infer_model(diffusers_state(state, config)) == config


@pytest.mark.parametrize(("width", "ratio"), [(24, 3.3), (28, 2.2), (44, 0.35), (52, 1.22)])
def test_inferred_ratio_gives_the_mlp_width(width, ratio):
    config = Model(width=width, depth=1, heads=1, mlp_ratio=ratio, context_dim=4)
    found = infer_model(diffusers_state(_random_state(config), config))
    assert found.mlp_width == config.mlp_width


def test_what_cannot_be_inferred_is_an_error():
    config = LATENT.model_copy(update={"in_channels": 5})
    theirs = diffusers_state(_random_state(config), config)
    with pytest.raises(UserError, match=r"20 patch features.*give the model configuration"):
        infer_model(theirs)
    del theirs["txt_in.weight"]
    with pytest.raises(UserError, match=r"no 2-D tensor 'txt_in\.weight'"):
        infer_model(theirs)
