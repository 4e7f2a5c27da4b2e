"""Whatever a user gives that cannot be used ends in one line that says so, and exit code 2."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from millrace.engine.config.loading import merge


@pytest.fixture(scope="module")
def world(runs, tmp_path_factory):
    """Folders of pictures with one fault each, a finished run, and a file where a folder should be."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for name in ("good", "uncaptioned", "truncated", "small"):
        folder = root / name
        folder.mkdir()
        for i in range(3):
            size = 8 if name == "small" and i == 1 else 64
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
            if not (name == "uncaptioned" and i == 1):
                (folder / f"{i}.txt").write_text("noise")
    picture = root / "truncated" / "1.jpg"
    picture.write_bytes(picture.read_bytes()[:700])
    (root / "empty").mkdir()
    (root / "file").write_text("")
    (root / "broken.json").write_text('{"run": {')
    assert runs.here(root / "finished", {"run": {"steps": 1}}).error is None
    return root


def folder(name):
    return {"data": {"source": "folder", "path": f"ROOT/{name}"}}


def ds(**section):
    return {"deepspeed": section}


CASES = {
    "unknown key": ({"optimizer": {"learning_rate": 1}}, (), ["optimizer.learning_rate", "valid keys: "]),
    "misspelt key": ({"model": {"widht": 64}}, (), ["model.widht", "did you mean 'width'"]),
    "wrong type": ({"run": {"steps": "many"}}, (), ["run.steps", "'many'"]),
    "out of range": ({"optimizer": {"lr": -1.0}}, (), ["optimizer.lr", "-1.0"]),
    "heads": ({"model": {"heads": 5}}, (), ["model", "width 32 is not divisible by heads 5"]),
    "no dataset": (folder("nowhere"), (), ["ROOT/nowhere", "no such folder", "data.path"]),
    "no pictures": (folder("empty"), (), ["ROOT/empty", "no pictures"]),
    "no caption": (folder("uncaptioned"), (), ["ROOT/uncaptioned/1.jpg", "1.txt"]),
    "truncated picture": (folder("truncated"), (), ["ROOT/truncated/1.jpg", "data.max_bad_share"]),
    "small picture": (folder("small"), (), ["1.jpg", "8x8", "data.upscale"]),
    "own deepspeed key": (ds(bf16={"enabled": True}), (), ["deepspeed.bf16", "precision.compute"]),
    "unknown deepspeed key": (ds(zero_optimisation={}), (), ["zero_optimisation", "'zero_optimization'"]),
    "misspelt ZeRO key": (
        ds(zero_optimization={"stage": 2, "reduce_buckt_size": 5}),
        (),
        ["deepspeed", "reduce_buckt_size"],
    ),
    "no such stage": (ds(zero_optimization={"stage": 4}), (), ["zero_optimization.stage is 4"]),
    "master with a stage": (
        {"precision": {"master": "bfloat16", "compute": "bfloat16"}, **ds(zero_optimization={"stage": 1})},
        (),
        ["precision.master bfloat16", "zero_optimization.stage to 0"],
    ),
    "no CUDA": ({"run": {"device": "cuda"}}, (), ["run.device is cuda", "set run.device to cpu"]),
    "does not fit": (
        {"model": {"width": 3584, "depth": 28, "heads": 56}, "data": {"resolution": 1024}},
        (),
        ["GB per process", "weights", "Adam moments", "free", "data.micro_batch"],
    ),
    "indivisible batch": ({"data": {"global_batch": 7}}, (), ["global_batch 7", "micro_batch 2"]),
    "indivisible resolution": ({"data": {"resolution": 18}}, (), ["data.resolution 18"]),
    "channels": ({"model": {"in_channels": 16}}, (), ["model.in_channels is 16"]),
    "used folder": ({"run": {"output_dir": "ROOT/finished"}}, (), ["ROOT/finished", "--resume auto"]),
    "other width": (
        {"run": {"output_dir": "ROOT/finished"}, "model": {"width": 64}},
        ("--resume", "auto"),
        ["ROOT/finished", "resume with the configuration of the run"],
    ),
    "other depth": (
        {"run": {"output_dir": "ROOT/finished"}, "model": {"depth": 3}},
        ("--resume", "auto"),
        ["ROOT/finished", "missing"],
    ),
    "no such step": (
        {"run": {"output_dir": "ROOT/finished"}},
        ("--resume", "77"),
        ["no checkpoint of step 77", "published steps: 1"],
    ),
    "resume from nowhere": ({}, ("--resume", "ROOT/nowhere"), ["ROOT/nowhere", "no such checkpoint folder"]),
    "output is a file": (
        {"run": {"output_dir": "ROOT/file"}},
        (),
        ["ROOT/file: cannot be written", "run.output_dir"],
    ),
    "output below a file": (
        {"run": {"output_dir": "ROOT/file/run"}},
        (),
        ["ROOT/file/run: cannot be written", "run.output_dir"],
    ),
    # Not even root may make a folder there.
    "output not writable": (
        {"run": {"output_dir": "/proc/millrace"}},
        (),
        ["/proc/millrace: cannot be written", "run.output_dir"],
    ),
    "weights from nowhere": ({"run": {"init_from": "ROOT/nowhere"}}, (), ["ROOT/nowhere"]),
    "bad override": ({}, ("--set", "run.steps"), ["--set run.steps", "section.key=value"]),
}
AS_A_PROCESS = ("misspelt key", "truncated picture")
"""One that ends before there is a run, one that ends a run; the others ran the same file in a fork."""


