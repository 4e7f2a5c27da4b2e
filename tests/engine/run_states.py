"""What runs have left behind: copies of them as they stood, and the tensors of their newest checkpoint."""

import shutil

import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader


def newest(run):
    return CheckpointReader(list_checkpoints(run / "checkpoints")[-1][1])


def tensors(run):
    reader = newest(run)
    return {name: reader.tensor(name) for name in reader.names()}


def copy_until(run, step, target):
    """A copy of a run as it stood at `step`."""
    shutil.copytree(run, target)
    for later, folder in list_checkpoints(target / "checkpoints"):
        if later > step:
            shutil.rmtree(folder)
    return target


def assert_equal_states(found, wanted):
    found, wanted = tensors(found), tensors(wanted)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
