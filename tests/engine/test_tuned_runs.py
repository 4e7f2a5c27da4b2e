"""Runs that tune their autoencoder: they resume to the bit, agree at any number of processes and ZeRO
stage, skip all or nothing; and what they leave can be sampled from and used by other runs."""

import itertools
import sys

import pytest
import torch

from millrace.engine import export, sample
from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config import Autoencoder
from millrace.engine.config.stages import resolve_stages
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.latent_statistics import STATISTICS_FILE
from millrace.engine.encoders.small_classifier import SmallClassifier, save_classifier
from millrace.engine.publishing.folded_scale import fold_scale
from millrace.engine.repa_e import tuned_autoencoder
from millrace.engine.repa_e.tuned_autoencoder import open_trained
from millrace.engine.trainer import Trainer
from millrace.engine.util.errors import UserError
from tests.engine.run_states import copy_until

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
STEPS = 4
KINDS = ("master", "exp_avg", "exp_avg_sq", "updates")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Changes of the tiny run that tune a tiny autoencoder, on 32 pixel pictures of 2 x 2 tokens."""
    from millrace.engine.encoders.autoencoder import autoencoder_entry
    from millrace.engine.encoders.lpips import tiny_lpips

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_classifier(SmallClassifier(classes=2, width=8), folder / "classifier")
    teacher = {"kind": "classifier", "path": str(folder / "classifier"), "dtype": "float32"}
    autoencoder = {
        "kind": "flux1",
        "path": str(autoencoder_entry("flux1").tiny(folder / "flux1")),
        "dtype": "float32",
        "tuning": {"enabled": True, "discriminator_width": 4, "norm_samples": 8, "lr": 2e-3},
    }
    return {
        "run": {"steps": STEPS},
        "model": {"patch_size": 2, "in_channels": 16},
        "objective": {
            "prediction": "velocity",
            "lpips": {"path": str(tiny_lpips(folder / "lpips")), "weight": 0.0},
        },
        "alignment": {"kind": "repa", "block": 0, "teacher": teacher},
        "conditioning": {"autoencoder": autoencoder},
        # A large epsilon, so that a difference in the last bit of a gradient stays one.
        "optimizer": {"eps": 1e-6},
        "data": {"resolution": 32, "global_batch": 4},
        "checkpoint": {"every_steps": 1},
    }


@pytest.fixture(scope="module")
def whole(runs, tuned, tmp_path_factory):
    """A run of one process that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert runs.here(output, tuned).error is None
    return output


def tensors_of(run, step=-1):
    folders = dict(list_checkpoints(run / "checkpoints"))
    reader = CheckpointReader(folders[step] if step > 0 else list(folders.values())[-1])
    return {name: reader.tensor(name) for name in reader.names()}


def tuning_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.startswith("tuning/")}


