"""FID's Inception against torch-fidelity's, its resizing against TensorFlow's definition, and its files."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from millrace.engine.evaluation import inception as module
from millrace.engine.evaluation.inception import (
    Inception,
    load_inception,
    resize_as_tensorflow,
    tiny_inception,
)
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")

# FeatureExtractorInceptionV3 of torch-fidelity 0.4.0, INPUT_IMAGE_SIZE 75, with the weights of `filled` and
# `two_pictures`: features at PLACES (the ends of the last block's branches), mean and mean square.
PLACES = [0, 319, 320, 1087, 1088, 1855, 1856, 2047]
THEIRS = [
    [1.2517718, 0.0, 0.68096125, 0.76898229, 0.0, 0.0, 0.42908752, 1.14584422],
    [1.32069421, 0.0, 0.67700791, 0.72619754, 0.0, 0.0, 0.42175093, 1.16653383],
]
THEIR_MEAN = [0.21308304720123772, 0.21056350179435412]
THEIR_SQUARE = [0.1888058841858144, 0.18328341241897747]


def filled(share=1.0):
    network, generator = Inception(share, 75), torch.Generator().manual_seed(0)
    for name, value in sorted(network.state_dict().items()):
        if name.endswith("conv.weight"):
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bn.bias", "running_mean")):
            value.normal_(std=0.1, generator=generator)
    return network.eval()


def two_pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 40, 64), dtype=torch.uint8, generator=generator)


def test_computes_what_torch_fidelity_computes():
    with torch.no_grad():
        found = filled()(two_pictures())
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[:, PLACES], torch.tensor(THEIRS), rtol=1e-4, atol=1e-5)
    assert found.double().mean(1).tolist() == pytest.approx(THEIR_MEAN, rel=1e-5)
    assert found.double().square().mean(1).tolist() == pytest.approx(THEIR_SQUARE, rel=1e-5)


def test_published_shape():
    with torch.device("meta"):
        network = Inception()
    assert (network.size, network.dim) == (299, 2048)
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_6e.branch7x7dbl_2.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Conv2d_4a_3x3.bn.running_var"] == (192,)


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 9), (9, 5, 4), (3, 3, 3)])
def test_resizes_as_tensorflow_1(height, width, size):
    x = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(2))
    found = resize_as_tensorflow(x, size)
    for row in range(size):
        for column in range(size):
            y, z = row * height / size, column * width / size
            top, left = int(y + 1e-6), int(z + 1e-6)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, along = y - top, z - left
            upper = x[..., top, left] * (1 - along) + x[..., top, right] * along
            lower = x[..., bottom, left] * (1 - along) + x[..., bottom, right] * along
            wanted = upper * (1 - down) + lower * down
            torch.testing.assert_close(found[..., row, column], wanted, rtol=1e-5, atol=1e-5)


def published(path, network):
    """The file as torch-fidelity publishes it: with the classifier."""
    torch.save(network.state_dict() | {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}, path)
    return path


def test_reads_the_published_form(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIZE", 75)
    network = filled(1 / 8)
    file = published(tmp_path / module.PUBLISHED[0], network)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for path in (file, tmp_path):
        found, sha256 = load_inception(str(path), "key", CPU)
        assert sha256 == digest
        assert torch.equal(found(two_pictures()), network(two_pictures()))
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


def test_reads_safetensors(tmp_path):
    folder = tiny_inception(tmp_path / "tiny")
    network, _ = load_inception(str(folder), "key", CPU)
    assert (network.size, network.dim) == (75, 256)


def test_refusals(tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as caught:
            load_inception(str(path), "the.key", CPU)
        assert "set the.key to weights-inception-2015-12-05-6726825d.pth" in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file" in refusal(tmp_path / "nowhere.pth")
    (tmp_path / "folder").mkdir()
    assert "holds no weights of Inception" in refusal(tmp_path / "folder")
    (tmp_path / "text.pth").write_text("no weights")
    assert "cannot load" in refusal(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "it is no state dict" in refusal(tmp_path / "list.pth")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "lacks 470 of 470 weights of FID's Inception" in refusal(tmp_path / "other.safetensors")
    state = filled(1 / 8).state_dict()
    del state["Mixed_6a.branch3x3.bn.bias"]
    torch.save(state, tmp_path / "part.pth")
    assert "lacks 1 of" in refusal(tmp_path / "part.pth")
    with pytest.raises(ValueError, match="the network needs 75 pixels"):
        Inception(1.0, 74)
