import shutil

import pytest
import torch

from millrace.engine.config import Autoencoder, TextTower
from millrace.engine.encoders import identity as module
from millrace.engine.encoders.autoencoder import autoencoder_entry
from millrace.engine.encoders.identity import autoencoder_identity, differing, digest_of, text_identity
from millrace.engine.encoders.text_encoder import text_encoder_entry
from millrace.engine.util.errors import UserError

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach the hub, whatever the machine allows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return text_encoder_entry("qwen3vl").tiny(16, tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return autoencoder_entry("flux1").tiny(tmp_path_factory.mktemp("weights"))


def of_text(path, dim=16, dtype=BF16, **settings):
    return text_identity(TextTower(kind="qwen3vl", path=str(path), **settings), dim, dtype)


def of_autoencoder(path, **settings):
    return autoencoder_identity(Autoencoder(**{"kind": "flux1", "path": str(path), **settings}))


def test_whose_kernels_run_is_no_part_of_it(tower):
    """They round; a cache of the one serves a run with the other."""
    assert of_text(tower, kernels="liger") == of_text(tower, kernels="hf") == of_text(tower)


def flip_byte(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_folder_is_itself_wherever_it_lies(tower, weights, tmp_path):
    for make, folder in ((of_text, tower), (of_autoencoder, weights)):
        found = make(folder)
        copy = shutil.copytree(folder, tmp_path / folder.name)
        (copy / "README.md").write_text("not loaded")
        assert differing(found, make(copy)) == []
        assert found["source"] == str(folder)
        nested = shutil.copytree(folder, tmp_path / f"{folder.name}-pipeline" / "vae")
        if make is of_autoencoder:
            assert differing(found, make(nested.parent)) == []


def test_every_file_that_is_loaded_counts(tower, weights, tmp_path):
    for make, folder in ((of_text, tower), (of_autoencoder, weights)):
        files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
        assert len(files) >= 2
        for file in files:
            copy = shutil.copytree(folder, tmp_path / f"{folder.name}-{file.name}")
            flip_byte(copy / file.name)
            (problem,) = differing(make(folder), make(copy))
            assert problem.startswith("digest ")


def test_statistics_of_a_tuned_autoencoder_count_in_either_folder(weights, tmp_path):
    from millrace.engine.encoders.latent_statistics import save_statistics

    copy = shutil.copytree(weights, tmp_path / "pipeline" / "vae")
    before = of_autoencoder(copy.parent)
    save_statistics(copy.parent, torch.ones(16), torch.zeros(16))
    top = of_autoencoder(copy.parent)
    save_statistics(copy, torch.ones(16) * 2, torch.zeros(16))
    both = of_autoencoder(copy.parent)
    assert len({each["digest"] for each in (before, top, both)}) == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_tokens": 9}, ["max_tokens 9, not 256"]),
        ({"dim": 32}, ["dim 32, not 16"]),
        ({"dtype": torch.float32}, ["dtype float32, not bfloat16"]),
    ],
)
def test_what_rows_depend_on_is_named(tower, changed, words):
    assert differing(of_text(tower, **changed), of_text(tower)) == words


def test_another_cleaning_of_captions_is_another_tower(tower, monkeypatch):
    found = of_text(tower)
    monkeypatch.setattr(module, "CLEANING", 2)
    assert differing(found, of_text(tower)) == ["cleaning 1, not 2"]


def test_the_posteriors_dtype_counts_and_the_form_does_not(weights):
    assert differing(of_autoencoder(weights), of_autoencoder(weights, dtype="float32")) == [
        "dtype bfloat16, not float32"
    ]
    assert "form" not in of_autoencoder(weights)
    assert of_autoencoder(weights, kind="dc_ae")["dtype"] == "float32"


def test_towers_of_other_kinds_differ(tower):
    hashed = text_identity(TextTower(kind="hash"), 16, BF16)
    words = differing(of_text(tower), hashed)
    assert words[0] == "kind qwen3vl, not hash"
    assert differing(hashed, text_identity(TextTower(kind="hash"), 16, BF16)) == []


def test_a_revision_that_cannot_be_looked_up_is_taken_on_trust_and_only_that():
    here = text_identity(TextTower(kind="t5gemma"), 2304, BF16)
    assert (here["source"], here["revision"]) == ("google/t5gemma-2b-2b-ul2", None)
    made = here | {"revision": "0123abc"}
    assert differing(made, here) == []
    assert differing(made, here | {"revision": "4567def"}) == ["revision 0123abc, not 4567def"]
    assert differing(made, here | {"source": "someone/else"}) == [
        "source google/t5gemma-2b-2b-ul2, not someone/else"
    ]
    assert autoencoder_identity(Autoencoder(kind="flux1"))["revision"] is None


def test_a_folder_is_not_the_repository_of_the_same_weights(tower):
    local, hub = of_text(tower), {**of_text(tower), "source": "Qwen/Qwen3-VL-Embedding-2B", "revision": "01"}
    del hub["digest"]
    assert [word.split()[0] for word in differing(hub, local)] == ["source", "digest", "revision"]


def test_large_weights_are_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 64)
    whole = digest_of([path])
    seen = []
    for offset in range(0, path.stat().st_size, 8):
        flip_byte(path, offset)
        seen.append(digest_of([path]) != whole)
        flip_byte(path, offset)
    assert digest_of([path]) == whole
    assert seen[0]
    assert seen[-1]
    assert sum(seen) == pytest.approx(64 * 2, abs=32)
    path.write_bytes(path.read_bytes() + b"x")
    assert digest_of([path]) != whole


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        of_autoencoder(tmp_path)
    assert str(tmp_path) in str(caught.value)
