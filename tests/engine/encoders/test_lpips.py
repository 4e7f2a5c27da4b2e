"""LPIPS against its formula with the same weights in float64, and every form its weights come in."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from millrace.engine.config.objective import SMALLEST_VGG
from millrace.engine.encoders.lpips import SMALLEST, WIDTHS, Lpips, load_lpips, tiny_lpips
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
# torchvision's numbering of VGG16's convolutions, one tuple a stage.
LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lpips(tmp_path_factory.mktemp("lpips"))


def published(folder):
    """The tiny weights under torchvision's names, and under those of the lpips package."""
    state = load_file(folder / "lpips.safetensors")
    vgg, whole, heads = {}, {}, {}
    for i, layers in enumerate(LAYERS):
        for j, layer in enumerate(layers):
            for kind in ("weight", "bias"):
                value = state[f"stages.{i}.{j}.{kind}"]
                vgg[f"features.{layer}.{kind}"] = value
                whole[f"net.slice{i + 1}.{layer}.{kind}"] = value
        heads[f"lin{i}.model.1.weight"] = state[f"heads.{i}"][None, :, None, None]
    return vgg, heads, whole | heads | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}


def distance(folder, x, y):
    """The definition, in float64, one position at a time of what it sums over."""
    vgg, heads, _ = published(folder)
    total = torch.zeros(len(x), dtype=torch.float64)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((z.double() - shift[:, None, None]) / scale[:, None, None] for z in (x, y))
    for i, layers in enumerate(LAYERS):
        if i:
            a, b = (F.max_pool2d(z, kernel_size=2, stride=2) for z in (a, b))
        for layer in layers:
            weight, bias = (vgg[f"features.{layer}.{kind}"].double() for kind in ("weight", "bias"))
            a, b = (F.conv2d(z, weight, bias, padding=1).clamp_min(0) for z in (a, b))
        unit = [z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b)]
        gap = (unit[0] - unit[1]).pow(2)
        head = heads[f"lin{i}.model.1.weight"].double()
        total = total + F.conv2d(gap, head).mean(dim=(1, 2, 3))
    return total


def pictures(seed, height=32, width=48, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def test_value_and_gradient_are_the_definition(folder):
    network = load_lpips(str(folder), CPU, torch.float32)
    x, y = pictures(0).requires_grad_(), pictures(1)
    weights = torch.tensor([1.0, -2.0, 0.5])
    found = network(x, y)
    exact = x.detach().double().requires_grad_()
    wanted = distance(folder, exact, y)
    torch.testing.assert_close(found.detach(), wanted.detach().float(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (exact_gradient,) = torch.autograd.grad((wanted * weights).sum(), exact)
    torch.testing.assert_close(gradient, exact_gradient.float(), rtol=1e-3, atol=1e-7)
    assert found.min() > 1e-3


def test_only_the_first_gets_a_gradient(folder):
    network = load_lpips(str(folder), CPU, torch.float32)
    x, y = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    network(x, y).sum().backward()
    assert y.grad is None
    assert x.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


def test_equal_pictures_have_no_distance(folder):
    x = pictures(0)
    assert float(load_lpips(str(folder), CPU, torch.float32)(x, x).abs().max()) == 0


def test_positions_without_activation_have_a_gradient(folder):
    """Where every channel of a position is 0, |f| has no derivative; the loss must not become NaN."""
    network = load_lpips(str(folder), CPU, torch.float32)
    with torch.no_grad():
        network.stages[-1][-1].bias.fill_(-100.0)
    x = pictures(0).requires_grad_()
    found = network(x, pictures(1))
    found.sum().backward()
    assert x.grad.isfinite().all()
    assert found.isfinite().all()


def test_bf16_is_near_and_autocast_changes_nothing(folder):
    exact = load_lpips(str(folder), CPU, torch.float32)
    rounded = load_lpips(str(folder), CPU, torch.bfloat16)
    x, y = pictures(0), pictures(1)
    assert rounded.stages[0][0].weight.dtype == torch.bfloat16
    assert rounded.heads[0].dtype == torch.float32
    found = rounded(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(x, y), rtol=0.05, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact(x, y), exact(x.clone(), y))
        under = exact(x, y)
    assert torch.equal(under, exact(x, y))


def test_every_form_of_the_weights_is_the_same_network(folder, tmp_path):
    vgg, heads, whole = published(folder)
    parts = tmp_path / "parts"
    parts.mkdir()
    classifier = {"classifier.0.weight": torch.zeros(4, 4)}
    torch.save(vgg | classifier, parts / "vgg16-397923af.pth")
    torch.save(heads, parts / "vgg.pth")
    torch.save(whole, tmp_path / "package.pth")
    save_file(vgg | heads, tmp_path / "one.safetensors")
    x, y = pictures(0), pictures(1)
    wanted = load_lpips(str(folder), CPU, torch.float32)(x, y)
    sources = (parts, tmp_path / "package.pth", tmp_path / "one.safetensors", folder / "lpips.safetensors")
    for source in sources:
        assert torch.equal(load_lpips(str(source), CPU, torch.float32)(x, y), wanted), source


def test_the_published_widths_are_vgg16s():
    """14,714,688 parameters of the convolutions, as torchvision's vgg16 has without its classifier."""
    with torch.device("meta"):
        network = Lpips()
    assert sum(p.numel() for p in network.stages.parameters()) == 14_714_688
    assert [len(head) for head in network.heads] == list(WIDTHS)


def test_weights_that_are_not_all_there_are_refused(folder, tmp_path):
    vgg, heads, _ = published(folder)
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    save_file(vgg, tmp_path / "no_heads.safetensors")
    save_file(heads, tmp_path / "no_vgg.safetensors")
    wide = {**vgg, **heads, "features.2.weight": torch.zeros(9, 9, 3, 3)}
    save_file(wide, tmp_path / "misshapen.safetensors")
    reasons = {
        "nowhere": "cannot load",
        "damaged.safetensors": "cannot load",
        "damaged.pth": "cannot load",
        "tensor.pth": "no state dict",
        "empty": "holds neither",
        "no_heads.safetensors": "lacks 5 weights of LPIPS, 'heads.0'",
        "no_vgg.safetensors": "lacks 26 weights of LPIPS",
        "misshapen.safetensors": "cannot load",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=rf"{reason}.*objective\.lpips\.path") as caught:
            load_lpips(str(tmp_path / name), CPU, torch.float32)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_pictures_that_vanish_are_refused(folder):
    network = load_lpips(str(folder), CPU, torch.float32)
    assert network(pictures(0, 16, 16), pictures(1, 16, 16)).min() > 0
    with pytest.raises(UserError, match=r"15 x 48 pixels, it needs 16; raise objective\.lpips\.resize"):
        network(pictures(0, 15), pictures(1, 15))
    assert SMALLEST == SMALLEST_VGG