def assert_similar(found, wanted):
    """Within 1e-3 of the largest number of each tensor; what Adam makes of noise is noise."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        if "exp_avg" not in name:
            largest = wanted[name].abs().max()
            assert (found[name] - wanted[name]).abs().max() <= 1e-3 * largest + 1e-6, name


def test_a_resumed_run_is_the_whole_one(runs, tuned, whole, tmp_path):
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    assert runs.here(resumed, tuned, resume="auto").error is None
    runs.assert_same_bits(resumed, whole)
    kinds = {"/".join(name.split("/")[1:3]) for name in tuning_of(tensors_of(whole))}
    parts = {f"{part}/{kind}" for part in ("autoencoder", "discriminator") for kind in KINDS}
    assert kinds == parts | {"latents/mean", "latents/variance"}


def test_everything_is_trained(whole):
    first, last = tensors_of(whole, 1), tensors_of(whole)
    for part in ("autoencoder/master/encoder", "autoencoder/master/decoder", "discriminator", "latents"):
        names = [name for name in last if name.startswith(f"tuning/{part}")]
        assert any(not torch.equal(first[name], last[name]) for name in names), part
    assert float(last["tuning/autoencoder/updates"]) == STEPS


def test_the_log_has_the_terms(runs, whole):
    for record in runs.log(whole):
        terms = record["autoencoder"]
        assert terms["reconstruction"] > 0
        assert terms["discriminator"] > 0
        assert record["losses"].keys() == {"flow", "repa"}


@pytest.mark.parametrize("stage", [0, 2])
def test_two_processes_agree_with_one(runs, tuned, whole, tmp_path, stage):
    output = tmp_path / "two"
    zero = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    job = runs.job(output, tuned, zero)
    results = runs.forked([job], ranks=2)["two"]
    assert [result.error for result in results] == [None, None]
    assert_similar(tensors_of(output), tensors_of(whole))
    # The checkpoint of two is continued by one.
    resumed = copy_until(output, 2, tmp_path / "one")
    assert runs.here(resumed, tuned, zero, resume="auto").error is None
    assert_similar(tensors_of(resumed), tensors_of(whole))


@pytest.mark.parametrize("spoil", [{"spoiled_losses": (2,)}, {"spoiled_gradients": (2,)}])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_skipped_step_skips_all(runs, tuned, tmp_path, spoil, stage):
    zero = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    result = runs.here(tmp_path, tuned, zero, **spoil)
    assert (result.error, result.skipped) == (None, 1)
    assert result.unchanged == {0: False, 1: False, 2: True, 3: False}
    before, after = (tuning_of(tensors_of(tmp_path, step)) for step in (2, 3))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert float(tensors_of(tmp_path)["tuning/autoencoder/updates"]) == STEPS - 1


def test_the_denoiser_is_skipped_with_the_autoencoder(runs, tuned, tmp_path):
    trainer = Trainer(runs.config(tmp_path, tuned, {"run": {"steps": 2}}))
    trainer.train_step()
    trainer.save()
    loud = trainer.repa_e.autoencoder.reduce
    trainer.repa_e.autoencoder.reduce = lambda: loud() * float("nan")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step()
    trainer.stream.close()
    trainer.run_log.close()
    assert trainer.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_an_exported_autoencoder_encodes_like_the_run(runs, tuned, whole, tmp_path, capsys):
    folder = tmp_path / "vae"
    export.main(["--checkpoint", str(whole), "--autoencoder", str(folder)])
    assert f"tuned until step {STEPS}" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        STATISTICS_FILE,
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # readable like all others
    trainer = Trainer(runs.config(copy_until(whole, STEPS, tmp_path / "run"), tuned), "auto")
    trainer.stream.close()
    trainer.run_log.close()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = trainer.batch_encoder.autoencoder.encode(images)
    for kind in ("flux1", "repa_e"):
        found = open_autoencoder(Autoencoder(kind=kind, path=str(folder), dtype="float32"), CPU)
        torch.testing.assert_close(found.encode(images), wanted, rtol=1e-4, atol=1e-5)
        pictures = trainer.batch_encoder.autoencoder.decode(wanted)
        torch.testing.assert_close(found.decode(wanted), pictures, rtol=1e-3, atol=1e-4)
    restored = open_trained(trainer.config, whole, CPU)
    torch.testing.assert_close(restored.encode(images), wanted, rtol=1e-4, atol=1e-5)

    network = diffusers.AutoencoderKL.from_pretrained(folder)
    mean, std = (
        torch.tensor(network.config[name])[:, None, None] for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        latents = (network.encode(images).latent_dist.mean - mean) / std
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-5)


def test_a_pipeline_s_autoencoder_has_the_scale_of_each_channel_in_its_weights(runs, tuned, whole, tmp_path):
    """As diffusers' pipelines use it: one factor for all channels, and no statistics beside it."""
    latents = open_trained(runs.config(tmp_path, tuned), whole, CPU)
    assert latents.scale.flatten().std() > 0
    fold_scale(latents).save_pretrained(tmp_path / "vae")
    network = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert (network.config.scaling_factor, network.config.shift_factor) == (1.0, 0.0)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = latents.posterior(images)
    with torch.no_grad():
        found = network.encode(images).latent_dist
        pictures = network.decode(found.mean).sample
    torch.testing.assert_close(found.mean, latents.sample(wanted), rtol=1e-4, atol=1e-5)
    noise = torch.ones_like(found.mean)
    torch.testing.assert_close(found.mean + found.std, latents.sample(wanted, noise), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pictures.clamp(-1, 1), latents.decode(found.mean), rtol=1e-3, atol=1e-4)


