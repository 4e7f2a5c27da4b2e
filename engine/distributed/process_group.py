"""Process group and devices: joining the job, and small agreements between ranks.

Four groups hold all ranks: torch's default group, the training group, in which DeepSpeed reduces, and on the
hosts two over gloo, one for the main threads and one for those that save. Each waits TIMEOUT for a rank that
does not come.
"""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from millrace.engine.distributed.launchers import read_launcher
from millrace.engine.util.descriptors import raise_limit
from millrace.engine.util.errors import FailedElsewhere, UserError

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the other ranks."""

T = TypeVar("T")


def rank() -> int:
    """Index of this process in the job."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process on its machine."""
    return _on_machine[0] if _on_machine else int(os.environ.get("LOCAL_RANK", 0))


def ranks_here() -> int:
    """Number of this job's processes on this machine."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cores_here() -> int:
    """Processor cores that each of this job's processes on this machine can have to itself, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


def join(wanted: str) -> torch.device:
    """Join the job on the device of `run.device`, and return it. Raises UserError."""
    read_launcher()
    raise_limit()
    device = choose_device(wanted)
    initialize(device)
    return device


def choose_device(wanted: str) -> torch.device:
    """The device of `run.device` (auto, cpu or cuda) for this rank: the GPU of its local rank.

    Where the launcher shows each task one GPU alone (CUDA_VISIBLE_DEVICES, `srun --gpus-per-task`), that one.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but torch sees no CUDA device; install a CUDA build of torch and check "
            "nvidia-smi, or set run.device to cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if seen == 1:
        return torch.device("cuda", 0)
    if local_rank() >= seen:
        raise UserError(
            f"local rank {local_rank()} has no GPU: {ranks_here()} processes on this machine see {seen} of "
            "them; start one process a GPU"
        )
    return torch.device("cuda", local_rank())


def initialize(device: torch.device) -> None:
    """Join the job: under a launcher as one of its ranks, without one as a job of one process.

    Raises UserError where the processes cannot reach each other.
    """
    if not read_launcher():
        port = _free_port()
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _tell_deepspeed(device)
    if "OMP_NUM_THREADS" not in os.environ:
        # DeepSpeed's launcher leaves all cores to every rank, and threads that share a core stall each other.
        torch.set_num_threads(cores_here())

    # Imported here because DeepSpeed chooses its accelerator at import.
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # A shared-memory all-reduce that would be compiled at first use, for a minute, to save microseconds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if _training:
        return
    _check_address()
    try:
        backend = _initialize_torch(device)
        deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
        _host_group()
        _saving_group()
        _training.append(_training_group())
    except (dist.DistError, RuntimeError) as error:
        raise UserError(_unreachable(error)) from error
    if device.type == "cuda":
        _require_own_gpus(device)


def _tell_deepspeed(device: torch.device) -> None:
    """Have LOCAL_RANK say the number of the GPU, for which DeepSpeed takes it; `local_rank` stays."""
    if not _on_machine:
        _on_machine.append(local_rank())
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(device.index)


def _initialize_torch(device: torch.device) -> str:
    """Make torch's default group; the name of its backend.

    Not left to DeepSpeed, which takes LOCAL_RANK for the number of the GPU. With torchrun's static rendezvous
    the store outlives a restart of the workers, so each attempt has keys of its own: with those of the one
    before, ranks would look for processes that are gone.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        return backend
    store, number, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=number,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" and size > 1 else None,
    )
    return backend


def _training_group() -> dist.ProcessGroup:
    """The group in which DeepSpeed reduces.

    DeepSpeed 0.19 makes it itself, with torch's default timeout (10 minutes for NCCL), unless it is there.
    """
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = dist.new_group(ranks=list(range(dist.get_world_size())), timeout=TIMEOUT)
    return groups._WORLD_GROUP


