"""Weights say what they mean, as a run and as exported files, and a run that starts from others is warned."""

import json

import pytest

from millrace.engine import export
from millrace.engine.checkpoint.weight_meaning import differing_meaning, meaning_of, stored_meaning
from millrace.engine.config.loading import merge, parse_config


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("meaning")
    assert runs.here(root / "run", {"run": {"steps": 1}}).error is None
    for form in ("diffusers", "prx"):
        words = ["--checkpoint", str(root / "run"), "--output", str(root / form), "--format", form]
        assert export.main(words) == 0
    (root / "pipeline").mkdir()
    (root / "pipeline" / "transformer").symlink_to(root / "diffusers")
    return root


FORMS = ("run", "run/checkpoints/step-00000001", "diffusers", "prx", "prx/denoiser.safetensors", "pipeline")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_it(runs, trained, tmp_path, form):
    own = runs.config(tmp_path)
    assert meaning_of(own) == {"prediction": "sample", "autoencoder": "pixels", "text encoder": "hash"}
    assert stored_meaning(trained / form) == meaning_of(own)
    assert differing_meaning(trained / form, own) == []
    other = runs.config(tmp_path, {"objective": {"prediction": "velocity"}})
    (line,) = differing_meaning(trained / form, other)
    assert line.startswith(
        f"warning: {trained / form} means something else: prediction sample, here velocity"
    )
    assert "(objective.prediction)" in line


def test_a_run_that_starts_from_them_says_so(runs, trained, tmp_path, capsys):
    changes = {"run": {"steps": 1, "init_from": str(trained / "diffusers")}}
    assert runs.here(tmp_path / "same", changes).error is None
    assert "something else" not in capsys.readouterr().err
    assert runs.here(tmp_path / "other", changes, {"objective": {"prediction": "velocity"}}).error is None
    assert "prediction sample, here velocity (objective.prediction)" in capsys.readouterr().err


def test_files_of_others_say_nothing(trained, tmp_path):
    config = parse_config(merge(json.loads((trained / "run" / "config.json").read_text()), {}), "x")
    (tmp_path / "theirs.pt").write_bytes(b"")
    assert differing_meaning(tmp_path / "theirs.pt", config) == []
