"""Handwritten digits of scikit-learn as captioned pictures: 1,797 scans of 8 x 8 pixels.

They are real data with a measurable content, small enough to train on without a GPU: a classifier says
whether a sample shows the digit that was asked for, and moments say whether it leans as the caption says. The
file ships inside scikit-learn (the test part of "Optical Recognition of Handwritten Digits" of the UCI
repository, E. Alpaydin and C. Kaynak); nothing is downloaded.

Captions are computed from the pixels. The short one names the digit. The long one adds nine measures, each in
one of three words; a measure's two bounds are the terciles of the training pictures. No word serves two
measures, so that even a text encoder without word order can read them:

    a handwritten seven, bold, tilted rightward, slim, tall, shifted left, ...
"""

import gzip
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from millrace.engine.config import Data
from millrace.engine.config.data import Part
from millrace.engine.data.sources.builtin import installed
from millrace.engine.data.sources.pictures import Captions, OpenSource, Source

EDGE = 32
"""Pixels of a picture's edge."""
HELD_OUT = 5
"""Picture i of the 1,797 is held out if i mod 5 is 4: 359 pictures that are never trained on. They are unseen
pictures, not the hands of unseen writers."""
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS: dict[str, tuple[str, str, str]] = {
    "weight": ("thin", "medium", "bold"),
    "slant": ("tilted leftward", "upright", "tilted rightward"),
    "width": ("slim", "normal", "wide"),
    "height": ("squat", "regular", "tall"),
    "right": ("shifted left", "centred", "shifted right"),
    "down": ("placed high", "level", "placed low"),
    "spread": ("ringlike", "mixed", "compact"),
    "taper": ("broad top", "even", "broad base"),
    "bulge": ("swelling westward", "balanced", "swelling eastward"),
}
"""For each measure of `measures` the words for its low, middle and high third of the training pictures."""


class _Digits(NamedTuple):
    ink: np.ndarray
    """(1797, 8, 8) float64 in [0, 16]: 0 is paper."""
    labels: np.ndarray
    """(1797,) int64."""


def measures(ink: np.ndarray) -> dict[str, np.ndarray]:
    """Moments of pictures `ink` (N, h, w) >= 0; each value is (N,) float64, lengths in pixels.

    With m the sum of a picture's ink, E the mean over its pixels weighted by ink, and x to the right and y
    downward from the centre of ink (cx, cy):

        weight  m / (h w), mean ink
        slant   -E[xy] / E[y^2], shift to the right per pixel upward
        width   sqrt E[x^2]
        height  sqrt E[y^2]
        right   cx from the picture's middle
        down    cy from the picture's middle
        spread  E[r^4] / E[r^2]^2 with r^2 = x^2 + y^2: 1 is a ring, more a core with outliers
        taper   E[x^2 y] / (E[x^2] height): above 0 it is wider below than above
        bulge   E[x y^2] / (E[y^2] width): above 0 it is taller on the right than on the left

    A ratio whose denominator is 0 (a blank picture, a straight line) is 0.
    """
    _, h, w = ink.shape
    mass = ink.sum((1, 2))
    p = _ratio(ink, mass[:, None, None])
    columns, rows = np.arange(w) - (w - 1) / 2, np.arange(h)[:, None] - (h - 1) / 2

    def mean(values: np.ndarray) -> np.ndarray:
        return (p * values).sum((1, 2))

    cx, cy = mean(columns), mean(rows)
    x, y = columns - cx[:, None, None], rows - cy[:, None, None]
    xx, yy, square = mean(x * x), mean(y * y), x * x + y * y
    return {
        "weight": mass / (h * w),
        "slant": _ratio(-mean(x * y), yy),
        "width": np.sqrt(xx),
        "height": np.sqrt(yy),
        "right": cx,
        "down": cy,
        "spread": _ratio(mean(square * square), mean(square) ** 2),
        "taper": _ratio(mean(x * x * y), xx * np.sqrt(yy)),
        "bulge": _ratio(mean(x * y * y), yy * np.sqrt(xx)),
    }


