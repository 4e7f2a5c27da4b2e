import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from millrace.engine.config import Autoencoder
from millrace.engine.encoders import autoencoder as module
from millrace.engine.encoders.autoencoder import network_of, open_autoencoder, published_factor
from millrace.engine.util.errors import UserError

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
KL = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
DC = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_out_channels": (8, 8, 8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 8, 8, 16, 16),
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "encoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    "decoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    "scaling_factor": 0.41407,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach the hub, whatever the machine allows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make(kind):
    torch.manual_seed(0)
    if kind == "dc_ae":
        return diffusers.AutoencoderDC(**DC).eval()
    if kind == "flux2":
        return diffusers.AutoencoderKLFlux2(latent_channels=32, **KL).eval()
    return diffusers.AutoencoderKL(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **KL,
    ).eval()


def open_saved(kind, folder, dtype="float32"):
    return open_autoencoder(Autoencoder(kind=kind, path=str(folder), dtype=dtype), CPU)


def pictures(height=32, width=48, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_pixels_are_themselves():
    autoencoder = open_autoencoder(Autoencoder(kind="pixels"), CPU)
    images = pictures(5, 7)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stochastic) == (3, 1, False)
    assert torch.equal(autoencoder.encode(images), images)
    assert torch.equal(autoencoder.decode(images * 3), (images * 3).clamp(-1, 1))


@pytest.mark.parametrize(
    ("kind", "channels", "scale", "shift"),
    [("flux1", 16, 0.3611, 0.1159), ("repa_e", 16, 0.3611, 0.1159), ("flux2", 32, 0.18215, 0.0)],
)
def test_posterior_is_sampled_with_the_callers_noise_and_scaled(tmp_path, kind, channels, scale, shift):
    network = make(kind)
    network.save_pretrained(tmp_path)
    autoencoder = open_saved(kind, tmp_path)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stochastic) == (channels, 8, True)
    images = pictures()
    noise = torch.randn(2, channels, 4, 6)
    with torch.no_grad():
        moments = network.encoder(images)
        if network.quant_conv is not None:
            moments = network.quant_conv(moments)
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(logvar.clamp(-30, 20)) ** 0.5
    expected = scale * (mean + std * noise - shift)
    torch.testing.assert_close(autoencoder.encode(images, noise), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(autoencoder.encode(images), scale * (mean - shift), rtol=1e-5, atol=1e-6)
    assert std.min() > 0.01


def flux2_with_statistics():
    """FLUX.2's class with running statistics as if it had been trained."""
    network = make("flux2")
    generator = torch.Generator().manual_seed(4)
    network.bn.running_mean.normal_(generator=generator)
    network.bn.running_var.uniform_(0.2, 3.0, generator=generator)
    return network


def open_folded(folder, dtype="float32"):
    config = Autoencoder(kind="flux2", form="patchified", path=str(folder), dtype=dtype)
    return open_autoencoder(config, CPU)


def test_flux2_patchified_is_what_its_own_pipeline_trains_on(tmp_path):
    """The pipeline's functions fold; its formula normalises."""
    pipeline = diffusers.Flux2Pipeline
    network = flux2_with_statistics()
    network.save_pretrained(tmp_path)
    autoencoder = open_folded(tmp_path)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stochastic) == (128, 16, True)
    assert autoencoder.identity == f"flux2 {tmp_path} (patchified)"
    images, noise = pictures(), torch.randn(2, 128, 2, 3)
    with torch.no_grad():
        mean, logvar = network.quant_conv(network.encoder(images)).chunk(2, dim=1)
        raw = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * pipeline._unpatchify_latents(noise)
    center = network.bn.running_mean[:, None, None]
    deviation = (network.bn.running_var + network.config.batch_norm_eps).sqrt()[:, None, None]
    for drawn, source in ((noise, raw), (None, mean)):
        expected = (pipeline._patchify_latents(source) - center) / deviation
        torch.testing.assert_close(autoencoder.encode(images, drawn), expected, rtol=1e-4, atol=1e-5)

    latents = torch.randn(2, 128, 2, 3)
    with torch.no_grad():
        expected = network.decode(pipeline._unpatchify_latents(latents * deviation + center)).sample
    decoded = autoencoder.decode(latents)
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert decoded.shape == (2, 3, 32, 48)


def test_statistics_of_the_patchified_form_are_not_rounded(tmp_path):
    network = flux2_with_statistics()
    network.save_pretrained(tmp_path)
    autoencoder = open_folded(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in autoencoder.network.parameters()} == {torch.bfloat16}
    assert torch.equal(autoencoder.mean.flatten(), network.bn.running_mean)
    exact = open_folded(tmp_path).encode(pictures())
    latents = autoencoder.encode(pictures())
    assert latents.dtype == torch.float32
    assert (latents - exact).norm() / exact.norm() < 0.05


