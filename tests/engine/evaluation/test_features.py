"""Feature networks against their classes called by hand, preprocessing against transformers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionModelWithProjection, Dinov2WithRegistersModel

from millrace.engine.encoders.teacher import vision_entry
from millrace.engine.evaluation import features as module
from millrace.engine.evaluation.features import open_network, tiny_features, tiny_networks
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny_features(tiny_networks(tmp_path_factory.mktemp("features")))


def pictures(height, width, count=3):
    generator = torch.Generator().manual_seed(height + width)
    coarse = torch.rand(count, 3, 6, 5, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def test_constants_of_prx():
    assert (module.CLIP, module.CLIP_SIZE) == ("openai/clip-vit-large-patch14-336", 336)
    large = vision_entry("dinov2").large.source
    assert (large, module.DINO_SIZE) == ("facebook/dinov2-with-registers-large", 518)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (16, 16), (40, 28), (61, 97), (300, 70)])
def test_clip_sees_what_its_own_preprocessing_shows_it(paths, height, width):
    processor_class = _pil_processor()
    processor = processor_class(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    shown = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures(height, width)]
    wanted = torch.tensor(np.stack(processor(images=shown)["pixel_values"]))
    network = open_network("cmmd", paths["cmmd"], "key", CPU)
    plain = CLIPVisionModelWithProjection.from_pretrained(paths["cmmd"], dtype=torch.float32).eval()
    with torch.no_grad():
        embedded = plain(pixel_values=wanted).image_embeds
    found = network(pictures(height, width))
    torch.testing.assert_close(found, embedded / embedded.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def _pil_processor():
    """Pillow's form of CLIP's preprocessing, by the names that it has had in transformers 5."""
    import transformers

    found = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    assert "Fast" not in found.__name__
    return found


@pytest.mark.parametrize(("height", "width"), [(56, 56), (32, 48), (128, 100)])
def test_dino_sees_bicubic_without_antialiasing(paths, height, width):
    network = open_network("dino_mmd", paths["dino_mmd"], "key", CPU)
    x = F.interpolate(pictures(height, width) / 255, (56, 56), mode="bicubic", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    plain = Dinov2WithRegistersModel.from_pretrained(paths["dino_mmd"], dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = plain((x - mean[:, None, None]) / std[:, None, None]).pooler_output
    wanted = tokens / tokens.norm(dim=1, keepdim=True)
    torch.testing.assert_close(network(pictures(height, width)), wanted, rtol=1e-4, atol=1e-5)


def test_what_they_say_of_themselves(paths):
    networks = {name: open_network(name, path, "key", CPU) for name, path in paths.items()}
    assert {name: network.dim for name, network in networks.items()} == {
        "fid": 256,
        "cmmd": 24,
        "dino_mmd": 32,
    }
    assert not any(network.published for network in networks.values())
    assert len({network.identity for network in networks.values()}) == 3
    for network in networks.values():
        found = network(pictures(20, 20, count=2))
        assert found.shape == (2, network.dim)
        assert found.dtype == torch.float32


def test_other_weights_are_another_network(paths, tmp_path):
    network = CLIPVisionModelWithProjection.from_pretrained(paths["cmmd"])
    network.visual_projection.weight.data += 1
    network.save_pretrained(tmp_path)
    first, second = (open_network("cmmd", str(path), "key", CPU) for path in (paths["cmmd"], tmp_path))
    assert first.identity != second.identity


def test_autocast_does_not_reach_them(paths):
    for name, path in paths.items():
        network = open_network(name, path, "key", CPU)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(pictures(20, 20))
        assert torch.equal(found, network(pictures(20, 20)))


@pytest.mark.parametrize(
    ("metric", "wrong", "message"),
    [
        ("fid", None, "FID needs the weights of its Inception: set the.key to weights-inception-2015"),
        ("fid", "nowhere.pth", "cannot load 'nowhere.pth'"),
        ("cmmd", "/nowhere", "cannot load '/nowhere'"),
        ("dino_mmd", "cmmd", "holds a clip_vision_model, not a dinov2"),
        ("cmmd", "dino_mmd", "lacks"),
    ],
)
def test_refusals(paths, metric, wrong, message):
    with pytest.raises(UserError) as caught:
        open_network(metric, paths.get(wrong, wrong), "the.key", CPU)
    assert message in str(caught.value)
    assert "the.key" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fid_of_prx_is_of_negatives(paths):
    """What torchmetrics makes of bytes with `normalize=True`: `(x * 255).byte()`."""
    x = pictures(24, 20).to(torch.uint8)
    x[0, 0, 0, :3] = torch.tensor([0, 1, 128], dtype=torch.uint8)
    theirs = (x * 255).byte()
    assert theirs[0, 0, 0, :3].tolist() == [0, 255, 128]
    plain, negated = (open_network(metric, paths["fid"], "key", CPU) for metric in ("fid", "fid_prx"))
    assert torch.equal(negated(x), plain(theirs))
    assert not torch.equal(negated(x), plain(x))
    assert negated.identity == plain.identity
    assert negated.preprocessing != plain.preprocessing  # so that statistics are not taken for each other's
