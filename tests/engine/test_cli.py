"""Every command answers help and mistakes at once, in one line, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.engine import cli
from millrace.engine.util.errors import UserError
from tests.programs import environment

ENGINE = Path(cli.__file__).resolve().parent
HEAVY = ("torch", "triton", "deepspeed", "numpy", "PIL", "diffusers", "transformers")
SECONDS = 2.0
"""Of processor time, several times what it takes: the bound is on what is imported, not on the machine."""

PROBE = f"""
import json, resource, sys
from millrace.engine import cli
try:
    cli.main()
except SystemExit as end:
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([end.code, used.ru_utime + used.ru_stime, heavy]), file=sys.__stdout__)
"""

MODEL = ["--checkpoint", "FOLDER"]
BAD = ["--set", "run.stepz=3"]
PLANNED = ["--config", "quickstart", "--device", "rtx4900"]
CASES = {
    "train": ([], [["--config", "quickstart", *BAD], ["--config", "quickstat"], ["--plan", "0"]]),
    "sample": (
        ["--prompt", "a fox", "--grid", "x.png"],
        [[*MODEL, *BAD], ["--checkpoint", "nowhere"], [*MODEL, "--size", "3"], [*MODEL, "--config", "no"]],
    ),
    "evaluate": ([], [[*MODEL, *BAD], ["--checkpoint", "nowhere"], [*MODEL, "--samples", "many"]]),
    "export": (
        [],
        [["--checkpoint", "nowhere", "--output", "x"], [*MODEL, "--output", "x", "--dtype", "int8"]],
    ),
    "prepare": (
        ["--output", "x"],
        [["--input", "nowhere", "--resolution", "64"], ["--input", "FOLDER", "--resolution", "abc"]],
    ),
    "cache": (
        ["--dataset", "FOLDER"],
        [["text", "--config", "quickstart", *BAD], ["text", "--config", "quickstat"], ["pixels"]],
    ),
    "plan": ([], [["--config", "quickstart", *BAD], ["--config", "quickstat"], ["--gpus", "0"], PLANNED]),
    "compare": ([], [["nowhither", "other"], ["FOLDER", "other"], ["single"], ["FOLDER", "FOLDER"]]),
    "replay": (["--step", "3"], [["nowhere"], ["FOLDER"], ["x", "--step", "0"]]),
}
"""Words of every call of a command, and those of calls that are refused."""
SAID = {
    ("--set", "run.stepz=3"): "--set run.stepz=3: unknown key 'run.stepz'; did you mean 'steps'?",
    ("--config", "quickstat"): "quickstat: no such configuration file; did you mean quickstart?",
    ("--checkpoint", "nowhere"): "--checkpoint nowhere: no such file or folder",
    ("--input", "nowhere"): "--input nowhere: no such file or folder",
    ("--resolution", "abc"): "--resolution: 'abc' is not a whole number from 1 to 65535",
    ("--plan", "0"): "--plan: '0' is not a whole number of 1 or more",
    ("--gpus", "0"): "--gpus: '0' is not a whole number of 1 or more",
    ("--device", "rtx4900"): "--device: 'rtx4900' is unknown; did you mean 'rtx4090'?",
    ("nowhither", "other"): "RUN nowhither: no such file or folder",
    ("FOLDER", "other"): "no run: config.json is missing or cannot be read",
    ("single",): "RUN: give two runs or more (millrace compare --help)",
    ("FOLDER", "FOLDER"): "given twice",
    ("3", "nowhere"): "RUN nowhere: no such file or folder",
    ("3", "FOLDER"): "no run: config.json is missing or cannot be read",
    ("--step", "0"): "--step: '0' is not a whole number of 1 or more",
    ("--size", "3"): "--size: '3': write it as HEIGHTxWIDTH",
    ("--samples", "many"): "--samples: 'many' is not a whole number of 2 or more",
    ("--dtype", "int8"): "--dtype: invalid choice: 'int8'",
    ("--config", "no"): "no: no such configuration file",
    ("--hlep",): "--hlep: no such argument; did you mean '--help'? (millrace train --help)",
    ("pixels",): "KINDS: pixels: 'pixels' is no cache; give text, latents or both",
}
"""What is said of which words."""
REFUSED = [(name, [*common, *words]) for name, (common, calls) in CASES.items() for words in calls]
REFUSED += [("train", ["--hlep"])]


def call(folder, *words):
    """(exit code, lines of stdout, lines of stderr, seconds, heavy modules) of `millrace WORDS`."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *(str(folder) if word == "FOLDER" else word for word in words)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    *out, last = done.stdout.splitlines()
    code, seconds, heavy = json.loads(last)
    return code, out, done.stderr.splitlines(), seconds, heavy


