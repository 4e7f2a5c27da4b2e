"""The average against a plain loop; that it is the same sharded, whole runs show in test_trainer.py."""

import pytest
import torch

from millrace.engine.config import Ema
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.runtime.shards import Shard


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
