"""Plans of runs that train an adapter or a part: what fits one card, and the table of the page about it."""

import re

import pytest

from millrace.engine.config import Adapter, Config, Model, Optimizer
from millrace.engine.config.loading import load_config
from millrace.engine.planning.activations import trace
from millrace.engine.planning.devices import GPUS
from millrace.engine.planning.search import Planner
from millrace.engine.planning.step_memory import memory_of, saved_bytes, shape_of
from tests.programs import ROOT

PAGE = (ROOT / "docs" / "fine_tuning.md").read_text()
CARDS = ("rtx4080", "rtx4090", "rtx5090")
ROWS = re.findall(r"^\| (none|lora|dora) \| `(adamw\w*)` \| (.+) \|$", PAGE, re.MULTILINE)
CELLS = [
    (kind, optimizer, card, text)
    for kind, optimizer, row in ROWS
    for card, text in zip(CARDS, row.split(" | "), strict=True)
]
SMALL = Model(width=64, depth=4, heads=2, in_channels=16, context_dim=24)


@pytest.fixture(scope="module")
def planner():
    """`planner(kind, card, optimizer)`, each kind traced once."""
    kinds = {}

    def make(kind, card, optimizer="adamw"):
        path = str(ROOT / "configs" / "sft_alchemist_lora.json")
        config = load_config(path, [f"adapter.kind={kind}", f"optimizer.kind={optimizer}"])
        made = Planner(config, 1, GPUS[card])
        made._traces = kinds.setdefault(kind, made._traces)
        return made

    return make


def test_the_page_has_the_table():
    assert len(CELLS) == 15


@pytest.mark.parametrize(("kind", "optimizer", "card", "text"), CELLS)
def test_what_fits_is_what_the_page_says(planner, kind, optimizer, card, text):
    """`batch: memory`, or the least that the card would have to hold."""
    plan = planner(kind, card, optimizer)
    if text.endswith("at least"):
        least = min(
            plan.option(0, 1, p).memory.peak for p in ("none", "selective", "full") if plan.allowed(0, p)
        )
        assert f"{least / 1e9:.1f} GB at least" == text
        assert least > plan.device.capacity
        return
    batch = int(text.partition(":")[0])
    taken, more = (plan.option(0, size, "none") for size in (batch, 2 * batch))
    assert f"{batch}: {taken.memory.peak / 1e9:.1f} GB" == text
    assert taken.fits
    assert not more.fits


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 4)])
def test_only_what_is_trained_has_masters_moments_and_gradients(stage, ranks):
    whole = shape_of(Config(model=SMALL))
    config = Config(model=SMALL, adapter=Adapter(kind="lora", rank=4))
    shape = shape_of(config)
    assert shape.factors == shape.parameters == 4 * 4 * (64 * (1 + 3) + 64 * 2 + (64 + 448) + (224 + 64))
    assert shape.frozen == whole.parameters
    assert shape.frozen_bytes < 2.02 * shape.frozen
    memory = memory_of(config, stage, ranks, trace(config, 1, 4, 8), shape)
    share = ranks if stage else 1
    assert memory.parts["Adam moments"] == 8 * shape.parameters / share
    assert memory.parts["frozen weights"] == shape.frozen_bytes
    assert "working copies" not in memory.parts
    assert memory.gradients == 4 * shape.parameters / (ranks if stage == 2 else 1)
    assert saved_bytes(config, ranks, shape) == (12 * shape.parameters + shape.frozen_bytes) / ranks


def test_a_frozen_half_holds_half():
    frozen = tuple(f"blocks.{i}.*" for i in range(2))
    config = Config(model=SMALL, optimizer=Optimizer(frozen=frozen))
    shape, whole = shape_of(config), shape_of(Config(model=SMALL))
    assert shape.parameters + shape.frozen == whole.parameters
    assert shape.factors == 0
    traced, before = (
        trace(Config(model=SMALL, optimizer=Optimizer(frozen=f)), 2, 4, 8) for f in (frozen, ())
    )
    assert traced.peak < before.peak


def test_heads_that_are_frozen_are_not_counted():
    """The planner has the denoiser alone; a pattern for heads names nothing in it."""
    config = Config(model=SMALL, optimizer=Optimizer(frozen=("alignment.*",)))
    assert shape_of(config) == shape_of(Config(model=SMALL))


def test_stage_3_is_not_planned(planner):
    assert not planner("lora", "rtx4090").allowed(3, "none")
