"""Rank variables of every launcher, and what is refused."""

import pytest

from millrace.engine.distributed.launchers import expand_hosts, rank_variables
from millrace.engine.util.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-a-7@1",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "gpu08",
    "MASTER_PORT": "29500",
}


def ranks(variables):
    found = rank_variables(variables)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return tuple(int(found[name]) for name in names), found["MASTER_ADDR"]


def test_no_launcher():
    assert rank_variables({"HOME": "/root"}) == {}


def test_torchrun_and_deepspeed_are_left_as_they_are():
    assert rank_variables(TORCHRUN) == {}
    assert rank_variables(TORCHRUN | {"SLURM_NTASKS": "2"}) == {}


def test_slurm():
    assert ranks(SRUN) == ((5, 8, 1, 4), "gpu08")
    assert ranks(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,6"}) == ((5, 8, 1, 6), "gpu08")
    without = {k: v for k, v in SRUN.items() if k not in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")}
    assert ranks(without) == ((5, 8, 1, 4), "gpu08")


def test_tasks_of_a_step_meet_at_one_port_and_those_of_another_elsewhere():
    port = rank_variables(SRUN)["MASTER_PORT"]
    assert 12_000 <= int(port) < 30_000
    assert rank_variables(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})["MASTER_PORT"] == port
    assert rank_variables(SRUN | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != port
    assert rank_variables(SRUN | {"SLURM_JOB_ID": "4712"})["MASTER_PORT"] != port


def test_an_address_set_by_hand_is_kept():
    found = rank_variables(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "7")


def test_one_task_of_slurm_is_a_process_alone():
    assert rank_variables({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == {}


def test_open_mpi():
    assert ranks(OPEN_MPI) == ((1, 2, 1, 2), "127.0.0.1")
    assert (
        rank_variables(
            OPEN_MPI
            | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
            | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
        )
        == {}
    )
    far = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    assert ranks(far | {"MASTER_ADDR": "gpu08"}) == ((1, 4, 1, 2), "gpu08")
    with pytest.raises(UserError, match=r"several machines.*MASTER_ADDR.*mpirun -x MASTER_ADDR"):
        rank_variables(far)


def test_mpirun_inside_an_allocation_of_slurm_is_mpirun():
    """Its daemons are tasks of srun, one a machine, so Slurm's ranks are not those of the processes."""
    assert ranks(OPEN_MPI | SRUN)[0] == (1, 2, 1, 2)


def test_pmi():
    given = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert ranks(given) == ((1, 2, 1, 2), "127.0.0.1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"SLURM_NTASKS": "8"}, r"Slurm says 8 tasks, but SLURM_PROCID is not set"),
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
            r"8 tasks, but SLURM_STEP_NODELIST is not set, so srun did not start this process",
        ),
        (SRUN | {"SLURM_PROCID": "8"}, r"Slurm says rank 8 of 8 .* contradict each other"),
        (SRUN | {"SLURM_LOCALID": "4"}, r"4 of 4 on this machine, which contradict"),
        (SRUN | {"SLURM_PROCID": "x"}, r"SLURM_PROCID is 'x', not a number"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8"}, r"do not say how many tasks this machine has"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[a-b]"}, r"'a-b' is not a number or a range"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"Open MPI started several tasks, but OMPI_COMM_WORLD_RANK, "),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, r"MPI started several tasks, but MPI_LOCALRANKID"),
        ({"RANK": "0"}, r"RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "8"}, r"rank 8 of 8"),
        (
            TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"},
            r"srun started 2 tasks, and torchrun made a job",
        ),
    ],
)
def test_refused(given, said):
    with pytest.raises(UserError, match=said) as refused:
        rank_variables(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("a.b-c,d", ["a.b-c", "d"]),
        ("gpu[08-10,3],login", ["gpu08", "gpu09", "gpu10", "gpu3", "login"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
    ],
)
def test_host_lists(text, hosts):
    assert list(expand_hosts(text)) == hosts
