"""`deepspeed.zero_optimization`: the stage, and what is set where the run does not set it.

The one place that knows the defaults: the engine passes them to DeepSpeed, the planner counts with them.
"""

from typing import Any

from millrace.engine.config import AUTO, Config
from millrace.engine.util.errors import UserError

BUCKET = 500_000_000
"""Most elements of DeepSpeed's buckets, and of a reduction at stage 0."""
OVERLAP_BUCKET = 100_000_000
"""Elements of a bucket where reductions run beside the backward pass: several of a model's size, so that
only the last has nothing left to hide behind."""
AUTOMATIC = ("stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size")
"""Keys that may be `auto`; all of them are where the whole section is."""


def zero_stage(config: Config) -> int:
    """ZeRO stage 0 to 3 of the run, which is not `auto`."""
    stage = _section(config).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage is {stage!r}; it is 0, 1, 2, 3 or auto")
    return stage


def zero_section(config: Config, stage: int, ranks: int, parameters: int) -> dict[str, Any]:
    """`zero_optimization` as DeepSpeed gets it: what the run sets, and what follows where it does not.

    From stage 1 on, several processes reduce beside the backward pass. Buckets are no larger than the model:
    ZeRO 1 to 3 allocate one whole, two with overlap, 2 GB each at DeepSpeed's default of 5e8 elements. On a
    CPU there are no streams, and overlap changes nothing but the second bucket.

    Args:
        ranks: processes that ZeRO shards over.
        parameters: elements of the model.
    """
    own = {key: value for key, value in _section(config).items() if value != AUTO}
    overlap = bool(own.get("overlap_comm", stage > 0 and ranks > 1))
    elements = min(parameters, OVERLAP_BUCKET if overlap else BUCKET)
    elements += elements % 2  # DeepSpeed aligns partitions to two elements
    # `reduce_scatter` would flatten each bucket once more, and sums over all processes all the same.
    sizes = {"reduce_bucket_size": elements, "allgather_bucket_size": elements, "reduce_scatter": False}
    return {"overlap_comm": overlap, **sizes, **own, "stage": stage}


def automatic_keys(config: Config) -> tuple[str, ...]:
    """The keys of the section that are `auto`."""
    section = config.deepspeed.get("zero_optimization", {})
    return AUTOMATIC if section == AUTO else tuple(k for k in AUTOMATIC if _section(config).get(k) == AUTO)


def _section(config: Config) -> dict[str, Any]:
    """What the run sets; `auto` as a whole sets nothing but an automatic stage."""
    section = config.deepspeed.get("zero_optimization", {})
    if section == AUTO:
        return {"stage": AUTO}
    if not isinstance(section, dict):
        raise UserError(
            f'deepspeed.zero_optimization is {section!r}; it is an object such as {{"stage": 1}}, or auto'
        )
    return section
