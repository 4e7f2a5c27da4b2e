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
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process_group.choose_device("auto") == torch.device("cuda", 3)
    assert process_group.choose_device("cuda") == torch.device("cuda", 3)
    assert process_group.choose_device("cpu") == CPU


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pytorch_has_the_cores_of_a_process(device, monkeypatch):
    import deepspeed  # before it could look for a device

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(process_group, "_host_group", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_SIZE", "8")):
        monkeypatch.setenv(name, value)
    process_group.initialize(torch.device(device))
    assert threads == []  # OMP_NUM_THREADS is set
    monkeypatch.delenv("OMP_NUM_THREADS")
    process_group.initialize(torch.device(device))
    assert threads == [process_group.cores_here()] == [12]


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
