"""A process alone; agreements of two run in test_signals.py, test_trainer.py and test_resume.py."""

import os

import pytest
import torch

from millrace.engine.distributed import process_group
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process_group.choose_device("auto") == CPU
    assert process_group.choose_device("cpu") == CPU
    with pytest.raises(UserError, match=r"run\.device is cuda"):
        process_group.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process_group.choose_device("auto") == torch.device("cuda", 3)
    assert process_group.choose_device("cuda") == torch.device("cuda", 3)
    assert process_group.choose_device("cpu") == CPU


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pytorch_has_the_cores_of_a_process(device, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(process_group, "_training", [None])  # this job has been joined
    monkeypatch.setattr(process_group, "_tell_deepspeed", lambda _: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    job = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "8"}
    for name, value in (job | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    process_group.initialize(torch.device(device))
    assert threads == []  # OMP_NUM_THREADS is set
    monkeypatch.delenv("OMP_NUM_THREADS")
    process_group.initialize(torch.device(device))
    assert threads == [process_group.cores_here()] == [12]


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch):
    """Under `srun --gpus-per-task=1` each task's GPU is its number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process_group.choose_device("auto") == torch.device("cuda", 0)


def test_deepspeed_takes_the_local_rank_for_the_gpu(monkeypatch):
    monkeypatch.setattr(process_group, "_on_machine", [])
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")  # DeepSpeed requires it to be the same
    process_group._tell_deepspeed(torch.device("cuda", 0))
    process_group._tell_deepspeed(torch.device("cuda", 0))
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    assert process_group.local_rank() == 3


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_SIZE", "8")
    with pytest.raises(UserError, match="local rank 4 has no GPU: 8 processes on this machine see 4"):
        process_group.choose_device("auto")


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: type("Card", (), {"uuid": "GPU-7"})()
    )
    monkeypatch.setattr(process_group, "gather_objects", lambda card: [card, ("other", "GPU-7"), card])
    with pytest.raises(UserError, match=r"ranks 0 and 2 both have GPU GPU-7 of "):
        process_group._require_own_gpus(torch.device("cuda", 0))


def test_the_training_group_waits_as_long_as_the_docs_say():
    """DeepSpeed's own would wait 10 minutes with NCCL."""
    from deepspeed.utils import groups

    process_group.initialize(CPU)
    group = process_group.training_group()
    assert groups._get_data_parallel_group() is group
    for each in (group, torch.distributed.group.WORLD, process_group._host_group()):
        assert each._get_backend(CPU).options._timeout == process_group.TIMEOUT


def test_an_address_that_other_machines_cannot_reach_is_refused(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_SIZE", "8")
    there = {"value": "127.0.1.1"}
    monkeypatch.setattr(
        process_group.socket, "getaddrinfo", lambda *_: [(None, None, None, "", (there["value"], 0))]
    )
    process_group._check_address()  # one machine
    monkeypatch.setenv("LOCAL_SIZE", "4")
    with pytest.raises(UserError, match=r"resolves to 127\.0\.1\.1, .* set GLOO_SOCKET_IFNAME"):
        process_group._check_address()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    process_group._check_address()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    there["value"] = "10.0.0.7"
    process_group._check_address()


def test_alone_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    process_group.initialize(CPU)
    process_group.initialize(CPU)  # a second run in the same process joins the same job
    assert (process_group.rank(), process_group.world_size(), process_group.local_rank()) == (0, 1, 0)
    assert torch.distributed.get_backend() == "gloo"
    assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("flag", [True, False])
def test_one_process_agrees_with_itself(flag):
    assert process_group.any_rank(flag) is flag
    assert process_group.all_ranks(flag) is flag
    assert process_group.gather_objects({"a": flag}) == [{"a": flag}]
    process_group.wait_for_all()
