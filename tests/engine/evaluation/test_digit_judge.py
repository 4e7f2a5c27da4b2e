"""The judge of small pictures: it learns, it repeats itself, and it tells good pictures from bad ones."""

import pytest
import torch

from millrace.engine.evaluation.digit_judge import accuracy, embeddings, quality, train_classifier
from millrace.engine.evaluation.frechet import frechet_distance, moments
from millrace.engine.util.errors import UserError


def bars(count, seed):
    """Pictures (N, 3, 8, 8) of a bright bar, upright (1) or level (0), in noise; and which it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    pictures = torch.rand(count, 3, 8, 8, generator=generator) * 0.4 - 1
    for picture, label in zip(pictures, labels, strict=True):
        place = int(torch.randint(2, 6, (), generator=generator))
        if label:
            picture[:, :, place] = 1
        else:
            picture[:, place] = 1
    return pictures, labels


@pytest.fixture(scope="module")
def judge():
    return train_classifier(*bars(200, 0), classes=2, seed=1, width=4, steps=60, batch=32, shift=1)


def test_learns_what_it_is_shown(judge):
    assert accuracy(judge, *bars(100, 1)) > 0.95
    assert not judge.training
    assert not any(p.requires_grad for p in judge.parameters())


def test_repeats_itself_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = (
        train_classifier(*bars(40, 0), classes=2, seed=7, width=4, steps=3, batch=8) for _ in range(2)
    )
    assert torch.equal(torch.rand(4), expected)
    other = train_classifier(*bars(40, 0), classes=2, seed=8, width=4, steps=3, batch=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_accuracy_counts(judge):
    pictures, labels = bars(300, 2)
    logits = judge(pictures)
    assert accuracy(judge, pictures, labels) == pytest.approx(
        (logits.argmax(1) == labels).double().mean().item()
    )
    assert accuracy(judge, pictures, 1 - logits.argmax(1)) == 0


def test_quality_falls_with_noise_and_with_wrong_captions(judge):
    real, _ = bars(300, 3)
    pictures, labels = bars(300, 4)
    good = quality(judge, pictures, labels, real)
    noisy = quality(judge, pictures + torch.randn_like(pictures), labels, real)
    wrong = quality(judge, pictures, 1 - labels, real)
    assert good.accuracy > 0.95
    assert noisy.frechet > 2 * good.frechet
    assert wrong.accuracy == pytest.approx(1 - good.accuracy)
    assert wrong.frechet == good.frechet


def test_quality_is_the_frechet_distance_of_embeddings_of_clipped_pictures(judge):
    real, _ = bars(50, 3)
    pictures, labels = bars(60, 4)
    expected = frechet_distance(
        *(moments(embeddings(judge, images)) for images in ((2 * pictures).clamp(-1, 1), real))
    )
    assert quality(judge, 2 * pictures, labels, real).frechet == pytest.approx(expected)


def test_pictures_that_are_not_finite_are_refused(judge):
    pictures, labels = bars(4, 0)
    pictures[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="1 of 4 samples are not finite"):
        quality(judge, pictures, labels, bars(4, 1)[0])


@pytest.mark.parametrize("count", [3, 0])
def test_every_picture_needs_a_label(count):
    pictures, labels = bars(4, 0)
    with pytest.raises(UserError, match="pictures with"):
        train_classifier(pictures[:count], labels[: 2 * count], classes=2, seed=0)
