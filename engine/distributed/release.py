"""Release of a DeepSpeed engine: what keeps weights and masters alive after the last reference is gone.

Hooks that ZeRO registers on gradient accumulators live in C++, where Python's collector does not look, and
hold optimizer, engine and module. Stage 3 also keeps modules in two places of its own: a stack of modules in
forward, and a cache of functools that has the coordinator of the parameters in its keys.
"""

import functools
import gc
from typing import Any

import torch


def release_engine(engine: Any, stage: int) -> None:
    """Undo what an engine of DeepSpeed 0.19 has registered; `stage` is its ZeRO stage. It is of no use
    afterwards."""
    engine.destroy()
    if stage == 3:
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        parameter_offload.FWD_MODULE_STACK.clear()
        cached = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
        for cell in cached.__closure__:  # instrument_w_nvtx wraps the cache without a way to it
            if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                cell.cell_contents.cache_clear()


def collect_memory() -> None:
    """Free what nobody refers to, and return what torch's allocator keeps of it to the device."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
