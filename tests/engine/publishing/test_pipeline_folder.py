"""Whole pipelines: what is exported loads in diffusers, samples as we do, and comes back bit for bit."""

import inspect
import json
import re
import types
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXPixelPipeline
from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel

from millrace.engine import export
from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.checkpoint.weight_formats import load_weights
from millrace.engine.config import Sampling
from millrace.engine.config.loading import load_config
from millrace.engine.config.smoke import smoke
from millrace.engine.encoders.autoencoder import autoencoder_entry
from millrace.engine.encoders.text_encoder import text_encoder_entry
from millrace.engine.model.guidance_branches import solver_steps
from millrace.engine.sampling.trained_model import open_sampler
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "two blue birds on a wire"]
SHIFT, STEPS, GUIDANCE, MAX_TOKENS = 2.0, 5, 5.0, 40


@pytest.fixture(autouse=True)
def _cleaning(monkeypatch):
    """Stands for ftfy, which these captions do not need."""
    for module in (pipeline_prx, pipeline_prx_pixel):
        monkeypatch.setattr(module, "ftfy", types.SimpleNamespace(fix_text=str), raising=False)


def changes(space, text, folder):
    """A run with tiny networks of the real classes in `folder`."""
    encoder = text_encoder_entry(text).tiny(16, folder / text)
    conditioning = {"text": {"kind": text, "path": str(encoder), "max_tokens": MAX_TOKENS}}
    objective = {"time_shift": SHIFT, "prediction": "velocity"}
    model, data = {"patch_size": 2}, {"resolution": 64}
    if space == "pixels":
        objective |= {"prediction": "sample", "noise_scale": 1.5}
        model, data = {"patch_size": 4}, {"resolution": 16}
        conditioning["autoencoder"] = {"kind": "pixels"}
    else:
        entry = autoencoder_entry(space)
        weights = entry.tiny(folder / space)
        conditioning["autoencoder"] = {"kind": space, "path": str(weights), "dtype": "float32"}
        model = {"in_channels": entry.channels, "patch_size": 32 // entry.factor if entry.factor < 32 else 1}
    return {
        "run": {"steps": 4},
        "optimizer": {"lr": 0.05},  # far from the zeros that the last layer starts from
        "model": model,
        "objective": objective,
        "conditioning": conditioning,
        "data": data,
        "sampling": {"steps": STEPS, "guidance": GUIDANCE, "times": "diffusers"},
    }


MODELS = [
    ("flux1", "t5gemma"),
    ("dc_ae", "t5gemma"),
    ("flux2", "qwen3vl"),
    ("pixels", "qwen3vl"),
    ("pixels", "t5gemma"),
]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def trained(request, runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    assert runs.here(root / "run", changes(*request.param, root)).error is None
    assert export.main(["--checkpoint", str(root / "run"), "--pipeline", str(root / "pipeline")]) == 0
    return request.param[0], root


def sampler_of(run):
    (state, config), checkpoint = checkpoint_state(run), list_checkpoints(run / "checkpoints")[-1][1]
    return open_sampler(state, config, checkpoint, CPU), config


def test_pictures_are_those_of_sampling(trained):
    space, root = trained
    kind = PRXPixelPipeline if space == "pixels" else PRXPipeline
    pipeline = kind.from_pretrained(root / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    sampler, config = sampler_of(root / "run")
    edge = config.data.resolution
    ours = sampler(PROMPTS, (edge, edge), config.sampling, seed=3)

    factor = sampler.autoencoder.factor
    shape = (sampler.autoencoder.channels, edge // factor, edge // factor)
    noise = torch.stack(sampler._start(torch.arange(2), [shape] * 2, 3))
    scale = pipeline.config.noise_scale if space == "pixels" else 1.0
    assert scale == config.objective.noise_scale
    assert pipeline.scheduler.config.shift == SHIFT
    # One prompt a call: under guidance the pipeline repeats its timestep for one alone.
    found = [
        pipeline(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=scale * start[None],
            use_resolution_binning=False,
            output_type="np",
        ).images[0]
        for prompt, start in zip(PROMPTS, noise, strict=True)
    ]
    theirs = torch.from_numpy(numpy.stack(found)).permute(0, 3, 1, 2) * 2 - 1
    assert ours.std() > 0.02
    other = sampler(PROMPTS[::-1], (edge, edge), config.sampling, seed=3)
    assert (other - ours).abs().max() > 0.002  # twenty times what rounding may be
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_weights_come_back_bit_for_bit(trained):
    _, root = trained
    wanted, config = checkpoint_state(root / "run")
    state, model, _, origin = load_weights(root / "pipeline", config.model)
    assert model == config.model
    assert origin.startswith(f"weights of the diffusers pipeline {root}/pipeline (EMA weights of {root}/run/")
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_run_starts_from_it(trained, runs, tmp_path, capsys):
    """And what it then exports is the same file again: weights through diffusers and back."""
    _, root = trained
    values = json.loads((root / "run" / "config.json").read_text())
    start = {"init_from": str(root / "pipeline"), "steps": 1, "output_dir": str(tmp_path / "run")}
    still = {"run": start, "optimizer": {"lr": 1e-30}, "ema": {"enabled": False}}
    assert runs.here(tmp_path / "run", values, still).error is None
    told = capsys.readouterr()
    assert f"init_from: weights of the diffusers pipeline {root}/pipeline" in told.out + told.err
    found, wanted = checkpoint_state(tmp_path / "run")[0], checkpoint_state(root / "run")[0]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def run_card(folder, monkeypatch):
    """Run the code in a folder's card; what it makes."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    assert (folder / "fox.png").is_file()
    return names


def test_by_reference(trained, capsys, tmp_path, monkeypatch):
    """The pipeline holds its own weights; its card says where the rest is, in code that makes the picture of
    the whole one."""
    space, root = trained
    words = ["--checkpoint", str(root / "run"), "--pipeline", str(tmp_path / "small")]
    assert export.main([*words, "--components", "reference"]) == 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir() if path.is_dir()) == [
        "scheduler",
        "transformer",
    ]
    names = ["text_encoder", "tokenizer", *(["vae"] if space != "pixels" else [])]
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    assert list(index["_references"]) == names
    told = capsys.readouterr().out
    for name in names:
        source = index["_references"][name]
        assert f"{name}: not in it, load it from {source} (licence: not known here)" in told
    whole, small = (run_card(folder, monkeypatch) for folder in (root / "pipeline", tmp_path / "small"))
    text = (tmp_path / "small" / "README.md").read_text()
    assert "| text_encoder |" in text
    levels = [numpy.asarray(made["picture"], numpy.int16) for made in (whole, small)]
    assert levels[0].std() > 1
    assert abs(levels[0] - levels[1]).max() <= 1


def test_the_card_s_code_runs_where_networks_and_transformer_differ_in_dtype(runs, tmp_path, monkeypatch):
    """As after training in BF16: the masters are exported in FP32 beside a text encoder in BF16."""
    low = {"precision": {"compute": "bfloat16"}, "run": {"steps": 1}}
    assert runs.here(tmp_path / "run", changes("flux1", "t5gemma", tmp_path), low).error is None
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--pipeline", str(tmp_path / "out")]) == 0
    pipeline = run_card(tmp_path / "out", monkeypatch)["pipeline"]
    assert pipeline.text_encoder.dtype == pipeline.transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"objective": {"prediction": "velocity"}}, "objective.prediction is velocity; on pixels it samples"),
        ({"objective": {"t_min": 0.1}}, "objective.t_min is 0.1; it divides by 0.05 at least"),
        ({}, "conditioning.text.kind is hash, which diffusers does not have"),
    ],
)
def test_models_that_no_pipeline_samples(runs, tmp_path, change, problem):
    assert runs.here(tmp_path / "run", {"run": {"steps": 1}}, change).error is None
    with pytest.raises(UserError, match=f"PRXPixelPipeline cannot sample this model: {problem}"):
        export.main(["--checkpoint", str(tmp_path / "run"), "--pipeline", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_times_of_diffusers_are_its_scheduler_s(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    found = solver_steps(Sampling(steps=steps, times="diffusers"), shift)
    assert [step.start for step in found] + [found[-1].end] == pytest.approx(scheduler.sigmas.tolist())


def test_the_published_pixel_model_starts_from_its_pipeline_s_noise(runs, tmp_path):
    """The 7 B preset trains, samples and exports as PRXPixelPipeline samples by default."""
    defaults = inspect.signature(PRXPixelPipeline.__init__).parameters
    published = defaults["noise_scale"].default
    config = load_config("models/prx_7b_pixel")
    assert config.objective.noise_scale == published == 2.0
    assert config.conditioning.text.max_tokens == defaults["prompt_max_tokens"].default

    config = config.model_copy(
        update={"run": config.run.model_copy(update={"output_dir": str(tmp_path / "a")})}
    )
    small = smoke(config, ["run.steps=1", "sampling.every_steps=0"])
    run = Path(small.run.output_dir)
    assert runs.here(run, small.model_dump(mode="json")).error is None
    assert json.loads((run / "config.json").read_text())["objective"]["noise_scale"] == published
    sampler, _ = sampler_of(run)
    assert sampler.flow.noise_scale((8, 8)) == published
    assert export.main(["--checkpoint", str(run), "--pipeline", str(tmp_path / "out")]) == 0
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.config.noise_scale, pipeline.scheduler.config.shift) == (published, 3.0)


def test_the_rule_of_resolution_is_written_as_its_value(runs, tmp_path, capsys):
    own = {"objective": {"noise_scale": "resolution"}, "run": {"steps": 1}}
    assert runs.here(tmp_path / "run", changes("pixels", "t5gemma", tmp_path), own).error is None
    words = ["--checkpoint", str(tmp_path / "run"), "--pipeline", str(tmp_path / "out")]
    assert export.main(words) == 0
    assert "noise_scale is 0.0625, for pictures of 16 px" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["noise_scale"] == 16 / 256
    assert len({path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}) == 1
    with pytest.raises(UserError, match="--format prx is a state dict"):
        export.main([*words, "--format", "prx"])
