"""Matrices to their owners and back, ranks as threads; real processes run in test_muon_runs.py."""

import random
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.engine.config import Config, Model, Muon, Optimizer
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import training_flops
from millrace.engine.optim import exchange
from millrace.engine.optim.exchange import Matrix, balanced_owners, rounds
from millrace.engine.optim.muon import muon_stacks

SHAPES = [(4, 3, 5), (1, 7, 5), (2, 6, 2), (6, 3, 5), (1, 1, 9)]
"""Parameters as stacks of matrices."""


class Threads:
    """The two collectives among threads, in place of torch.distributed."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=20)
        self.mine = threading.local()
        self.box: list = [None] * world

    def get_world_size(self) -> int:
        return self.world

    def _share(self, value: object) -> list:
        self.box[self.mine.rank] = value
        self.barrier.wait()
        seen = list(self.box)
        self.barrier.wait()
        return seen

    def all_to_all_single(self, out: Tensor, given: Tensor, receive: list[int], send: list[int]) -> None:
        assert (sum(receive), sum(send)) == (len(out), len(given))
        everyone = self._share(given.split(send))
        arrived = [pieces[self.mine.rank] for pieces in everyone]
        assert [len(piece) for piece in arrived] == receive
        torch.cat(arrived, out=out)

    def all_gather_into_tensor(self, out: Tensor, given: Tensor) -> None:
        torch.cat(self._share(given), out=out)


def matrices_of(shapes):
    return [
        Matrix(i, part * rows * columns, rows, columns)
        for i, (count, rows, columns) in enumerate(shapes)
        for part in range(count)
    ]


def job(monkeypatch, ranges, weights, replicated, elements, function):
    """Run the exchange on every rank: its results by parameter, and how often each matrix was worked on."""
    world = len(ranges)
    fake = Threads(world)
    monkeypatch.setattr(exchange, "dist", fake)
    results, worked, errors = [None] * world, [], []

    def run(rank):
        fake.mine.rank = rank
        try:
            held = ranges[rank]
            local = [w.flatten()[a : a + n] for w, (a, n) in zip(weights, held, strict=True)]
            out = [torch.full((n,), float("nan"), dtype=torch.float64) for _, n in held]
            for one in rounds(matrices_of(SHAPES), ranges, rank, replicated, elements):
                flat = one.bring(local, torch.float64)
                assert len(flat) == sum(m.size for m in one.mine)
                at = 0
                for m in one.mine:
                    view = flat[at : at + m.size].view(m.rows, m.columns)
                    view.copy_(function(view))
                    worked.append((m.parameter, m.start))
                    at += m.size
                for part, result in one.take_back(flat):
                    out[part.matrix.parameter][part.start : part.start + part.count] = result
            results[rank] = out
        except BaseException as error:
            errors.append(error)
            fake.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results, worked


def whole_matrix(x):
    """Something that needs all of a matrix, in its shape."""
    return x @ x.mT @ x


@pytest.mark.parametrize("elements", [1, 40, 10**9])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["flat", "sliced", "replicated"])
def test_every_matrix_once_and_everywhere_right(monkeypatch, kind, world, elements):
    """`flat`: all parameters end to end are cut (ZeRO 1, 2); `sliced`: every parameter is (ZeRO 3)."""
    generator = torch.Generator().manual_seed(world)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    sizes = [w.numel() for w in weights]
    total = sum(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rng = random.Random(world)
    borders = [0, *sorted(rng.randrange(total) for _ in range(world - 1)), total]
    ranges = []
    for rank in range(world):
        held = []
        for start, size in zip(starts, sizes, strict=True):
            low, high = 0, size
            if kind == "flat":
                low, high = (min(max(b - start, 0), size) for b in borders[rank : rank + 2])
            elif kind == "sliced":
                each = -(-size // world)
                low, high = (min(each * r, size) for r in (rank, rank + 1))
            held.append((low if high > low else 0, high - low))
        ranges.append(held)
    results, worked = job(monkeypatch, ranges, weights, kind == "replicated", elements, whole_matrix)
    assert sorted(worked) == sorted((m.parameter, m.start) for m in matrices_of(SHAPES))
    wanted = [torch.stack([whole_matrix(x) for x in w]).flatten() for w in weights]
    for held, found in zip(ranges, results, strict=True):
        for (start, count), ours, whole in zip(held, found, wanted, strict=True):
            torch.testing.assert_close(ours, whole[start : start + count])


def test_the_documented_cost():
    """docs/optimizers.md, row by row."""
    model, text = Model(), (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text()
    with torch.device("meta"):
        named = list(Denoiser(model).named_parameters())
    settings = {
        "PRX's": Muon(),
        "chunked": Muon(chunked=True),
        "without modulation": Muon(parameters=("blocks.*.weight", "text_kv.weight")),
    }
    for name, muon in settings.items():
        stacks = muon_stacks(named, Optimizer(kind="muon", muon=muon), model)
        matrices = [Matrix(0, 0, s.rows, s.columns) for s in stacks.values() for _ in range(s.count)]
        owners = balanced_owners(matrices, 8)
        work = [sum(m.flops for m, o in zip(matrices, owners, strict=True) if o == rank) for rank in range(8)]
        total, most = 5 * sum(work) / 1e12, 5 * max(work) / 1e12
        assert f"| {name} | {len(matrices)} | {total:.1f} | {most:.2f} |" in text
    elements = sum(p.numel() for n, p in named if n in muon_stacks(named, Optimizer(kind="muon"), model))
    sent = 2 * elements / 8 * 7 / 8
    assert f"each sends {sent / 1e9:.2f} GB before the iteration and {sent / 1e9:.2f} GB after it" in text
    assert f"stage 0 each receives {2 * elements * 7 / 8 / 1e9:.2f} GB after it" in text
    step = 256 * training_flops(Config(), 256, 256)
    assert f"with 256 text tokens each has {step / 1e12:.0f} TFLOP" in text


def test_owners_are_balanced_and_always_the_same():
    """PRX-1.2B on 8 processes: each has an eighth of the work."""
    model = Model()
    with torch.device("meta"):
        named = list(Denoiser(model).named_parameters())
    for muon in (Muon(), Muon(chunked=True)):
        stacks = muon_stacks(named, Optimizer(kind="muon", muon=muon), model)
        matrices = [Matrix(0, 0, s.rows, s.columns) for s in stacks.values() for _ in range(s.count)]
        owners = balanced_owners(matrices, 8)
        work = [sum(m.flops for m, o in zip(matrices, owners, strict=True) if o == rank) for rank in range(8)]
        assert max(work) == pytest.approx(sum(work) / 8, rel=0.01)
        assert owners == balanced_owners(list(matrices), 8)
    # Uneven work: no rank has more than the mean and one matrix.
    matrices = matrices_of(SHAPES)
    owners = balanced_owners(matrices, 3)
    work = [sum(m.flops for m, o in zip(matrices, owners, strict=True) if o == rank) for rank in range(3)]
    assert max(work) <= sum(work) / 3 + max(m.flops for m in matrices)
    assert balanced_owners([], 3) == []
