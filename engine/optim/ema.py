"""Exponential moving average of the master weights, sharded exactly as the optimizer shards them."""

import torch
from torch import Tensor

from millrace.engine.config import Ema
from millrace.engine.runtime.shards import Shard, masters


class EmaWeights:
    """One FP32 copy of each master tensor of this rank; element-wise, so a shard needs no communication."""

    def __init__(self, config: Ema, shards: list[Shard]) -> None:
        self.config = config
        self._masters = masters(shards)
        self._averages = [master.detach().clone() for master in self._masters]
        self._place = {id(master): i for i, master in enumerate(self._masters)}

    def of(self, master: Tensor) -> Tensor:
        """The average of one master tensor, same shape."""
        return self._averages[self._place[id(master)]]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, from 1: a copy up to `start`, each `every` steps e += (1 - decay)(w - e)."""
        if step <= self.config.start:
            torch._foreach_copy_(self._averages, self._masters)
        elif step % self.config.every == 0:
            torch._foreach_lerp_(self._averages, self._masters, 1 - self.config.decay)