class DigitsSource:
    """The digits of one part: `train` is what `data.source: digits` trains on, `test` the held-out ones.

    Keys are "digits/0000" to "digits/1796", the place in scikit-learn's file. Pictures are 32 x 32, white ink
    on black, enlarged once by Lanczos.
    """

    def __init__(self, split: Literal["train", "test", "all"] = "train") -> None:
        held_out = np.arange(len(_digits().labels)) % HELD_OUT == HELD_OUT - 1
        chosen = {"train": ~held_out, "test": held_out, "all": np.full_like(held_out, True)}[split]
        self._places = np.flatnonzero(chosen)
        self._captions = [_captions()[place] for place in self._places]
        self._images = [_enlarged(_digits().ink[place]) for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return f"digits/{self._places[index]:04d}"

    def captions(self, index: int) -> Captions:
        return self._captions[index]

    def image(self, index: int) -> Image.Image:
        return self._images[index]

    def label(self, index: int) -> int:
        """The digit, 0 to 9."""
        return int(_digits().labels[self._places[index]])

    def ink(self) -> np.ndarray:
        """All pictures as scanned: (N, 8, 8) float64 in [0, 16]."""
        return _digits().ink[self._places]


def most_typical(source: DigitsSource, share: float) -> list[str]:
    """Keys of the pictures nearest (L2 over the 8 x 8 scan) to the mean of their digit, for `data.keys`.

    Of every digit it takes the `share` of its pictures that is nearest, at least one; in order of the source.
    """
    ink = source.ink()
    labels = np.array([source.label(i) for i in range(len(source))])
    kept: list[int] = []
    for digit in np.unique(labels):
        members = np.flatnonzero(labels == digit)
        distance = np.linalg.norm((ink[members] - ink[members].mean(0)).reshape(len(members), -1), axis=1)
        count = max(1, round(share * len(members)))
        kept += members[np.argsort(distance, kind="stable")[:count]].tolist()
    return [source.key(i) for i in sorted(kept)]


def thirds(ink: np.ndarray) -> dict[str, np.ndarray]:
    """For each measure of pictures `ink` (N, 8, 8) its third of the training pictures: (N,) int64 in 0..2.

    A value on a bound belongs to the higher third. This is what a long caption says, as numbers; `ink` may be
    pictures of a model, scanned to 8 x 8 and [0, 16].
    """
    return {
        name: np.searchsorted(_bounds()[name], values, side="right") for name, values in measures(ink).items()
    }


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


@cache
def _digits() -> _Digits:
    with gzip.open(_file(), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    return _Digits(table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64))


def _file() -> Path:
    return installed("sklearn", "datasets/data/digits.csv.gz")


@cache
def _bounds() -> dict[str, np.ndarray]:
    """The two terciles (2,) of each measure over the training pictures."""
    ink = _digits().ink
    train = ink[np.arange(len(ink)) % HELD_OUT != HELD_OUT - 1]
    return {name: np.quantile(values, (1 / 3, 2 / 3)) for name, values in measures(train).items()}


@cache
def _captions() -> list[Captions]:
    ink, labels = _digits()
    levels = thirds(ink)
    found = []
    for i, label in enumerate(labels):
        short = f"a handwritten {NAMES[label]}"
        words = [WORDS[name][levels[name][i]] for name in WORDS]
        found.append(Captions(f"{short}, {', '.join(words)}", short))
    return found


def _enlarged(ink: np.ndarray) -> Image.Image:
    grey = Image.fromarray(np.rint(ink * (255 / 16)).astype(np.uint8))
    return grey.resize((EDGE, EDGE), Image.Resampling.LANCZOS).convert("RGB")


def _open(_part: Data | Part, _data: Data) -> Source:
    return DigitsSource()


ENTRY: OpenSource = _open
