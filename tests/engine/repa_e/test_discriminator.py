"""The discriminator against its layers written out, and its weights on disk."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from millrace.engine.repa_e.discriminator import Discriminator
from millrace.engine.util.errors import UserError


def make(width=4, seed=0):
    discriminator = Discriminator(width)
    discriminator.init_weights(torch.Generator().manual_seed(seed))
    return discriminator


def pictures(edge=32, seed=1):
    return torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def written_out(state, x):
    """The layers of VQGAN's `NLayerDiscriminator` with its defaults, in training mode."""
    x = F.leaky_relu(F.conv2d(x, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
    for place, stride in ((2, 2), (5, 2), (8, 1)):
        x = F.conv2d(x, state[f"main.{place}.weight"], None, stride, 1)
        weight, bias = state[f"main.{place + 1}.weight"], state[f"main.{place + 1}.bias"]
        x = F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), 0.2)
    return F.conv2d(x, state["main.11.weight"], state["main.11.bias"], 1, 1)


def test_computes_its_layers():
    discriminator = make().double()
    x = pictures().double()
    torch.testing.assert_close(discriminator(x), written_out(discriminator.state_dict(), x))
    assert discriminator(pictures(64).double()).shape == (2, 1, 6, 6)


def test_evaluation_is_the_same_as_training():
    discriminator = make()
    assert torch.equal(discriminator.train()(pictures()), discriminator.eval()(pictures()))


def test_a_logit_sees_seventy_pixels():
    discriminator = make().double()
    for module in discriminator.modules():  # statistics would carry every pixel to every logit
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x: x
    x = pictures(128).double().requires_grad_()
    discriminator(x)[0, 0, 7, 7].backward()
    touched = x.grad[0].abs().sum((0, 1)).nonzero().flatten()
    assert int(touched[-1] - touched[0]) + 1 == 70


def test_widths_and_initial_values():
    discriminator = make(64)
    shapes = [tuple(m.weight.shape[:2]) for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert float(module.weight.detach().mean()) == pytest.approx(1, abs=0.01)
            assert not module.bias.any()
    same = make(64).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in discriminator.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_published_weights_load_without_their_statistics(tmp_path, suffix):
    source, path = make(seed=3), tmp_path / f"discriminator.{suffix}"
    statistics = {"main.3.running_mean": torch.zeros(8), "main.3.num_batches_tracked": torch.tensor(5)}
    state = source.state_dict() | statistics
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    loaded = make()
    loaded.load_file(str(path))
    assert torch.equal(loaded(pictures()), source(pictures()))


def test_weights_of_another_width_are_refused(tmp_path):
    save_file(make(8).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"does not hold this discriminator.*discriminator_width") as error:
        make().load_file(str(tmp_path / "wide.safetensors"))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="discriminator_path"):
        make().load_file(str(tmp_path / "absent.safetensors"))
