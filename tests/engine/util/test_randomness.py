"""Host choices: a pure function of (seed, index, purpose), with the same keys as on the device."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from millrace.engine.util.randomness import Purpose, epoch_order, host_generator, passing_generator
from millrace.kernels.support.philox import sample_keys


def draws(seed=0, index=0, purpose="crop"):
    return host_generator(seed, index, purpose).random(8)


def test_same_arguments_same_numbers():
    assert np.array_equal(draws(), draws())


@pytest.mark.parametrize("changed", [{"seed": 1}, {"index": 1}, {"purpose": "flip"}])
def test_each_argument_changes_the_numbers(changed):
    assert not np.intersect1d(draws(), draws(**changed)).size


def test_neighbouring_samples_are_independent():
    """Mean over 20000 samples of one draw each, and the product of neighbours, within five deviations."""
    values = np.array([host_generator(5, index, "time").random() for index in range(20_000)]) - 0.5
    assert abs(values.mean()) < 5 * np.sqrt(1 / 12 / values.size)
    assert abs((values[1:] * values[:-1]).mean()) < 5 / 12 / np.sqrt(values.size)


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
@pytest.mark.parametrize("index", [0, 1, 10**12])
def test_the_key_is_that_of_the_device(seed, index):
    """NumPy's Philox under the sample's device key gives the same stream."""
    key = int(sample_keys(seed, torch.tensor([index]), "route")) & (2**64 - 1)
    expected = np.random.Generator(np.random.Philox(key=key)).random(8)
    assert np.array_equal(host_generator(seed, index, "route").random(8), expected)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_an_epoch_visits_every_sample_once(size):
    order = epoch_order(3, 7, size, "order")
    assert order.dtype == np.uint32
    assert np.array_equal(np.sort(order), np.arange(size))
    assert np.array_equal(order, host_generator(3, 7, "order").permutation(size))


def test_epochs_and_seeds_have_their_own_order():
    assert np.array_equal(epoch_order(0, 0, 100, "order"), epoch_order(0, 0, 100, "order"))
    orders = {tuple(epoch_order(seed, epoch, 100, "order")) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_place_of_an_epoch_is_as_likely():
    """Where sample 0 comes in 4000 epochs of 8, within five standard deviations per place."""
    epochs, size = 4000, 8
    places = np.bincount([epoch_order(0, e, size, "order").argmin() for e in range(epochs)], minlength=size)
    share = 1 / size
    assert np.abs(places - epochs * share).max() < 5 * np.sqrt(epochs * share * (1 - share))


def test_passing_generators_draw_what_lasting_ones_do():
    """Whatever was drawn before, from any purpose and in any thread."""

    def same(i):
        for purpose in ("crop", "flip", "crop"):
            passing, lasting = passing_generator(3, i, purpose), host_generator(3, i, purpose)
            # An odd number of 32-bit draws leaves half a word behind for the next.
            for draw in ("random", "integers"):
                arguments = () if draw == "random" else (1000,)
                assert getattr(passing, draw)(*arguments) == getattr(lasting, draw)(*arguments)
            assert passing.integers(2**40) == lasting.integers(2**40)
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(same, range(400)))


ROOT = Path(__file__).resolve().parents[3]

USED_TWICE = {
    Purpose.ORDER: "streams of epochs of different owners: `of` a part, `of` a bucket, or a reference set",
    Purpose.NOISE: "of training, and of held-out pictures `at` one of their times, with a seed of their own",
}
"""Purposes that stand in several places, each with the reason why no draw is repeated."""


@cache
def sources():
    """(path below the repository, syntax tree) of every file of the engine and of the kernels."""
    paths = [path for folder in ("engine", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths]


def takers():
    """Place of the parameter `purpose` in every function that has one, by the name it is called by."""
    found = {}
    for _, tree in sources():
        for outer in ast.walk(tree):
            for node in ast.iter_child_nodes(outer):
                if isinstance(node, ast.FunctionDef):
                    names = [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
                    if "purpose" in names:
                        called = outer.name if node.name == "__init__" else node.name
                        found[called] = names.index("purpose")
    return found


def purposes_given():
    """(file, expression) of every purpose that a call in the engine or the kernels gives."""
    place_of = takers()
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in place_of:
                by_name = [k.value for k in node.keywords if k.arg == "purpose"]
                yield path, (by_name or node.args[place_of[name] :])[0]


def places():
    """(file, line of the statement) of every place of a purpose; in the kernels they are plain strings."""
    found = defaultdict(set)

    def visit(node, path, line):
        line = node.lineno if isinstance(node, ast.stmt) else line
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "Purpose"
        ):
            found[Purpose[node.attr]].add((path, line))
        for child in ast.iter_child_nodes(node):
            visit(child, path, line)

    for path, tree in sources():
        visit(tree, path, 0)
    for path, expression in purposes_given():
        if path.startswith("kernels/") and isinstance(expression, ast.Constant):
            found[Purpose(expression.value)].add((path, expression.lineno))
    return found


def test_the_reader_finds_who_takes_a_purpose():
    assert {
        "host_generator",
        "passing_generator",
        "epoch_order",
        "stream_key",
        "sample_keys",
        "Epochs",
    } <= set(takers())


def test_every_purpose_has_one_place():
    """Two draws of one purpose about one sample are the same numbers: a dependence that nobody would see."""
    found = places()
    assert set(found) == set(Purpose)
    assert {purpose: where for purpose, where in found.items() if len(where) > 1}.keys() == USED_TWICE.keys()


def test_no_purpose_is_a_plain_string():
    for path, expression in purposes_given():
        literal = isinstance(expression, ast.Constant | ast.JoinedStr)
        assert not literal or path.startswith("kernels/"), (
            f"{path}:{expression.lineno}: use a member of Purpose"
        )


def test_the_documentation_lists_the_purposes_and_their_places():
    section = (ROOT / "docs" / "step.md").read_text().partition("## What belongs to the sample")[2]
    listed = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", section.partition("## ")[0], flags=re.MULTILINE):
        for purpose in re.findall(r"`(.*?)`", row[0]):
            listed[purpose] = set(re.findall(r"`(.*?)`", row[1]))
    assert listed == {str(purpose): {path for path, _ in where} for purpose, where in places().items()}


def test_keys_need_no_torch():
    """Preparing data and reading a command line derive keys, or import what does."""
    code = "import sys, millrace.engine.util.randomness; print({'torch', 'triton'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