def test_another_run_trains_on_an_exported_autoencoder(runs, tuned, whole, tmp_path):
    folder = tmp_path / "vae"
    export.main(["--checkpoint", str(whole), "--autoencoder", str(folder)])
    frozen = {"conditioning": {"autoencoder": {"path": str(folder), "tuning": {"enabled": False}}}}
    assert runs.here(tmp_path / "run", tuned, frozen, {"run": {"steps": 1}}).error is None
    with pytest.raises(UserError, match="did not tune its autoencoder"):
        export.main(["--checkpoint", str(tmp_path / "run"), "--autoencoder", str(tmp_path / "again")])


def test_sampling_uses_the_tuned_autoencoder(whole, tmp_path, monkeypatch):
    picture, opened = tmp_path / "fox.png", []
    monkeypatch.setattr(
        tuned_autoencoder, "open_trained", lambda *given: opened.append(open_trained(*given)) or opened[-1]
    )
    words = ["--checkpoint", str(whole), "--prompt", "a fox", "--steps", "2", "--grid", str(picture)]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    assert sample.main() == 0
    assert picture.is_file()
    assert f"tuned until step {STEPS}" in opened[0].identity
    stored = tensors_of(whole)
    assert torch.equal(opened[0].shift.flatten(), stored["tuning/latents/mean"])


def test_exported_weights_ask_for_their_autoencoder(runs, tuned, tmp_path):
    with pytest.raises(UserError, match=r"come without the autoencoder.*--autoencoder") as error:
        open_trained(runs.config(tmp_path, tuned), None, CPU)
    assert "\n" not in str(error.value)


def test_a_run_is_tuned_from_its_beginning_to_its_end(runs, tuned, whole, tmp_path):
    off = {"conditioning": {"autoencoder": {"tuning": {"enabled": False}}}}
    copied = copy_until(whole, 2, tmp_path / "copied")
    error = runs.here(copied, tuned, off, resume="auto").error
    assert "was trained with an tuned" not in error
    assert "was trained with a tuned autoencoder" in error
    assert runs.here(tmp_path / "plain", tuned, off, {"run": {"steps": 1}}).error is None
    error = runs.here(tmp_path / "plain", tuned, resume="auto").error
    assert "was trained with an untuned autoencoder" in error
    stages = [{"at": 2, "name": "later", **off}]
    with pytest.raises(UserError, match=r"changes conditioning\.autoencoder\.tuning\.enabled"):
        resolve_stages(runs.config(tmp_path, tuned, {"stages": stages}))


def test_the_checkpoint_of_another_discriminator_is_refused(runs, tuned, whole, tmp_path):
    wider = {"conditioning": {"autoencoder": {"tuning": {"discriminator_width": 8}}}}
    copied = copy_until(whole, 2, tmp_path / "copied")
    error = runs.here(copied, tuned, wider, resume="auto").error
    assert "not of this configuration" in error
    assert "\n" not in error


def test_data_that_run_out_cost_no_step(runs, tuned, whole, tmp_path, monkeypatch):
    """In the second micro-batch of step 3; then they are there again."""
    from millrace.engine.data.lasting_stream import LastingStream

    def missing():
        raise UserError("photos/7.png: cannot be read")
        yield

    class Ending(LastingStream):
        def __init__(self, stream):
            super().__init__(itertools.chain(itertools.islice(stream, 5), missing()))

    rarely = {"checkpoint": {"every_steps": 100}}
    with monkeypatch.context() as patch:
        patch.setattr("millrace.engine.trainer.LastingStream", Ending)
        error = runs.here(tmp_path / "run", tuned, rarely).error
    assert error == "stopped after step 2, which is saved: photos/7.png: cannot be read"
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    assert runs.here(tmp_path / "run", tuned, rarely, resume="auto").error is None
    runs.assert_same_bits(tmp_path / "run", whole)
