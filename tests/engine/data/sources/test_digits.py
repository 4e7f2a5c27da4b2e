import math

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from millrace.engine.config import Data
from millrace.engine.data import open_source
from millrace.engine.data.crop import evaluation_view
from millrace.engine.data.sources.digits import NAMES, WORDS, DigitsSource, measures, most_typical, thirds


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def moments(picture):
    """The measures of one picture (h, w), pixel by pixel in exact order of their definitions."""
    h, w = picture.shape
    ink = {(x - (w - 1) / 2, y - (h - 1) / 2): float(picture[y, x]) for y in range(h) for x in range(w)}
    mass = math.fsum(ink.values())
    cx = math.fsum(v * x for (x, _), v in ink.items()) / mass
    cy = math.fsum(v * y for (_, y), v in ink.items()) / mass

    def central(a, b):
        return math.fsum(v * (x - cx) ** a * (y - cy) ** b for (x, y), v in ink.items()) / mass

    r2 = central(2, 0) + central(0, 2)
    r4 = central(4, 0) + 2 * central(2, 2) + central(0, 4)
    return {
        "weight": mass / (h * w),
        "slant": -central(1, 1) / central(0, 2),
        "width": math.sqrt(central(2, 0)),
        "height": math.sqrt(central(0, 2)),
        "right": cx,
        "down": cy,
        "spread": r4 / r2**2,
        "taper": central(2, 1) / (central(2, 0) * math.sqrt(central(0, 2))),
        "bulge": central(1, 2) / (central(0, 2) * math.sqrt(central(2, 0))),
    }


def drawn(*rows):
    """A picture (1, h, w) from rows of text; # is ink."""
    return np.array([[[16.0 if mark == "#" else 0.0 for mark in row] for row in rows]])


def test_the_parts_are_all_digits_without_overlap(digits):
    parts = {name: DigitsSource(name) for name in ("train", "test", "all")}
    keys = {name: [part.key(i) for i in range(len(part))] for name, part in parts.items()}
    assert {name: len(found) for name, found in keys.items()} == {"train": 1438, "test": 359, "all": 1797}
    assert keys["all"] == [f"digits/{i:04d}" for i in range(1797)]
    assert keys["test"] == [f"digits/{i:04d}" for i in range(4, 1797, 5)]
    assert sorted(keys["train"] + keys["test"]) == keys["all"]
    for part in parts.values():
        for i in range(0, len(part), 97):
            place = int(part.key(i).removeprefix("digits/"))
            assert part.label(i) == digits.target[place]
            np.testing.assert_array_equal(part.ink()[i], digits.images[place])
        assert {part.label(i) for i in range(len(part))} == set(range(10))


def test_the_configuration_trains_on_the_training_part():
    source = open_source(Data(source="digits", resolution=32))
    assert isinstance(source, DigitsSource)
    assert len(source) == 1438
    view = evaluation_view(source.image(0), Data(source="digits", resolution=32), patch=4)
    assert view.shape == (3, 32, 32)
    assert view.min() == -1
    assert view.max() > 0.9


def test_pictures_are_the_scans_enlarged(digits):
    source = DigitsSource("all")
    for i in range(0, 1797, 61):
        image = source.image(i)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        pixels = np.asarray(image).astype(float)
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert (pixels[..., 0] == pixels[..., 2]).all()
        # Shrinking by averaging gives the scan back, but for the overshoot of Lanczos.
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.corrcoef(small.ravel(), digits.images[i].ravel())[0, 1] > 0.97
    assert source.image(5) is source.image(5)


def test_measures_are_moments_of_the_scan(digits):
    found = measures(digits.images)
    assert list(found) == list(WORDS)
    for i in range(0, 1797, 29):
        expected = moments(digits.images[i])
        for name in WORDS:
            assert found[name][i] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), (name, i)


def test_measures_grow_with_what_they_are_named_for():
    def of(*rows):
        return {name: float(values[0]) for name, values in measures(drawn(*rows)).items()}

    stroke = of("....", ".#..", ".#..", ".#..")
    assert of("....", ".##.", ".##.", ".##.")["weight"] == 2 * stroke["weight"]
    assert of("..#.", ".#..", "#...", "....")["slant"] == pytest.approx(1)
    assert of("#...", ".#..", "..#.", "....")["slant"] == pytest.approx(-1)
    assert stroke["slant"] == 0
    wide, narrow = of("#..#", "#..#"), of(".##.", ".##.")
    assert wide["width"] == pytest.approx(1.5)
    assert narrow["width"] == pytest.approx(0.5)
    assert of(".#", "..", "..", ".#")["height"] == pytest.approx(1.5)
    assert of("...#", "...#")["right"] == 1.5 == -of("#...", "#...")["right"]
    assert of("..", "..", "..", "##")["down"] == 1.5 == -of("##", "..", "..", "..")["down"]
    ring, core = of("###", "#.#", "###"), of("#..", "###", "..#")
    assert core["spread"] > ring["spread"] >= 1
    assert of(".#.", "###", "...")["taper"] > 0 > of("###", ".#.", "...")["taper"]
    assert of(".#.", "##.", ".#.")["bulge"] > 0 > of(".#.", ".##", ".#.")["bulge"]


