"""Training state (masters, optimizer, EMA) as named tensors: from ZeRO's shards to a checkpoint and back.

    master/<parameter>     FP32 weights, frozen ones as they are stored
    exp_avg/<parameter>, exp_avg_sq/<parameter>   Adam's moments; in 8 bits exp_avg_8bit/ and exp_avg_scale/
    ema/, ema2/<parameter> FP32 averages       momentum/<parameter>   Muon's
    buffer/<buffer>        fixed (SPRINT's frozen mask token)
    updates/<parameter>    how many Adam made, of a parameter for which that is less than for others

Each rank writes the elements that it holds and reads those that it will hold, so the stage and the number of
processes may change in between. Together with the counters in the checkpoint's meta data this is everything:
learning rate and randomness are functions of the step and the sample.

Between the stages of a run parameters (a projector) and optimizers may come and go. Where the caller allows
it, new parameters keep the values they were made with, state that is missing starts at zero, and what has no
place any more is dropped; every such change is a line for the user. Heads that only training needs (HEADS)
may come and go at any step.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.engine.checkpoint.checkpoints import CheckpointReader, Piece, together
from millrace.engine.checkpoint.damage import BadElements, bad_elements, total
from millrace.engine.distributed.process_group import gather_objects, rank, training_group, world_size
from millrace.engine.distributed.zero_shards import Shard, masters
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.optim.training_optimizer import TrainingOptimizer, optimizer_entry, optimizer_kinds
from millrace.engine.util.errors import UserError

TUNED_AUTOENCODER = "tuning/"
"""What names of an autoencoder begin with that the run tunes (REPA-E), and of its discriminator."""

HEADS = "alignment."
"""What names of parameters begin with that belong to a term of the loss, not to the model."""


def state_pieces(
    shards: list[Shard],
    optimizer: TrainingOptimizer,
    ema: EmaWeights | None,
    buffers: Iterable[tuple[str, Tensor]] = (),
    frozen: Iterable[Shard] = (),
) -> Iterator[Piece]:
    """This rank's part of the training state, and of the weights that are not trained (`frozen`). `buffers`
    are whole on every rank; the first writes them."""
    updates = _updates(shards, optimizer)
    latest = max(updates.values(), default=0)
    for shard in (held.to_write for held in shards):
        if not shard.count:
            continue
        yield from _pieces(shard, optimizer, ema)
        if shard.start == 0 and updates.get(id(shard.master), latest) != latest:
            yield Piece(f"updates/{shard.name}", (), 0, torch.tensor([updates[id(shard.master)]]))
    for shard in (held.to_write for held in frozen):
        if shard.count:
            yield _piece("master", shard, shard.master)
    if rank() == 0:
        for name, buffer in buffers:
            yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer.flatten())


def _pieces(shard: Shard, optimizer: TrainingOptimizer, ema: EmaWeights | None) -> Iterator[Piece]:
    """Weights, optimizer state and averages of a shard."""
    yield _piece("master", shard, shard.master)
    for kind, shape, start, data in optimizer.stored(shard):
        yield Piece(f"{kind}/{shard.name}", shape, start, data)
    for name in ema.names if ema is not None else ():
        yield _piece(name, shard, ema.of(shard.master, name))


def written_bytes(
    shards: list[Shard], optimizer: TrainingOptimizer, ema: EmaWeights | None, frozen: Iterable[Shard] = ()
) -> int:
    """Bytes of weights, optimizer state and averages that this rank writes, once the optimizer has begun."""
    averages = len(ema.names) if ema is not None else 0
    kept = sum(shard.count * shard.master.element_size() for shard in (held.to_write for held in frozen))
    return kept + sum(
        shard.count * shard.master.element_size() * (1 + averages) + optimizer.stored_bytes(shard)
        for shard in (held.to_write for held in shards)
    )


def bad_state(
    shards: list[Shard], optimizer: TrainingOptimizer, ema: EmaWeights | None, copies: bool = False
) -> dict[str, BadElements]:
    """Bad elements of all that this rank holds, looked for where it lies; with `copies` only of what another
    rank writes to the checkpoint."""
    found = []
    for shard in itertools.chain.from_iterable(held.copies for held in shards) if copies else shards:
        if shard.count:
            for piece in _pieces(shard, optimizer, ema):
                if bad := bad_elements(piece.name, piece.data):
                    found.append({piece.name: bad})
    return total(found)


def _piece(kind: str, shard: Shard, like_master: Tensor) -> Piece:
    return Piece(f"{kind}/{shard.name}", shard.shape, shard.start, shard.of(like_master))


def _updates(shards: list[Shard], optimizer: TrainingOptimizer) -> dict[int, int]:
    """Adam's count of each master that has one, by the master's id."""
    states = {id(m): optimizer.state.get(m, {}) for m in masters(shards)}
    return {place: int(state["step"]) for place, state in states.items() if "step" in state}


def optimizer_steps(shards: list[Shard], optimizer: TrainingOptimizer) -> int:
    """Updates that Adam has made, by which it corrects its bias; fewer than steps if some were skipped, and 0
    of an optimizer that does not count."""
    return max(_updates(shards, optimizer).values(), default=0)


@torch.no_grad()
def load_weights(
    module: nn.Module, reader: CheckpointReader, folder: str, allow_changes: bool = False
) -> list[str]:
    """Fill the parameters with a checkpoint's masters, before DeepSpeed takes them over, and the buffers.

    Each rank reads an equal share of the elements and sends them to the others on the module's device, so the
    file system gives out every byte once, whatever the number of ranks. Collective.

    `allow_changes` lets parameters that the checkpoint lacks keep their values, and drops those that the
    module lacks; the lines returned name them. Else both are a UserError, as a wrong shape always is. Heads
    may always change, their shapes too.
    """
    wanted = {f"master/{name}": parameter for name, parameter in module.named_parameters()}
    wanted |= {f"buffer/{name}": buffer for name, buffer in module.named_buffers()}
    stored = {name for name in reader.names() if name.startswith(("master/", "buffer/"))}
    other = {name for name in stored & wanted.keys() if _is_head(name)}
    other = {name for name in other if reader.shape(name) != wanted[name].shape}
    new = (wanted.keys() - stored) | other
    gone, stored = (stored - wanted.keys()) | other, stored - other
    messages = _change("new parameters", new) + _change("parameters dropped", gone)
    if not allow_changes:
        model, theirs = ({name for name in names if not _is_head(name)} for names in (wanted, stored))
        check_names(model, theirs, folder)
    wanted = {key: tensor for key, tensor in wanted.items() if key in stored}
    for key, tensor in wanted.items():
        if reader.shape(key) != tensor.shape:
            raise UserError(
                f"{folder}: {key.partition('/')[2]} is {reader.shape(key)} there and {tuple(tensor.shape)} "
                "in this configuration; resume with the configuration of the run"
            )
    parts = list(shares({key: tensor.numel() for key, tensor in wanted.items()}, world_size()))

    def read() -> None:
        with reader.kept_open():
            for key, start, count, source in parts:
                if source == rank():
                    part = reader.read(key, start, count)
                    wanted[key].view(-1)[start : start + count].copy_(part)

    together(read, gather_objects)
    if world_size() > 1:
        for key, start, count, source in parts:
            part = wanted[key].view(-1)[start : start + count]
            dist.broadcast(part, source, group=training_group())
    return messages


def shares(sizes: dict[str, int], ranks: int) -> Iterator[tuple[str, int, int, int]]:
    """(tensor, first element, elements, rank that reads them) of tensors laid end to end and cut into a part
    of equal size for each of `ranks`."""
    total, before = sum(sizes.values()), 0
    for key, size in sizes.items():
        start = 0
        while start < size:
            # The rank in whose part, [r total // ranks, (r + 1) total // ranks), the next element lies.
            source = ((before + start + 1) * ranks - 1) // total
            end = min(size, (source + 1) * total // ranks - before)
            yield key, start, end - start, source
            start = end
        before += size


def lacks_heads(module: nn.Module, reader: CheckpointReader) -> bool:
    """Whether the module has heads that the checkpoint has not, or has in other shapes."""
    names = set(reader.names())
    heads = {f"master/{name}": p.shape for name, p in module.named_parameters() if name.startswith(HEADS)}
    return any(name not in names or reader.shape(name) != shape for name, shape in heads.items())


def _is_head(key: str) -> bool:
    """Whether a key, `kind/parameter`, is of a head."""
    return key.partition("/")[2].startswith(HEADS)


def _change(what: str, keys: Iterable[str]) -> list[str]:
    names = sorted(key.partition("/")[2] for key in keys)
    more = ", ..." if len(names) > 2 else ""
    return [f"{what} since the checkpoint: {len(names)} ({', '.join(names[:2])}{more})"] if names else []


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
    shards: list[Shard],
    optimizer: TrainingOptimizer,
    reader: CheckpointReader,
    steps: int,
    allow_changes: bool = False,
) -> list[str]:
    """Recreate the optimizer's state for this rank's masters.

    Args:
        shards: of this rank, one for each parameter.
        steps: as from `optimizer_steps`.
        allow_changes: start state that the checkpoint lacks at zero and drop what has no place, named in the
            lines returned; else both are a UserError, but for heads.
    """
    names = set(reader.names())
    wanted = [f"{kind}/{shard.name}" for shard in shards for kind in optimizer.state_names(shard.name)]
    kinds_of_state = {name for kind in optimizer_kinds() for name in optimizer_entry(kind).state}
    stored = {name for name in names if name.partition("/")[0] in kinds_of_state}
    if steps == 0 and not stored:
        return []  # no update yet
    for shard in shards:  # a head of another shape begins anew, and its state with it
        keys = {f"{kind}/{shard.name}": kind for kind in optimizer.state_names(shard.name)}
        if shard.name.startswith(HEADS) and any(
            tuple(reader.shape(key)) != tuple(optimizer.state_shape(kind, shard))
            for key, kind in keys.items()
            if key in stored
        ):
            stored -= keys.keys()
    missing, extra = [key for key in wanted if key not in stored], sorted(stored - set(wanted))
    wrong, unknown = ([key for key in keys if not _is_head(key)] for keys in (missing, extra))
    if (wrong or unknown) and not allow_changes:
        raise UserError(
            f"{reader.folder}: not the optimizer state of this configuration: {len(wrong)} missing "
            f"({', '.join(wrong[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])}); resume with the "
            "optimizer of the run, or change it in a stage"
        )
    with reader.kept_open():
        _fill_optimizer(shards, optimizer, reader, steps, stored)
    return _kinds_of("optimizer state that starts at zero", missing) + _kinds_of(
        "optimizer state dropped", extra
    )


def _fill_optimizer(
    shards: list[Shard],
    optimizer: TrainingOptimizer,
    reader: CheckpointReader,
    steps: int,
    stored: Set[str],
) -> None:
    """The state that is `stored` of this rank's masters; what is not starts at zero."""
    names = set(reader.names())
    for master in masters(shards):
        held = [shard for shard in shards if shard.master is master]
        kinds = {f"{kind}/{shard.name}" for shard in held for kind in optimizer.state_names(shard.name)}
        if not kinds & stored:
            continue  # the optimizer begins it at its first step
        updates = max(_read_updates(reader, shard.name, names, steps) for shard in held)
        optimizer.begin(master, held[0].name, updates)
        for shard in held:
            for kind, _, start, data in optimizer.stored(shard, written=False):
                key = f"{kind}/{shard.name}"
                if key in stored and data.numel():
                    data.copy_(reader.read(key, start, data.numel()))


