"""Rank variables of the launchers: torchrun and `deepspeed` set them; those of Slurm and MPI are translated.

    torchrun, deepspeed     RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE or LOCAL_SIZE, MASTER_ADDR, _PORT
    mpirun of Open MPI      OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
    srun                    SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE,
                            SLURM_STEP_NODELIST, whose first host is rank 0's
    mpiexec (MPICH, Intel)  PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS

The first row whose variables are there counts: what is nearest to the process. MASTER_ADDR and MASTER_PORT
that are set by hand are kept; MPI on several machines needs MASTER_ADDR.
"""

import os
import re
import zlib
from collections.abc import Iterator, Mapping

from millrace.engine.util.errors import UserError

_FIRST_PORT, _PORTS = 12_000, 18_000
"""Ports below those that Linux hands out by itself (32,768 to 60,999)."""

_REMEDY = "start it with srun, mpirun or torchrun, so that every process knows its rank"


def read_launcher() -> bool:
    """Set the rank variables that torch reads from those of Slurm or MPI; whether this is a job's rank.

    Raises UserError as `rank_variables` does.
    """
    os.environ.update(rank_variables(os.environ))
    return "RANK" in os.environ


def rank_variables(given: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT that are missing in `given`.

    Empty for a process without a launcher, and where a launcher has set them. Raises UserError for several
    tasks that do not know their ranks, and for variables that contradict each other.
    """
    if "RANK" in given:
        return _complete(given)
    if "OMPI_COMM_WORLD_SIZE" in given:
        found = _numbers(given, "Open MPI", *(f"OMPI_COMM_WORLD_{n}" for n in _OPEN_MPI))
        return _with_address(given, found, given.get("PMIX_NAMESPACE", "openmpi"), "mpirun -x")
    if "SLURM_NTASKS" in given or "SLURM_STEP_NUM_TASKS" in given:
        return _slurm(given)
    if "PMI_SIZE" in given:
        found = _numbers(given, "MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        return _with_address(given, found, given.get("PMI_ID", "pmi"), "mpiexec -genv")
    return {}


_OPEN_MPI = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")


def _complete(given: Mapping[str, str]) -> dict[str, str]:
    """Check what a launcher has set."""
    absent = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in given]
    if absent:
        raise UserError(f"RANK is set, but not {', '.join(absent)}; set all of them, or none: {_REMEDY}")
    _check("the launcher", *(_number(given, name) for name in ("RANK", "WORLD_SIZE")))
    tasks = given.get("SLURM_STEP_NUM_TASKS", "1")
    if given.get("GROUP_WORLD_SIZE") == "1" and tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} tasks, and torchrun made a job of its own in each of them; give torchrun "
            "--nnodes and --rdzv-endpoint, or leave torchrun out: srun alone gives the ranks"
        )
    return {}


def _slurm(given: Mapping[str, str]) -> dict[str, str]:
    """Variables of a task of `srun`."""
    tasks = _number(given, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS")
    if tasks <= 1:
        return {}
    hosts = given.get("SLURM_STEP_NODELIST", "")
    if "SLURM_PROCID" not in given or not hosts:
        missing = "SLURM_STEP_NODELIST" if "SLURM_PROCID" in given else "SLURM_PROCID"
        raise UserError(
            f"Slurm says {tasks} tasks, but {missing} is not set, so srun did not start this process; "
            f"{_REMEDY} (srun --ntasks=1 for one process)"
        )
    names = list(expand_hosts(hosts))
    sizes = list(_tasks_per_node(given.get("SLURM_STEP_TASKS_PER_NODE", "")))
    if not sizes and tasks % len(names) == 0:
        sizes = [tasks // len(names)] * len(names)
    node = _number(given, "SLURM_NODEID") if "SLURM_NODEID" in given else None
    if node is None and len(set(sizes)) == 1:
        node = 0
    if node is None or node >= len(sizes):
        raise UserError(
            f"Slurm's variables do not say how many tasks this machine has (SLURM_STEP_NODELIST {hosts}, "
            f"SLURM_STEP_TASKS_PER_NODE {given.get('SLURM_STEP_TASKS_PER_NODE', 'not set')}); {_REMEDY}"
        )
    found = (_number(given, "SLURM_PROCID"), tasks, _number(given, "SLURM_LOCALID"), sizes[node])
    _check("Slurm", *found)
    job, step = (given.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    address = {
        "MASTER_ADDR": given.get("MASTER_ADDR", names[0]),
        "MASTER_PORT": given.get("MASTER_PORT", str(_port(f"{job}.{step}"))),
    }
    return _named(found) | address


def _with_address(
    given: Mapping[str, str], found: tuple[int, int, int, int], job: str, how: str
) -> dict[str, str]:
    """Variables of an MPI task; MPI does not say where rank 0 is."""
    if found[1] == 1:
        return {}
    if found[1] > found[3] and "MASTER_ADDR" not in given:
        raise UserError(
            f"MPI started {found[1]} processes on several machines, and does not say where rank 0 is; set "
            f"MASTER_ADDR to that machine's name ({how} MASTER_ADDR ...)"
        )
    address = {
        "MASTER_ADDR": given.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": given.get("MASTER_PORT", str(_port(job))),
    }
    return _named(found) | address


def _named(found: tuple[int, int, int, int]) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {name: str(value) for name, value in zip(names, found, strict=True)}


def _numbers(given: Mapping[str, str], launcher: str, *names: str) -> tuple[int, int, int, int]:
    absent = [name for name in names if name not in given]
    if absent:
        raise UserError(f"{launcher} started several tasks, but {', '.join(absent)} is not set; {_REMEDY}")
    found = tuple(_number(given, name) for name in names)
    _check(launcher, *found)
    return found


def _number(given: Mapping[str, str], name: str) -> int:
    text = given.get(name)
    if text is None or not text.isdecimal():
        raise UserError(f"{name} is {'not set' if text is None else repr(text)}, not a number; {_REMEDY}")
    return int(text)


def _check(launcher: str, rank: int, size: int, local: int = 0, here: int = 1) -> None:
    if not (rank < size and local < here <= size):
        raise UserError(
            f"{launcher} says rank {rank} of {size} and {local} of {here} on this machine, which contradict "
            f"each other; {_REMEDY}"
        )


def _port(job: str) -> int:
    """A port that all tasks of a job compute alike, and another job on the machine probably does not."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def expand_hosts(text: str) -> Iterator[str]:
    """Names of a Slurm host list: `gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login.

    Several brackets multiply: `rack[1-2]node[1-2]`. Raises UserError for what is not a host list.
    """
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        yield from _expand(part, text)


def _expand(part: str, whole: str) -> Iterator[str]:
    found = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", part)
    if found is None:
        if not re.fullmatch(r"[\w.-]+|", part):
            raise UserError(f"SLURM_STEP_NODELIST {whole!r}: {part!r} is not a host name or a range of them")
        yield part
        return
    before, ranges, after = found.groups()
    for one in ranges.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", one)
        if ends is None:
            raise UserError(f"SLURM_STEP_NODELIST {whole!r}: {one!r} is not a number or a range of them")
        first, last = ends[1], ends[2] or ends[1]
        for number in range(int(first), int(last) + 1):
            for rest in _expand(after, whole):
                yield f"{before}{number:0{len(first)}d}{rest}"


def _tasks_per_node(text: str) -> Iterator[int]:
    """`8(x2),4` -> 8, 8, 4."""
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        for _ in range(int(repeat or 1)):
            yield int(count)
