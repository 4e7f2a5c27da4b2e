"""engine/sample.py as a command, on a trained SPRINT model with contrastive loss."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from millrace.engine import sample
from millrace.engine.losses.contrastive import MeanTarget
from millrace.engine.model.flops import sampling_flops
from millrace.engine.util.errors import UserError

CHANGES = {
    "run": {"steps": 2},
    "model": {"depth": 3},
    "routing": {"policy": "sprint", "start": 1, "end": 1, "drop": 0.5},
    "objective": {"contrastive_weight": 0.1},
    "sampling": {"steps": 2, "method": "self", "weak_drop": 0.75, "guidance": 2.0},
}


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("sprint") / "run"
    assert runs.here(output, CHANGES).error is None
    return output


@pytest.fixture
def command(trained, monkeypatch, capsys, tmp_path):
    """`command(words)` -> (stdout, stderr); two pictures unless the words say otherwise."""

    def call(*words, prompts=("--prompt", "a cat", "--prompt", "two dogs")):
        path = tmp_path / "grid.png"
        out = ("--grid", str(path)) if prompts else ()
        words = ["sample.py", "--checkpoint", str(trained), *prompts, *out, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        capsys.readouterr()
        assert sample.main() == 0
        if prompts:
            assert Image.open(path).width == 2 * (96 + 6) + 6
        return capsys.readouterr()

    return call


def test_the_run_s_own_guidance_and_its_cost(command, runs, tmp_path):
    told = command().out  # two pictures of 16 x 16 pixels
    config = runs.config(tmp_path, CHANGES)
    words = [len(prompt.split()) for prompt in ("a cat", "two dogs")]
    flops = sampling_flops(config, 16, sum(words) / 2, 1)
    assert "guidance self with scale 2 from drop 0.75 to 0" in told
    assert "4 evaluations a picture" in told
    alone = runs.config(tmp_path, CHANGES, {"sampling": {"method": "none", "weak_drop": None}})
    share = flops / sampling_flops(alone, 16, sum(words) / 2, 1)
    assert f"{share:.3g} times those without guidance" in told


def test_a_caption_and_its_seed_give_a_picture_alone_and_in_a_list(command, tmp_path):
    def drawn(*words, name):
        command(*words, "--output", tmp_path / name, prompts=())
        return [Image.open(path) for path in sorted((tmp_path / name).iterdir())]

    prompts = "--prompt", "a cat", "--prompt", "two dogs", "--prompt", "a cat"
    listed = drawn(*prompts, "--seed", 4, 7, 8, name="list")
    for place, seed in ((1, 7), (2, 8)):
        caption = prompts[2 * place + 1]
        (alone,) = drawn("--prompt", caption, "--seed", seed, name=f"alone-{seed}")
        apart = np.abs(np.asarray(alone, np.int16) - np.asarray(listed[place], np.int16))
        assert apart.max() <= 1  # a level: sums of another batch are rounded in another order
        ours, theirs = (json.loads(picture.text["millrace"]) for picture in (alone, listed[place]))
        assert ours == theirs
        assert (ours["prompts"], ours["seeds"], ours["size"]) == ([caption], [seed], [16, 16])
        assert (ours["sampling"]["steps"], ours["sampling"]["method"]) == (2, "self")
        assert "step 2" in ours["model"]
    assert (np.asarray(listed[0]) != np.asarray(listed[2])).any()
    one = drawn(*prompts, "--seed", 4, name="one")
    assert (np.asarray(one[0]) == np.asarray(one[2])).all()


def test_recall_shows_the_training_pictures_beside_the_samples(command, tmp_path):
    out = "--grid", tmp_path / "r.png", "--output", tmp_path / "r"
    told = command("--recall", "--seed", 3, *out, prompts=())
    assert re.search(r"recall: [\d.]+% of 44 training captions", told.out)
    grid = Image.open(tmp_path / "r.png")
    made = json.loads(grid.text["millrace"])
    assert (len(made["prompts"]), made["seeds"][0], made["numbers"][43]) == (44, 3, 43)
    head = min(int(row) for row in np.nonzero((np.asarray(grid)[:, 8:90] != 255).all((1, 2)))[0])
    shown = np.asarray(grid)[head + 3 : head + 96 : 6, :][:, 9:201:6]
    sample = np.asarray(Image.open(tmp_path / "r" / "00000.png"))
    assert (shown[:, -16:] == sample).all()
    assert (shown[:, :16] != sample).any()


def test_another_method_puts_the_run_s_aside(command):
    told = command("--method", "cfg", "--guidance", 3)
    assert "guidance cfg with scale 3" in told.out
    assert told.err == ""
    told = command("--method", "path_drop")
    assert "guidance path_drop" in told.out
    assert told.err.startswith("warning: sampling.method is path_drop, but routing.path_drop is 0")
    assert "no guidance" in command("--method", "none").out


def test_mean_target_there_and_back(command, tmp_path):
    path = tmp_path / "mean.safetensors"
    told = command("--compute-mean-target", path, prompts=()).out
    assert told.startswith("mean target of 22 pictures, per position, in ")
    found = MeanTarget.load(path)
    assert found.values.shape == (3, 16, 16)
    assert found.count == 22
    assert "4 evaluations" in command("--mean-target", path).out
    command("--compute-mean-target", path, "--set", "data.aspect=mixed", prompts=())
    mixed = MeanTarget.load(path).values
    assert mixed.shape == (3, 1, 1)
    torch.testing.assert_close(mixed.flatten(), found.values.mean((1, 2)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mean-target", "nowhere"), "--mean-target nowhere: no such file"),
        (("--mean-target", __file__), "cannot load the mean target"),
        (("--mean-target", __file__, "--set", "objective.contrastive_weight=0"), "which is 0 for this model"),
        (("--method", "self", "--set", "sampling.strong_drop=0.8"), "strong_drop 0.8 is not below"),
        (("--set", "sampling.interval=[1,0]"), "interval is"),
        (("--seed", "1", "2", "3"), "--seed: 3 seeds for 2 pictures; give one, or one for each"),
    ],
)
def test_refusals(command, words, message):
    with pytest.raises(UserError, match=message) as caught:
        command(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["0x0", "0x32", "32x0", "-1x32", "32X32", "32", "999999x32"])
def test_sizes_that_are_none(size, monkeypatch, capsys):
    words = ["sample.py", "--checkpoint", "x", "--prompt", "a", "--size", size, "--grid", "x.png"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        sample.main()
    assert left.value.code == 2
    assert "--size: " in capsys.readouterr().err


def test_a_prompt_that_is_not_utf8(trained, monkeypatch, tmp_path):
    words = [
        "sample.py",
        "--checkpoint",
        str(trained),
        "--prompt",
        "caf\udce9",
        "--grid",
        str(tmp_path / "x.png"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match=r"^--prompt 'caf.udce9': not UTF-8"):
        sample.main()


def test_a_prompts_file_may_begin_with_a_mark_and_hold_any_line(command, tmp_path):
    """A byte order mark is none of the caption, and only a new line ends one."""
    pictures = []
    prompts = ["a\u2028cat", "", "two dogs"]
    texts = [(".txt", "utf-8", "\n".join(prompts)), (".txt", "utf-8-sig", "\r\n".join(prompts))]
    texts.append((".jsonl", "utf-16", "\n".join(json.dumps({"caption": x}) for x in prompts if x)))
    for suffix, encoding, text in texts:
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(text.encode(encoding))
        command(prompts=("--prompts-file", str(path)))
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.txt", b"a caf\xe9", "not UTF-8 at byte 5; correct it"),
        ("empty.txt", b"\n", "no caption in it"),
        ("a.jsonl", b'"a"\n{', "line 2: not valid JSON"),
        ("gone.txt", None, "cannot be read: No such file or directory"),
    ],
)
def test_a_prompts_file_that_cannot_be_used_is_named_as_typed(command, name, data, message, tmp_path):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        command(prompts=("--prompts-file", str(path)))
    assert str(caught.value).startswith(f"--prompts-file {path}: ")
    assert "\n" not in str(caught.value)