def test_measures_of_degenerate_pictures_are_numbers():
    blank, dot = drawn("...", "...", "..."), drawn("...", "..#", "...")
    assert all(values[0] == 0 for values in measures(blank).values())
    found = {name: values[0] for name, values in measures(dot).items()}
    assert found == dict.fromkeys(WORDS, 0) | {"weight": 16 / 9, "right": 1}
    column = measures(drawn(".#.", ".#.", ".#."))
    assert all(np.isfinite(values).all() for values in column.values())


def test_long_captions_say_the_thirds_of_the_training_part(digits):
    source = DigitsSource("all")
    values = measures(digits.images)
    train = [i for i in range(1797) if i % 5 != 4]
    levels = thirds(digits.images)
    for name, words in WORDS.items():
        low, high = (np.percentile(values[name][train], 100 * q) for q in (1 / 3, 2 / 3))
        for i in range(1797):
            value = values[name][i]
            third = 0 if value < low else 1 if value < high else 2
            if min(abs(value - low), abs(value - high)) > 1e-9:
                assert levels[name][i] == third
            assert f", {words[levels[name][i]]}" in source.captions(i).long
        shares = np.bincount(levels[name][train], minlength=3) / len(train)
        assert np.abs(shares - 1 / 3).max() < 0.02, name


def test_captions_name_the_digit_and_long_begins_like_short(digits):
    source = DigitsSource("all")
    for i in range(1797):
        caption = source.captions(i)
        assert caption.short == f"a handwritten {NAMES[digits.target[i]]}"
        assert caption.long.startswith(caption.short + ", ")
        assert caption.long.count(",") == len(WORDS)
        assert len(caption.long.replace(",", " ,").split()) <= 30


def test_no_word_serves_two_measures():
    """So that a tower that does not see word order still tells them apart."""
    vocabularies = [{word for phrase in phrases for word in phrase.split()} for phrases in WORDS.values()]
    vocabularies.append({"a", "handwritten", *NAMES})
    every = [word for vocabulary in vocabularies for word in vocabulary]
    assert len(every) == len(set(every))
    for phrases in WORDS.values():
        assert len({frozenset(phrase.split()) for phrase in phrases}) == 3


def test_long_captions_determine_much_more_of_a_held_out_picture():
    """Share of the variance of unseen pictures that a ridge regression from the caption's words explains."""
    train, test = DigitsSource("train"), DigitsSource("test")

    def explained(words):
        def rows(source):
            captions = [words(source.captions(i)) for i in range(len(source))]
            return np.array([[word in caption for word in vocabulary] for caption in captions], float)

        vocabulary = sorted({word for i in range(len(train)) for word in words(train.captions(i))})
        x, pixels = rows(train), train.ink().reshape(len(train), -1)
        mean = pixels.mean(0)
        weight = np.linalg.solve(x.T @ x + 3 * np.eye(x.shape[1]), x.T @ (pixels - mean))
        target = test.ink().reshape(len(test), -1) - mean
        return 1 - ((target - rows(test) @ weight) ** 2).sum() / (target**2).sum()

    short = explained(lambda caption: set(caption.short.split()))
    long = explained(lambda caption: set(caption.long.replace(",", " ").split()))
    assert 0.35 < short < 0.5
    assert long > short + 0.12


def test_the_most_typical_are_nearest_to_the_mean_of_their_digit(digits):
    source = DigitsSource("train")
    keys = most_typical(source, 0.1)
    places = [int(key.removeprefix("digits/")) for key in keys]
    assert places == sorted(places)
    train = np.array([i for i in range(1797) if i % 5 != 4])
    for digit in range(10):
        members = train[digits.target[train] == digit]
        mean = digits.images[members].mean(0)
        distance = {i: math.sqrt(((digits.images[i] - mean) ** 2).sum()) for i in members}
        kept = [i for i in places if digits.target[i] == digit]
        assert len(kept) == round(0.1 * len(members))
        left = [distance[i] for i in members if i not in kept]
        assert max(distance[i] for i in kept) <= min(left)
    assert len(most_typical(source, 1e-9)) == 10
    assert most_typical(source, 1.0) == [source.key(i) for i in range(len(source))]