def test_patchified_needs_pictures_of_whole_squares(tmp_path):
    flux2_with_statistics().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"24 x 48 pixels .* multiples of 16"):
        open_folded(tmp_path).encode(pictures(24, 48))


def test_weights_without_statistics_are_refused(tmp_path):
    network = make("flux2")
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("bn.")}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"bn\.(running|num)"):
        open_folded(tmp_path)


@pytest.mark.parametrize("kind", ["pixels", "flux1", "flux2", "repa_e", "dc_ae"])
def test_published_factor(kind, tmp_path):
    """As the network of that kind has it, folded or not."""
    config = Autoencoder(kind=kind)
    if kind == "pixels":
        assert published_factor(config) == open_autoencoder(config, CPU).factor
        return
    make(kind).save_pretrained(tmp_path)
    assert published_factor(config) == open_saved(kind, tmp_path).factor
    if kind == "flux2":
        assert published_factor(Autoencoder(kind=kind, form="patchified")) == open_folded(tmp_path).factor
    else:
        with pytest.raises(ValueError, match=f"form patchified belongs to kind flux2, but kind is {kind}"):
            Autoencoder(kind=kind, form="patchified")


def test_dc_ae_has_no_posterior(tmp_path):
    network = make("dc_ae")
    network.save_pretrained(tmp_path)
    autoencoder = open_saved("dc_ae", tmp_path)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stochastic) == (8, 32, False)
    images = pictures(64, 96)
    with torch.no_grad():
        expected = 0.41407 * network.encoder(images)
    torch.testing.assert_close(autoencoder.encode(images), expected, rtol=1e-5, atol=1e-6)
    noise = torch.randn_like(expected)
    assert torch.equal(autoencoder.encode(images, noise), autoencoder.encode(images))


@pytest.mark.parametrize(
    ("kind", "scale", "shift"), [("flux1", 0.3611, 0.1159), ("flux2", 0.18215, 0.0), ("dc_ae", 0.41407, 0.0)]
)
def test_decode_undoes_scale_and_shift(tmp_path, kind, scale, shift):
    network = make(kind)
    network.save_pretrained(tmp_path)
    autoencoder = open_saved(kind, tmp_path)
    raw = torch.randn(2, autoencoder.channels, 2, 3)
    with torch.no_grad():
        expected = network.decode(raw).sample
    decoded = autoencoder.decode(scale * (raw - shift))
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert decoded.shape == (2, 3, 2 * autoencoder.factor, 3 * autoencoder.factor)
    assert decoded.dtype == torch.float32


def test_decode_clamps(tmp_path):
    network = make("flux1")
    with torch.no_grad():
        network.decoder.conv_out.bias.copy_(torch.tensor([9.0, -9.0, 0.0]))
    network.save_pretrained(tmp_path)
    decoded = open_saved("flux1", tmp_path).decode(torch.zeros(1, 16, 2, 2))
    assert (decoded[:, 0] == 1).all()
    assert (decoded[:, 1] == -1).all()


def test_weights_under_vae_are_found(tmp_path):
    make("flux1").save_pretrained(tmp_path / "top")
    make("flux1").save_pretrained(tmp_path / "pipeline" / "vae")
    images = pictures()
    top, nested = (open_saved("flux1", tmp_path / name) for name in ("top", "pipeline"))
    assert torch.equal(top.encode(images), nested.encode(images))
    assert nested.identity == f"flux1 {tmp_path / 'pipeline'}"


@pytest.mark.parametrize(("kind", "expected"), [("flux1", torch.bfloat16), ("dc_ae", torch.float32)])
def test_dtype_of_weights_and_latents(tmp_path, kind, expected):
    make(kind).save_pretrained(tmp_path)
    autoencoder = open_saved(kind, tmp_path, dtype="bfloat16")
    parameters = list(autoencoder.network.parameters())
    assert {parameter.dtype for parameter in parameters} == {expected}
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not autoencoder.network.training
    images = pictures(64, 64)
    latents = autoencoder.encode(images)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    exact = open_saved(kind, tmp_path).encode(images)
    assert (latents - exact).norm() / exact.norm() < 0.05


def test_autocast_does_not_reach_the_network(tmp_path):
    make("flux1").save_pretrained(tmp_path)
    autoencoder = open_saved("flux1", tmp_path)
    images = pictures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = autoencoder.encode(images)
    assert torch.equal(under, autoencoder.encode(images))


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    make("flux1").save_pretrained(tmp_path)
    autoencoder = open_saved("flux1", tmp_path)
    with pytest.raises(UserError, match=r"30 x 48 pixels .* multiples of 8"):
        autoencoder.encode(pictures(30, 48))
    with pytest.raises(UserError, match=r"32 x 44 pixels .* multiples of 8"):
        autoencoder.encode(pictures(32, 44))


