"""The training state as named tensors: from the optimizer's shards to a checkpoint and back.

    master/<parameter>   FP32 weights          exp_avg/<parameter>, exp_avg_sq/<parameter>   Adam's moments
    ema/<parameter>      FP32 average          buffer/<buffer>   fixed (SPRINT's frozen mask token)

Each rank writes the elements that it holds and reads those that it will hold, so the stage and the number of
processes may change in between. Together with the counters in the checkpoint's meta data this is everything:
learning rate and randomness are functions of the step and the sample.
"""

from collections.abc import Iterable, Iterator, Set

import torch
from torch import Tensor, nn

from millrace.engine.errors import UserError
from millrace.engine.optim.adamw import SkippableAdamW
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.runtime.checkpoint import CheckpointReader, Piece
from millrace.engine.runtime.distributed import rank
from millrace.engine.runtime.shards import Shard, masters

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_pieces(
    shards: list[Shard],
    optimizer: SkippableAdamW,
    ema: EmaWeights | None,
    buffers: Iterable[tuple[str, Tensor]] = (),
) -> Iterator[Piece]:
    """This rank's part of the training state. `buffers` are whole on every rank; the first writes them."""
    for shard in shards:
        if not shard.writes:
            continue
        yield _piece("master", shard, shard.master)
        state = optimizer.state.get(shard.master, {})
        for moment in MOMENTS:
            if moment in state:
                yield _piece(moment, shard, state[moment])
        if ema is not None:
            yield _piece("ema", shard, ema.of(shard.master))
    if rank() == 0:
        for name, buffer in buffers:
            yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer.flatten())


def _piece(kind: str, shard: Shard, like_master: Tensor) -> Piece:
    return Piece(f"{kind}/{shard.name}", shard.shape, shard.start, shard.of(like_master))


def optimizer_steps(shards: list[Shard], optimizer: SkippableAdamW) -> int:
    """Updates that Adam has made, by which it corrects its bias; fewer than steps if some were skipped."""
    counts = {int(optimizer.state[m]["step"]) for m in masters(shards) if optimizer.state.get(m)}
    return max(counts, default=0)


@torch.no_grad()
def load_weights(module: nn.Module, reader: CheckpointReader, folder: str) -> None:
    """Fill the parameters with a checkpoint's masters, before DeepSpeed takes them over, and the buffers."""
    wanted = {f"master/{name}": parameter for name, parameter in module.named_parameters()}
    wanted |= {f"buffer/{name}": buffer for name, buffer in module.named_buffers()}
    stored = {name for name in reader.names() if name.startswith(("master/", "buffer/"))}
    check_names(wanted.keys(), stored, folder)
    for key, tensor in wanted.items():
        stored = reader.tensor(key)
        if stored.shape != tensor.shape:
            raise UserError(
                f"{folder}: {key.partition('/')[2]} is {tuple(stored.shape)} there and {tuple(tensor.shape)} "
                "in this configuration; resume with the configuration of the run"
            )
        tensor.copy_(stored)


def check_names(wanted: Set[str], stored: Set[str], origin: str) -> None:
    """Raise UserError unless the two are equal; parameters are listed without "master/"."""
    missing, unknown = (
        sorted(name.removeprefix("master/") for name in names) for names in (wanted - stored, stored - wanted)
    )
    if missing or unknown:
        raise UserError(
            f"{origin}: not the weights of this model: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])}); use the configuration they were made with"
        )


@torch.no_grad()
def load_optimizer(
    shards: list[Shard], optimizer: SkippableAdamW, reader: CheckpointReader, steps: int
) -> None:
    """Recreate Adam's state for this rank's masters. `steps` as from `optimizer_steps`; 0 leaves it empty."""
    if steps == 0:
        return
    fused = bool(optimizer.defaults.get("fused"))
    for master in masters(shards):
        count = torch.tensor(float(steps), device=master.device if fused else "cpu")
        optimizer.state[master] = {"step": count} | {moment: torch.zeros_like(master) for moment in MOMENTS}
    for shard in shards:
        for moment in MOMENTS:
            _fill(shard, optimizer.state[shard.master][moment], reader, moment)


@torch.no_grad()
def load_ema(shards: list[Shard], ema: EmaWeights, reader: CheckpointReader) -> None:
    """Recreate the average; a checkpoint without one leaves it at the weights."""
    names = set(reader.names())
    for shard in shards:
        if f"ema/{shard.name}" in names:
            _fill(shard, ema.of(shard.master), reader, "ema")


def _fill(shard: Shard, like_master: Tensor, reader: CheckpointReader, kind: str) -> None:
    shard.of(like_master).copy_(reader.read(f"{kind}/{shard.name}", shard.start, shard.count))
