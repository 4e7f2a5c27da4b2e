"""The average against a plain loop; that it is the same sharded, whole runs show in test_trainer.py."""

import pytest
import torch

from millrace.engine.config import Ema
from millrace.engine.distributed.zero_shards import Shard
from millrace.engine.optim.ema import EmaWeights


def shards_of(masters):
    """Two parameters in the first master, one in the second."""
    first, second = masters
    return [
        Shard("a", (4,), 0, 4, first, 0),
        Shard("b", (2, 3), 0, 6, first, 4),
        Shard("c", (5,), 0, 5, second, 0),
    ]


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 3), (4, 1), (5, 3), (100, 1)])
def test_equals_a_plain_loop(start, every):
    generator = torch.Generator().manual_seed(1)
    masters = [torch.randn(10, generator=generator), torch.randn(5, generator=generator)]
    ema = EmaWeights(Ema(enabled=True, decay=0.9, start=start, every=every), shards_of(masters))
    wanted = [master.double() for master in masters]
    for step in range(1, 13):
        for master in masters:
            master.add_(torch.randn(master.shape, generator=generator))
        ema.update(step)
        for i, master in enumerate(masters):
            if step <= start:
                wanted[i] = master.double()
            elif step % every == 0:
                wanted[i] = 0.9 * wanted[i] + 0.1 * master.double()
    for master, average in zip(masters, wanted, strict=True):
        torch.testing.assert_close(ema.of(master).double(), average, rtol=1e-5, atol=1e-6)


def test_a_second_decay_in_closed_form():
    """e_n = d^n w_0 + (1 - d) sum_k d^(n - k) w_k for either decay, untouched by the other."""
    generator = torch.Generator().manual_seed(2)
    masters = [torch.randn(10, generator=generator), torch.randn(5, generator=generator)]
    config = Ema(enabled=True, decay=0.6, second_decay=0.95, every=2, start=3)
    ema = EmaWeights(config, shards_of(masters))
    assert ema.names == ("ema", "ema2")
    history = []
    for step in range(1, 16):
        for master in masters:
            master.add_(torch.randn(master.shape, generator=generator))
        ema.update(step)
        if step == 3 or (step > 3 and step % 2 == 0):
            history.append([master.double() for master in masters])
    n = len(history) - 1
    assert n == 6
    for name, d in (("ema", 0.6), ("ema2", 0.95)):
        for i, master in enumerate(masters):
            wanted = d**n * history[0][i]
            wanted = wanted + sum((1 - d) * d ** (n - k) * history[k][i] for k in range(1, n + 1))
            torch.testing.assert_close(ema.of(master, name).double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ema.of(masters[0]), ema.of(masters[0], "ema2"))
    wanted = {"model": masters[0], "ema2": ema.of(masters[0], "ema2")}
    wanted |= dict.fromkeys(("auto", "ema"), ema.of(masters[0]))
    assert all(torch.equal(ema.source(weights)(masters[0]), value) for weights, value in wanted.items())


def test_one_copy_of_each_master_in_its_own_memory():
    masters = [torch.ones(10), torch.ones(5)]
    ema = EmaWeights(Ema(enabled=True, decay=0.5, every=1), shards_of(masters))
    assert ema.of(masters[0]).shape == (10,)
    masters[0].fill_(3.0)
    assert ema.of(masters[0]).unique().tolist() == [1.0]
    ema.update(1)
    assert ema.of(masters[0]).unique().tolist() == [2.0]
    assert ema.of(masters[1]).unique().tolist() == [1.0]
    piece = shards_of(masters)[1].of(ema.of(masters[0]))
    assert piece.data_ptr() == ema.of(masters[0])[4:].data_ptr()
    assert piece.shape == (6,)