def test_noise_of_another_shape_is_refused(tmp_path):
    make("flux1").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(1, 16, 4, 6\).*\(2, 16, 4, 6\)"):
        open_saved("flux1", tmp_path).encode(pictures(), torch.randn(1, 16, 4, 6))


@pytest.mark.parametrize(("saved", "kind"), [("flux2", "flux1"), ("flux1", "flux2"), ("dc_ae", "flux1")])
def test_weights_of_another_class_are_refused(tmp_path, saved, kind):
    make(saved).save_pretrained(tmp_path)
    wanted, found = (network_of(Autoencoder(kind=name)).class_name for name in (kind, saved))
    with pytest.raises(UserError, match=f"kind {kind} needs {wanted};") as caught:
        open_saved(kind, tmp_path)
    assert f"holds weights of {found}," in str(caught.value)


def test_weights_without_a_class_name_are_accepted(tmp_path):
    make("flux1").save_pretrained(tmp_path)
    signed = open_saved("flux1", tmp_path).encode(pictures())
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["_class_name"]
    file.write_text(json.dumps(values))
    assert torch.equal(open_saved("flux1", tmp_path).encode(pictures()), signed)


def test_weights_that_lack_a_part_are_refused(tmp_path):
    network = make("flux1")
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {name: value for name, value in network.state_dict().items() if "encoder.conv_in" not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"encoder\.conv_in"):
        open_saved("flux1", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_damaged_weights_are_refused_in_one_line(tmp_path, content):
    make("flux1").save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"set conditioning\.autoencoder\.path") as caught:
        open_saved("flux1", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["flux1", "flux2", "repa_e", "dc_ae"])
def test_missing_weights_name_the_key(tmp_path, kind, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere.*set conditioning\.autoencoder\.path") as caught:
        open_saved(kind, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=network_of(Autoencoder(kind=kind)).source):
        open_autoencoder(Autoencoder(kind=kind), CPU)


def test_missing_package_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install") as caught:
        open_autoencoder(Autoencoder(kind="flux1"), CPU)
    assert "\n" not in str(caught.value)


FORMS = [("flux1", "raw"), ("flux2", "raw"), ("flux2", "patchified"), ("repa_e", "raw"), ("dc_ae", "raw")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_posterior_that_was_kept_gives_the_same_latents_without_the_network(tmp_path, kind, form, dtype):
    network = flux2_with_statistics() if kind == "flux2" else make(kind)
    network.save_pretrained(tmp_path)
    config = Autoencoder(kind=kind, form=form, path=str(tmp_path), dtype=dtype)
    autoencoder = open_autoencoder(config, CPU)
    images = pictures(64, 32, batch=3)
    noise = torch.randn(3, autoencoder.channels, 64 // autoencoder.factor, 32 // autoencoder.factor)
    latents = autoencoder.encode(images, noise)
    posterior = autoencoder.posterior(images)
    assert posterior.mean.dtype == (torch.float32 if kind == "dc_ae" else getattr(torch, dtype))
    assert (posterior.logvar is None) == (kind == "dc_ae")
    assert autoencoder.latent_shape(posterior) == latents.shape

    moments = torch.stack([x for x in posterior if x is not None], 1).contiguous()
    save_file({"moments": moments}, tmp_path / "kept")
    kept = load_file(tmp_path / "kept")["moments"]
    later = module.open_later(config, CPU, autoencoder.constants, None)
    found = later.sample(module.Posterior(kept[:, 0], kept[:, 1] if kept.shape[1] == 2 else None), noise)
    assert torch.equal(found, latents)
    assert "network" not in vars(later)
    assert (later.identity, later.channels, later.factor) == (
        autoencoder.identity,
        autoencoder.channels,
        autoencoder.factor,
    )
    assert torch.equal(later.decode(latents), autoencoder.decode(latents))
    assert "network" in vars(later)


def test_the_posterior_is_that_of_either_form_of_flux2(tmp_path):
    flux2_with_statistics().save_pretrained(tmp_path)
    raw, folded = open_saved("flux2", tmp_path, "bfloat16"), open_folded(tmp_path, "bfloat16")
    for mine, theirs in zip(raw.posterior(pictures()), folded.posterior(pictures()), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(raw.constants.norm_mean, folded.constants.norm_mean)
    assert torch.equal(raw.constants.norm_deviation, folded.constants.norm_deviation)
