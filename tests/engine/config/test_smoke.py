"""Every configuration that is shipped, made small, runs all its code on a CPU."""

import json
import math
from pathlib import Path

import pytest

from millrace.engine.config.loading import load_config, merge, read_json
from millrace.engine.config.smoke import smoke
from millrace.engine.config.stages import resolve_stages
from tests.engine.jobs import Job


def shipped():
    """Configuration files of the repository."""
    folder = Path(__file__).resolve().parents[3] / "configs"
    return sorted(path for path in folder.rglob("*.json") if path.name != "schema.json")


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_small_but_the_same_kind(path, tmp_path, monkeypatch):
    config = load_config(path, [f"run.output_dir={tmp_path}/run"])
    monkeypatch.setattr("millrace.engine.config.smoke._tiny_networks", lambda config: {})
    small = smoke(config)
    judges = {"lpips": small.objective.lpips, "dino": small.objective.dino}
    assert small.objective == config.objective.model_copy(update=judges)
    assert [judge.weight for judge in judges.values()] == [
        config.objective.lpips.weight,
        config.objective.dino.weight,
    ]
    assert small.routing.policy == config.routing.policy
    assert small.conditioning.text.kind == config.conditioning.text.kind
    assert small.conditioning.autoencoder.kind == config.conditioning.autoencoder.kind
    assert small.conditioning.caption_drop == config.conditioning.caption_drop
    assert small.precision == config.precision
    assert small.optimizer == config.optimizer
    assert small.schedule.kind == config.schedule.kind
    assert small.ema.enabled == config.ema.enabled
    assert small.sampling.solver == config.sampling.solver
    assert small.deepspeed == config.deepspeed
    assert small.run.seed == config.run.seed
    assert small.data.aspect == config.data.aspect
    assert (small.model.bottleneck is None) == (config.model.bottleneck is None)
    assert small.run.activation_checkpointing == config.run.activation_checkpointing
    assert small.model.width <= 64
    assert small.run.steps == max(4, 2 * len(resolve_stages(config)))
    assert len(resolve_stages(small)) == len(resolve_stages(config))
    assert (small.alignment.kind, small.alignment.projector) == (
        config.alignment.kind,
        config.alignment.projector,
    )
    assert not small.run.compile
    assert small.run.output_dir == f"{tmp_path}/run-smoke"


def test_kernels_that_need_a_gpu_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("millrace.engine.config.smoke._tiny_networks", lambda config: {})
    for wanted, small in (("liger", "auto"), ("auto", "auto")):
        given = [f"model.geglu_backend={wanted}", f"conditioning.text.kernels={wanted}"]
        made = smoke(load_config("latent_256", [f"run.output_dir={tmp_path}/run", *given]))
        assert (made.model.geglu_backend, made.conditioning.text.kernels) == (small, small)


@pytest.mark.parametrize(
    ("fp8", "small"),
    [("transformer_engine", ("torch", "tensorwise")), ("torchao", ("torchao", "rowwise")), ("none", None)],
)
def test_fp8_stays_where_a_cpu_can(tmp_path, fp8, small):
    path = next(path for path in shipped() if path.stem == "jit_1024")
    recipe = {"transformer_engine": "blockwise", "torchao": "rowwise"}.get(fp8, "tensorwise")
    changes = [f"precision.fp8.backend={fp8}", f"precision.fp8.recipe={recipe}"]
    config = load_config(path, [f"run.output_dir={tmp_path}", *changes])
    found = smoke(config).precision.fp8
    assert (found.backend, found.recipe) == (small or ("none", "tensorwise"))
    assert found.layers == config.precision.fp8.layers


def test_overrides_have_the_last_word(tmp_path):
    path = next(path for path in shipped() if path.stem == "quickstart")
    overrides = [f"run.output_dir={tmp_path}/own", "run.steps=7", "model.depth=3"]
    small = smoke(load_config(path, overrides), overrides)
    assert (small.run.output_dir, small.run.steps, small.model.depth) == (f"{tmp_path}/own", 7, 3)