def settle(value, root):
    """Put the folder of this test session into a case."""
    return json.loads(json.dumps(value).replace("ROOT", str(root)))


def check(code, err, said):
    """Exit code 2, and exactly one line that begins with `error:`, the last, which says all of `said`."""
    assert code == 2, err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], err
    for part in said:
        assert part in lines[-1]


OURS = {
    "fp16": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision",
    "communication_data_type": "precision.reduce",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_clipping": "optimizer.clip",
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch and data.micro_batch",
    "activation_checkpointing": "run.activation_checkpointing",
    "steps_per_print": "logging.every_steps",
}
"""Keys of DeepSpeed that follow from ours, and the place to set them."""
CASES |= {
    f"deepspeed.{key}": (ds(**{key: 1}), (), [f"deepspeed.{key} conflicts", f"which sets it from {place};"])
    for key, place in OURS.items()
}


@pytest.fixture(scope="module")
def ended(runs, world, tmp_path_factory):
    """What the command did with each case."""
    root = tmp_path_factory.mktemp("cases")
    found = {}
    for name, case in CASES.items():
        changes, arguments, _ = settle(case, world)
        config = root / f"{name}.json"
        config.write_text(json.dumps(merge(runs.values(root / f"{name}-run"), changes)))
        found[name] = runs.script("train", "--config", config, *arguments)
    for name in ("broken", "absent"):
        found[name] = runs.script("train", "--config", world / f"{name}.json")
    several = root / "several.json"
    several.write_text(json.dumps(runs.values(root / "run", {"run": {"stepz": 1}, "model": {"widht": 1}})))
    return found | {"several": runs.script("train", "--config", several)}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(world, ended, name):
    check(ended[name].returncode, ended[name].stderr, settle(CASES[name], world)[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_A_PROCESS)
def test_the_real_command_does_the_same(runs, world, tmp_path, name):
    changes, arguments, said = settle(CASES[name], world)
    done = runs.finish(runs.command(tmp_path / "run", changes, arguments=tuple(arguments)))
    check(done.returncode, done.stderr, said)


def test_a_configuration_that_is_not_json(ended):
    check(ended["broken"].returncode, ended["broken"].stderr, ["broken.json", "not valid JSON"])
    check(ended["absent"].returncode, ended["absent"].stderr, ["absent.json", "no such"])


def test_several_mistakes_are_told_at_once(ended):
    lines = ended["several"].stderr.splitlines()
    assert ended["several"].returncode == 2
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_a_bad_picture_is_passed_over_where_tolerated(runs, world, tmp_path, caplog):
    changes = merge(settle(folder("truncated"), world), {"data": {"max_bad_share": 0.4}, "run": {"steps": 2}})
    assert runs.here(tmp_path / "run", changes).error is None
    assert caplog.text.count("1.jpg") == 1


def test_a_folder_of_good_pictures_trains(runs, world, tmp_path):
    copy = shutil.copytree(world / "good", tmp_path / "good")
    changes = {"data": {"source": "folder", "path": str(copy)}, "run": {"steps": 2}}
    assert runs.here(tmp_path / "run", changes).error is None
    assert len(runs.log(tmp_path / "run")) == 2
