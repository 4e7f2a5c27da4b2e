"""What is left of a stage when the next one begins: nothing, at any ZeRO stage."""

import gc
import weakref

import pytest
import torch

from millrace.engine.config.loading import parse_config
from millrace.engine.distributed.zero_shards import masters
from millrace.engine.trainer import Trainer, train

pytestmark = pytest.mark.slow

BOUNDARIES = 4
CHANGES = {
    "run": {"steps": 2 * (BOUNDARIES + 1)},
    "stages": [{"at": 2 * (i + 1), "optimizer": {"lr": 1e-3 / (i + 2)}} for i in range(BOUNDARIES)],
}


def storages() -> dict[int, int]:
    """Bytes of each storage of a tensor that Python can reach, by its address."""
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout == torch.strided
    }


def boundaries(values: dict) -> tuple[list[int], list[list[str]], int]:
    """Bytes of storages just before each stage after the first is built, what was alive of the stages before,
    and the bytes of all weights. In a process of its own."""
    bytes_held, alive, watched, sizes = [], [], {}, []

    def make(config, resume):
        if resume is not None:
            bytes_held.append(sum(storages().values()))
            alive.append([name for name, reference in watched.items() if reference() is not None])
        trainer = Trainer(config, resume)
        number = len(bytes_held)
        parts = {"trainer": trainer, "engine": trainer.engine, "denoiser": trainer.denoiser}
        parts |= {"optimizer": trainer.optimizer, "ema": trainer.ema, "master": masters(trainer.shards)[0]}
        watched.update({f"{name} {number}": weakref.ref(part) for name, part in parts.items()})
        sizes.append(sum(master.nbytes for master in masters(trainer.shards)))
        return trainer

    train(parse_config(values, "test"), None, make)
    return bytes_held, alive, sizes[0]


@pytest.mark.parametrize("number", range(4))
def test_nothing_of_a_stage_is_alive_when_the_next_is_built(runs, tmp_path, number):
    values = runs.values(tmp_path / "run", CHANGES, {"deepspeed": {"zero_optimization": {"stage": number}}})
    held, alive, weights = runs.apart(boundaries, values)
    print(f"ZeRO {number}: {held} bytes at {len(held)} boundaries; the weights are {weights}")
    assert alive == [[]] * BOUNDARIES
    assert len(held) == BOUNDARIES
    assert max(held) < weights / 4  # of what does not belong to a stage
    assert max(held) - min(held) < 1024