@pytest.fixture(scope="module")
def smoked(runs, tmp_path_factory):
    """The command with --smoke on each configuration: results and output folders by name."""
    root = tmp_path_factory.mktemp("smoked")
    found = {}
    for path in shipped():
        config = root / path.name
        values = merge(read_json(path), {"run": {"output_dir": str(root / path.stem)}})
        config.write_text(json.dumps(values))
        found[path.stem] = runs.script("train", "--config", config, "--smoke"), root / f"{path.stem}-smoke"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in shipped()])
def test_every_configuration_runs(runs, smoked, name):
    result, output = smoked[name]
    assert result.returncode == 0, result.stderr
    steps = load_config(output / "config.json").run.steps
    assert f"finished: {steps} steps" in result.stderr
    records = [record for record in runs.log(output) if "evaluation" not in record]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert all(record["applied"] and math.isfinite(record["loss"]) for record in records)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        f"step-{step:08d}" for step in (steps - 2, steps)
    }
    assert (output / "samples" / f"step-{steps:08d}.png").stat().st_size > 0


ONLY_ZERO_0 = {"bf16_master"}
"""BF16 masters are an experiment of one process's plain optimizer."""


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["stage1-one", "stage2-two"])
def sharded(request, runs, tmp_path_factory):
    """Results of every configuration, small, at ZeRO 1 on one process, and at ZeRO 2 on two, by name."""
    root = tmp_path_factory.mktemp("sharded")
    stage, processes = request.param
    jobs = []
    for path in shipped():
        overrides = [
            f"run.output_dir={root / path.stem}",
            f"deepspeed.zero_optimization.stage={stage}",
            "sampling.every_steps=0",
            "evaluation.every_steps=0",
            "logging.tensorboard=false",
        ]
        values = smoke(load_config(path, overrides), overrides).model_dump(mode="json")
        jobs.append(Job(path.stem, values))
    results = runs.forked(jobs, ranks=processes)
    return {name: (ranks, root / name) for name, ranks in results.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [path.stem for path in shipped()])
def test_every_configuration_runs_sharded(runs, sharded, name):
    results, output = sharded[name]
    if name in ONLY_ZERO_0:
        assert all("is an experiment for ZeRO stage 0" in result.error for result in results)
        return
    assert [result.error for result in results] == [None] * len(results)
    records = runs.log(output)
    steps = load_config(output / "config.json").run.steps
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert all(record["applied"] and math.isfinite(record["loss"]) for record in records)


def test_validation_becomes_small(tmp_path, monkeypatch):
    """A shipped run that holds out a share of a folder does so of the pictures that come with the project."""
    monkeypatch.setattr("millrace.engine.config.smoke._tiny_networks", lambda config: {})
    names = {path.stem: path for path in shipped()}
    for name, given, every, share in (
        ("latent_256", [], 4, 0.5),
        ("latent_256", ["validation.every_steps=0"], 0, 0.5),
        ("latent_256", ["validation.share=0", "validation.path=elsewhere"], 4, 0.5),
        ("quickstart", [], 0, 0.0),
    ):
        small = smoke(load_config(names[name], given)).validation
        assert (small.every_steps, small.share, small.path) == (every, share, None)
        assert small.samples * small.times <= 8


def test_evaluation_becomes_small(tmp_path):
    path = next(path for path in shipped() if path.stem == "quickstart")
    wanted = [
        f"run.output_dir={tmp_path}/run",
        "evaluation.every_steps=100",
        "evaluation.reference=elsewhere",
    ]
    small = smoke(load_config(path, wanted)).evaluation
    assert (small.every_steps, small.samples, small.reference) == (4, 4, None)
    assert small.cache == f"{tmp_path}/run-smoke/reference-statistics"
    for metric, folder in small.features:
        assert Path(folder).is_dir(), metric
    assert smoke(load_config(path, wanted[:1])).evaluation.every_steps == 0
