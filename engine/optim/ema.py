"""Exponential moving average (EMA) of the master weights, sharded exactly as the optimizer shards them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from millrace.engine.config import Ema
from millrace.engine.distributed.zero_shards import Shard, masters


class EmaWeights:
    """FP32 copies of each master tensor of this rank; element-wise, so a shard needs no communication.

    They are named as in checkpoints: "ema", and "ema2" if the configuration has a second decay.
    """

    def __init__(self, config: Ema, shards: list[Shard]) -> None:
        self.config = config
        self._masters = masters(shards)
        self._place = {id(master): i for i, master in enumerate(self._masters)}
        self._decays = {"ema": config.decay}
        if config.second_decay is not None:
            self._decays["ema2"] = config.second_decay
        self._averages = {
            name: [master.detach().clone() for master in self._masters] for name in self._decays
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Of the averages that are kept."""
        return tuple(self._decays)

    def of(self, master: Tensor, name: str = "ema") -> Tensor:
        """The average of one master tensor, same shape."""
        return self._averages[name][self._place[id(master)]]

    @property
    def tensors(self) -> list[Tensor]:
        """All averages of this rank, each FP32 and of its master's shape."""
        return [average for averages in self._averages.values() for average in averages]

    def source(self, weights: str) -> Callable[[Tensor], Tensor]:
        """From a master tensor to what `sampling.weights` asks for: itself, or an average."""
        if weights == "model":
            return Tensor.detach
        return functools.partial(self.of, name="ema2" if weights == "ema2" else "ema")

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, from 1: a copy up to `start`, each `every` steps e += (1 - decay)(w - e)."""
        for name, averages in self._averages.items():
            if step <= self.config.start:
                torch._foreach_copy_(averages, self._masters)
            elif step % self.config.every == 0:
                torch._foreach_lerp_(averages, self._masters, 1 - self._decays[name])
