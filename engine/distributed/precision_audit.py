"""Precision audit: what is stored in which dtype, shown at start, refused where masters are not FP32."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from millrace.engine.config import Precision
from millrace.engine.distributed.zero_shards import Shard, masters
from millrace.engine.util.errors import UserError

AuditRow = tuple[str, str]


def audit(
    module: nn.Module,
    shards: list[Shard],
    state: dict[Tensor, dict],
    averages: list[Tensor],
    precision: Precision,
    copies: Sequence[Tensor] = (),
    storage: str = "as the masters",
) -> list[AuditRow]:
    """What is stored how on this rank: rows of (what, dtypes with element counts).

    Args:
        module: the denoiser as DeepSpeed holds it.
        shards: of this rank.
        state: the optimizer's state by master tensor.
        averages: all tensors of the EMA, none if the run has none.
        copies: working copies of weights that the layers multiply by.
        storage: how the optimizer will store its state, said until it has one.
    """
    flats = masters(shards)
    moments = [value for flat in flats for value in state.get(flat, {}).values() if _is_moment(value)]
    rows = [("weights used in forward", _dtypes(p for p in module.parameters() if p.requires_grad))]
    if frozen := [p for p in module.parameters() if not p.requires_grad]:
        rows.append(("frozen weights, never updated", _dtypes(frozen)))
    if copies:
        rows.append(("their copies for products", _dtypes(copies)))
    rows += [
        ("master weights (this rank)", _dtypes(flats)),
        ("optimizer state (this rank)", _dtypes(moments) or f"{storage}, at the first step"),
    ]
    if averages:
        rows.append(("EMA (this rank)", _dtypes(averages)))
    rows.append(("matrix products and attention", precision.compute))
    if precision.fp8.active:
        fp8 = precision.fp8
        rows.append(("FP8 matrix products", f"{', '.join(fp8.layers)} ({fp8.chosen}, {fp8.recipe})"))
    rows += [("norms, softmax, RoPE, loss", "float32"), ("gradient reduction", precision.reduce)]
    return rows


def require_masters(
    module: nn.Module,
    shards: list[Shard],
    state: dict[Tensor, dict],
    precision: Precision,
    quantized: Collection[str] = (),
) -> None:
    """Raise UserError if a weight, master or moment is not FP32 and the configuration did not say so.

    `quantized` names the state that the configured optimizer stores in 8 bits, each with FP32 scales.
    The module's weights count too: of a BF16 module ZeRO 1 to 3 make FP32 masters, but compute in BF16.
    Frozen ones may have any dtype: no update is rounded away where there is none.
    """
    if precision.master == "bfloat16":
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UserError(_refusal(f"the weight {name} is {_name(parameter)}"))
    for shard in shards:
        if shard.master.dtype != torch.float32:
            raise UserError(_refusal(f"the master of {shard.name} is {_name(shard.master)}"))
        for key, value in state.get(shard.master, {}).items():
            wanted = torch.uint8 if key in quantized else torch.float32
            if _is_moment(value) and value.dtype != wanted:
                raise UserError(_refusal(f"{key} of {shard.name} is {_name(value)}", wanted))


def _refusal(what: str, wanted: torch.dtype = torch.float32) -> str:
    return (
        f"precision audit: {what}, not {_name(wanted)}: small updates would be rounded away. Keep the "
        'weights in float32, or ask for the experiment with "precision": {"master": "bfloat16"}'
    )


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _name(typed: Tensor | torch.dtype) -> str:
    dtype = typed if isinstance(typed, torch.dtype) else typed.dtype
    return str(dtype).removeprefix("torch.")


def _dtypes(tensors: Iterable[Tensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[_name(tensor)] += getattr(tensor, "ds_numel", tensor.numel())
    return ", ".join(f"{dtype} ({count:,})" for dtype, count in counts.items())