def _read_updates(reader: CheckpointReader, name: str, names: Set[str], steps: int) -> int:
    if f"updates/{name}" in names:
        return int(reader.tensor(f"updates/{name}"))
    return steps


def _kinds_of(what: str, keys: list[str]) -> list[str]:
    kinds = Counter(key.partition("/")[0] for key in keys)
    parts = ", ".join(f"{kind} of {count} parameters" for kind, count in kinds.items())
    return [f"{what}: {parts}"] if parts else []


@torch.no_grad()
def load_ema(shards: list[Shard], ema: EmaWeights, reader: CheckpointReader) -> None:
    """Recreate the averages; those that the checkpoint lacks stay at the weights."""
    stored = set(reader.names())
    with reader.kept_open():
        for shard in shards:
            for name in ema.names:
                key = f"{name}/{shard.name}"
                if key in stored and not (_is_head(key) and tuple(reader.shape(key)) != tuple(shard.shape)):
                    _fill(shard, ema.of(shard.master, name), reader, name)


def _fill(shard: Shard, like_master: Tensor, reader: CheckpointReader, kind: str) -> None:
    if shard.count:
        shard.of(like_master).copy_(reader.read(f"{kind}/{shard.name}", shard.start, shard.count))


def require_same_autoencoder(reader: CheckpointReader, tuned: bool) -> None:
    """Raise UserError unless the checkpoint's run tuned its autoencoder, if this one does, or did not."""
    if holds_autoencoder(reader) != tuned:
        state = "an untuned" if tuned else "a tuned"
        raise UserError(
            f"{reader.folder} was trained with {state} autoencoder, but "
            f"conditioning.autoencoder.tuning.enabled is {str(tuned).lower()}; it holds for the whole run: "
            "start another one with run.init_from"
        )


def holds_autoencoder(reader: CheckpointReader) -> bool:
    """Whether the checkpoint is of a run that tunes its autoencoder."""
    return any(name.startswith(TUNED_AUTOENCODER) for name in reader.names())
