import json

import pytest
import torch
import torch.nn.functional as F

from millrace.engine.encoders.small_classifier import SmallClassifier, load_classifier, save_classifier
from millrace.engine.util.errors import UserError

KEY = "alignment.teacher.path"


def small(classes=10, width=4):
    torch.manual_seed(0)
    return SmallClassifier(classes, width)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 24), (18, 13)])
def test_shapes(height, width):
    classifier = small()
    images = torch.rand(2, 3, height, width) * 2 - 1
    assert classifier(images).shape == (2, 10)
    assert classifier.features(images).shape == (2, 16, -(-height // 4), -(-width // 4))
    torch.testing.assert_close(classifier.embedding(images), classifier.features(images).flatten(2).mean(2))
    assert classifier.dim == 16


def test_a_picture_does_not_depend_on_the_others_of_its_batch():
    classifier, images = small(), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(classifier(images)[1:2], classifier(images[1:2]))


def test_learns_digits_in_seconds():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    pictures = F.interpolate(pictures, size=(16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    train, held_out = order[:1400], order[1400:]
    classifier = SmallClassifier(10)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=5e-3)
    steps = 250
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        loss = F.cross_entropy(classifier(pictures[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = classifier(pictures[held_out]).argmax(1) == labels[held_out]
    assert right.float().mean() > 0.95


def test_round_trip_is_exact_and_frozen(tmp_path):
    classifier, images = small(classes=7), torch.rand(2, 3, 16, 16)
    loaded = load_classifier(save_classifier(classifier, tmp_path / "judge"), KEY)
    assert torch.equal(loaded(images), classifier(images))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_classifier(tmp_path / "judge", KEY, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def spoil_kind(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"kind": "dinov2"}))


def spoil_width(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"width": 8}))


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_kind,
        spoil_width,
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
    ],
)
def test_a_folder_that_holds_no_classifier_is_refused_in_one_line(tmp_path, spoil):
    folder = save_classifier(small(), tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=rf"cannot load the classifier .*; set {KEY}") as caught:
        load_classifier(folder, KEY)
    assert "\n" not in str(caught.value)