def test_every_command_is_tried():
    assert set(CASES) == set(cli.COMMANDS)


@pytest.mark.parametrize(
    "words", [[], *([name] for name in cli.COMMANDS), ["prepare", "verify"]], ids=" ".join
)
def test_help(words, tmp_path):
    code, out, err, seconds, heavy = call(tmp_path, *words, "--help")
    assert (code, err, heavy) == (0, [], [])
    assert out[0].startswith(" ".join(["usage: millrace", *words]))
    assert seconds < SECONDS


@pytest.mark.parametrize(("name", "words"), REFUSED, ids=[f"{n} {' '.join(w)}" for n, w in REFUSED])
def test_a_mistake_is_one_line(name, words, tmp_path):
    code, out, err, seconds, heavy = call(tmp_path, name, *words)
    assert (code, out, heavy) == (2, [], [])
    (line,) = err
    assert line.startswith("error: ")
    wanted = [said for key, said in SAID.items() if f" {' '.join(key)} " in f" {' '.join(words)} "]
    assert wanted
    assert all(said in line for said in wanted)
    assert seconds < SECONDS


def test_print_config_needs_no_torch(tmp_path):
    code, out, err, seconds, heavy = call(
        tmp_path, "train", "--config", "jit_1024_tread", "--set", "run.steps=3", "--print-config"
    )
    assert (code, err, heavy) == (0, [], [])
    assert json.loads("\n".join(out))["run"]["steps"] == 3
    assert seconds < SECONDS


def test_versions_are_read_without_an_import(tmp_path):
    code, out, _, _, heavy = call(tmp_path, "--version")
    assert (code, heavy) == (0, [])
    assert [line.split()[0] for line in out] == ["millrace", "torch", "triton", "deepspeed"]


def test_an_unknown_command_and_none():
    with pytest.raises(UserError, match="trian: no such command; did you mean 'train'"):
        cli.dispatch(["trian"])
    with pytest.raises(UserError, match="which command"):
        cli.dispatch([])


def test_a_script_s_folder_shadows_no_package(tmp_path):
    """engine/data must not answer to `import data` when a file of engine/ is run."""
    probe = (
        "import runpy, sys, importlib.util\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(importlib.util.find_spec('data'))"
    )
    for name in cli.COMMANDS:
        words = [sys.executable, "-c", probe, str(ENGINE / f"{name}.py")]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(f"usage: millrace {name}")
        assert done.stdout.splitlines()[-1] == "None"


def test_sizes_in_bytes():
    sizes = {"256M": 256 * 2**20, "1g": 2**30, "500": 500, "0.5K": 512}
    assert {text: cli.byte_count(text) for text in sizes} == sizes
    for text in ("", "M", "x", "-1", "0", "nan", "1e30"):
        with pytest.raises(cli.argparse.ArgumentTypeError, match="is not a size"):
            cli.byte_count(text)


def test_numbers_in_a_range():
    assert cli.number(int, 1)("7") == 7
    assert cli.number(float, 0, 1)("0.5") == 0.5
    for kind, low, high, text in (
        (int, 1, None, "0"),
        (int, 1, 9, "1.5"),
        (float, 0, 1, "nan"),
        (float, 0, 1, "2"),
    ):
        with pytest.raises(cli.argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            cli.number(kind, low, high)(text)
