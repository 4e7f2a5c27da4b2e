"""Process group and devices: the launcher's variables, and small agreements between ranks."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from millrace.engine.util.errors import UserError

TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    """Index of this process in the job."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_here() -> int:
    """Number of this job's processes on this machine."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cores_here() -> int:
    """Processor cores that each of this job's processes on this machine can have to itself, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


def choose_device(wanted: str) -> torch.device:
    """The device of `run.device`: auto, cpu or cuda."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but torch sees no CUDA device; install a CUDA build of torch and check "
            "nvidia-smi, or set run.device to cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def initialize(device: torch.device) -> None:
    """Join the job: under a launcher as one of its ranks, without one as a job of one process."""
    if "RANK" not in os.environ:
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
    if "OMP_NUM_THREADS" not in os.environ:
        # DeepSpeed's launcher leaves all cores to every rank, and threads that share a core stall each other.
        torch.set_num_threads(cores_here())

    # Imported here because DeepSpeed chooses its accelerator at import.
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # A shared-memory all-reduce that would be compiled at first use, for a minute, to save microseconds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    _host_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_host: list[dist.ProcessGroup] = []


def _host_group() -> dist.ProcessGroup:
    """Group for agreements between hosts, which must not wait for the device's queue."""
    if not _host:
        _host.append(dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _host[0]


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
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of the tensors of all ranks, which have one shape and dtype, on the host of every rank.
    Collective."""
    total = value.detach().cpu().clone()
    if world_size() > 1:
        dist.all_reduce(total, group=_host_group())
    return total


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier(group=_host_group())
