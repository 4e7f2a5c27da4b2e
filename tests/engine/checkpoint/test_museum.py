"""Checkpoints of earlier versions: each is resumed, sampled and exported by this one.

`museum/contents.json` says of each what it is of and by which commit it was made, and the losses of the two
steps that its own version trained after it. A change of what a checkpoint holds adds one; none is ever made
anew.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.meta_format import FORMAT
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from tests.engine.jobs import Job

MUSEUM = Path(__file__).parent / "museum"
CONTENTS = json.loads((MUSEUM / "contents.json").read_text())

every_item = pytest.mark.parametrize("name", CONTENTS)


def run_of(name, tmp_path):
    """A run's folder with one item as its checkpoint, and the configuration that the run had."""
    run = tmp_path / "run"
    shutil.copytree(MUSEUM / name, run / "checkpoints" / "step-00000002")
    config = json.loads((MUSEUM / name / "meta.json").read_text())["config"]
    return run, config | {"run": config["run"] | {"output_dir": str(run)}}


def test_every_format_is_here_and_every_item_is_in_the_table():
    stored = [json.loads(path.read_text()).get("format", 1) for path in MUSEUM.glob("*/meta.json")]
    assert set(stored) == set(range(1, FORMAT + 1))
    assert {path.name for path in MUSEUM.iterdir() if path.is_dir()} == CONTENTS.keys()


@every_item
def test_it_is_whole(name):
    reader = CheckpointReader(MUSEUM / name)
    reader.verify(sound=True)
    assert (reader.step, reader.meta["samples"]) == (2, 4)
    assert reader.written_by.startswith("0.1.0")


@every_item
@pytest.mark.slow
def test_it_is_resumed(runs, name, tmp_path):
    run, config = run_of(name, tmp_path)
    ((result,),) = runs.forked([Job(name, config, resume="auto")]).values()
    assert result.error is None
    losses = [record["loss"] for record in runs.log(run)]
    assert losses == pytest.approx(CONTENTS[name]["losses"], rel=1e-4)
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [2, 4]


@every_item
@pytest.mark.slow
def test_it_is_sampled_and_exported(runs, name, tmp_path):
    run, _ = run_of(name, tmp_path)
    words = ("--checkpoint", run, "--prompt", "a cup", "--steps", "2", "--grid", tmp_path / "grid.png")
    done = runs.script("sample", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()
    done = runs.script("export", "--checkpoint", run, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    average = CheckpointReader(MUSEUM / name).tensor("ema/img_in.weight")
    assert any(torch.equal(tensor, average) for tensor in weights.values() if tensor.shape == average.shape)