def _check_address() -> None:
    """Refuse a machine whose name gloo would resolve to an address that other machines cannot reach."""
    if int(os.environ["WORLD_SIZE"]) <= ranks_here() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        address = "no address"
    if address.startswith("127.") or address in ("::1", "no address"):
        raise UserError(
            f"{name} resolves to {address}, where the job's other machines cannot reach it; set "
            "GLOO_SOCKET_IFNAME to the network interface between them (ip -br address lists those there are)"
        )


def _unreachable(error: Exception) -> str:
    """One line for ranks that did not find each other."""
    reason = str(error).strip().partition("\n")[0]
    text = (
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot join the job at "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {reason}; check that the other ranks run"
    )
    if int(os.environ["WORLD_SIZE"]) > ranks_here():
        text += " and that GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) name the network between the machines"
    return text


def _require_own_gpus(device: torch.device) -> None:
    """Raise UserError if two ranks have one GPU, which NCCL would say in many lines. Collective."""
    card = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    cards = gather_objects(card)
    for number, other in enumerate(cards):
        first = cards.index(other)
        if first != number:
            raise UserError(
                f"ranks {first} and {number} both have GPU {other[1]} of {other[0]}; start one process a GPU"
            )


def training_group() -> dist.ProcessGroup:
    """The group of all ranks in which DeepSpeed reduces gradients, on the device that trains."""
    return _training[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_training: list[dist.ProcessGroup] = []
_on_machine: list[int] = []
"""The local rank, once LOCAL_RANK says something else."""
_host: list[dist.ProcessGroup] = []


def _host_group() -> dist.ProcessGroup:
    """Group for agreements between hosts, which must not wait for the device's queue."""
    if not _host:
        _host.append(dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _host[0]


_saving: list[dist.ProcessGroup] = []


def _saving_group() -> dist.ProcessGroup:
    """Group of the threads that save: collectives of two threads in one group would meet each other's."""
    if not _saving:
        _saving.append(dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _saving[0]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank. Collective."""
    if world_size() == 1:
        return flag
    shared = torch.tensor([int(flag)])
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=_host_group())
    return bool(shared.item())


def all_ranks(flag: bool) -> bool:
    """Whether `flag` is set on all ranks. Collective."""
    return not any_rank(not flag)


def gather_objects(value: object) -> list:
    """The values of all ranks, in rank order, on every rank. Collective."""
    return _gather(value, _host_group)


def gather_apart(value: object) -> list:
    """The same for one thread beside the main one, in a group of its own. Collective among these threads."""
    return _gather(value, _saving_group)


def _gather(value: object, group: Callable[[], dist.ProcessGroup]) -> list:
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=group())
    return values


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of the tensors of all ranks, which have one shape and dtype, on the host of every rank.
    Collective."""
    total = value.detach().cpu().clone()
    if world_size() > 1:
        dist.all_reduce(total, group=_host_group())
    return total


def lead(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; its UserError there ends all of them. Collective.

    Rank 0 raises the error itself, the others FailedElsewhere.
    """
    if world_size() == 1:
        return action()
    result, error = _try(action) if rank() == 0 else (None, None)
    return _agree(result, error)[0]


def leaders_first(action: Callable[[], T]) -> T:
    """`action` on the first rank of every machine, then on the others. Collective.

    For what may download: a machine fetches a file once, and its other ranks find it in the cache. A
    UserError of any rank ends all: the first that failed raises it, the others FailedElsewhere.
    """
    if world_size() == 1:
        return action()
    result: T | None = None
    for leads in (True, False):
        error = None
        if (local_rank() == 0) is leads:
            result, error = _try(action)
        _agree(None, error)
    return result


def _try(action: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return action(), None
    except UserError as error:
        return None, error


def _agree(value: object, error: UserError | None) -> list:
    """The values of all ranks, unless one has an error. Collective."""
    answers = gather_objects((value, None if error is None else str(error)))
    failed = next((number for number, answer in enumerate(answers) if answer[1] is not None), None)
    if failed is None:
        return [value for value, _ in answers]
    if failed == rank():
        raise error
    raise FailedElsewhere(answers[failed][1])


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier(group=_host_group())
