"""Evaluations of a small untrained model, against the same thing computed with everything kept."""

import json

import pytest
import torch

from millrace.engine.config.loading import merge, parse_config
from millrace.engine.encoders.autoencoder import open_autoencoder
from millrace.engine.encoders.text_encoder import open_text_encoder
from millrace.engine.evaluation import evaluator as module
from millrace.engine.evaluation.evaluator import Evaluation
from millrace.engine.evaluation.features import open_network, tiny_features, tiny_networks
from millrace.engine.evaluation.frechet import frechet_distance, moments
from millrace.engine.evaluation.mmd import mmd
from millrace.engine.evaluation.reference_set import Reference, levels
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.flops import sampling_flops
from millrace.engine.sampling.sampler import Sampler
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
SAMPLES = 37


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tiny_features(tiny_networks(tmp_path_factory.mktemp("features")))


@pytest.fixture
def config(features, tmp_path):
    """`config({...})` -> a small model on built-in pictures."""

    def make(changes=None):
        values = {
            "run": {"device": "cpu"},
            "model": {
                "width": 32,
                "depth": 1,
                "heads": 1,
                "patch_size": 4,
                "in_channels": 3,
                "context_dim": 16,
            },
            "conditioning": {"text": {"kind": "hash"}, "autoencoder": {"kind": "pixels"}},
            "data": {"resolution": 16},
            "precision": {"compute": "float32"},
            "sampling": {"steps": 2, "guidance": 2.0},
            "evaluation": {"samples": SAMPLES, "features": features, "cache": str(tmp_path / "cache")},
        }
        return parse_config(merge(values, changes or {}), "test")

    return make


def sampler_for(config):
    torch.manual_seed(1)
    denoiser = Denoiser(config.model, config.routing)
    for parameter in denoiser.parameters():
        parameter.data.normal_(std=0.05)
    return Sampler(
        denoiser.eval().requires_grad_(False),
        FlowMatching(config.objective, config.run.seed, 4),
        open_autoencoder(config.conditioning.autoencoder, CPU),
        open_text_encoder(config.conditioning.text, config.model.context_dim, CPU, torch.float32),
        CPU,
        torch.float32,
    )


def test_is_what_all_pictures_at_once_give(config, features):
    settings = config()
    sampler = sampler_for(settings)
    scores = Evaluation(settings, 4, CPU)(sampler)

    reference = Reference(settings, 4)
    prompts = [reference.caption(i) for i in range(SAMPLES)]
    drawn = levels(sampler(prompts, (16, 16), settings.sampling, settings.evaluation.seed))
    real = torch.stack([reference.view(i) for i in range(22)])
    networks = {name: open_network(name, path, "key", CPU) for name, path in features.items()}
    x, y = networks["fid"](drawn), networks["fid"](real)
    assert scores.metrics["fid"] == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-4)
    for name in ("cmmd", "dino_mmd"):
        wanted = mmd(networks[name](drawn), networks[name](real))
        assert scores.metrics[name] == pytest.approx(wanted, rel=1e-4)
        assert wanted > 0
    assert (scores.samples, scores.reference) == (SAMPLES, 22)
    words = sum(len(sampler.text_encoder.encode([prompt]).embeddings) for prompt in prompts) / SAMPLES
    assert scores.gflop_per_image == pytest.approx(sampling_flops(settings, 16, words, 1) / 1e9, rel=1e-9)
    assert scores.images_per_second == pytest.approx(SAMPLES / scores.sampling_seconds)
    assert scores.mfu is None


def test_again_is_the_same_and_reads_the_cache(config, monkeypatch):
    settings = config({"evaluation": {"metrics": ["cmmd", "fid"]}})
    said = []
    first = Evaluation(settings, 4, CPU)(sampler_for(settings), said.append)
    assert len(said) == 2
    looked_at = []
    view = Reference.view
    monkeypatch.setattr(Reference, "view", lambda self, place: looked_at.append(place) or view(self, place))
    second = Evaluation(settings, 4, CPU)
    assert second(sampler_for(settings), said.append).metrics == first.metrics
    assert len(looked_at) == 16  # those that the identity holds
    assert second(sampler_for(settings), said.append).metrics == first.metrics
    assert len(said) == 2
    other = config({"evaluation": {"metrics": ["cmmd", "fid", "dino_mmd"]}})
    Evaluation(other, 4, CPU).prepare(said.append)
    assert said[2].startswith("DINO-MMD: statistics of 22 reference pictures in ")
    assert len(said) == 3


def test_mixed_aspects(config):
    settings = config({"data": {"aspect": "mixed", "resolution": 24}, "evaluation": {"metrics": ["cmmd"]}})
    scores = Evaluation(settings, 4, CPU)(sampler_for(settings))
    assert scores.metrics["cmmd"] > 0


def test_a_damaged_cache_is_refused(config, tmp_path):
    settings = config({"evaluation": {"metrics": ["fid"]}})
    Evaluation(settings, 4, CPU).prepare()
    (file,) = (tmp_path / "cache").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=f"{file.name} is damaged: sha256 .*; delete it, and it is made again"
    ):
        Evaluation(settings, 4, CPU).prepare()


def test_another_network_does_not_use_its_statistics(config, tmp_path, features):
    settings = config({"evaluation": {"metrics": ["cmmd"]}})
    Evaluation(settings, 4, CPU).prepare()
    network = open_network("cmmd", features["cmmd"], "key", CPU).network
    network.visual_projection.weight.data += 1
    network.save_pretrained(tmp_path / "other")
    said = []
    other = config({"evaluation": {"metrics": ["cmmd"], "features": {"cmmd": str(tmp_path / "other")}}})
    Evaluation(other, 4, CPU).prepare(said.append)
    assert len(said) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_samples_that_are_not_finite(config):
    settings = config({"evaluation": {"metrics": ["fid"]}})
    sampler = sampler_for(settings)
    sampler.denoiser.final_layer.linear.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"sample 0 \(.*\) is not finite; look at the weights"):
        Evaluation(settings, 4, CPU)(sampler)


def test_leaves_randomness_and_counters(config):
    settings = config({"conditioning": {"text": {"max_tokens": 2}}, "evaluation": {"metrics": ["cmmd"]}})
    sampler = sampler_for(settings)
    before = torch.random.get_rng_state()
    Evaluation(settings, 4, CPU)(sampler)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (sampler.text_encoder.truncated, sampler.caption_tokens) == (0, 0)


def test_parts_are_those_of_one_process(monkeypatch):
    """Whatever the number of processes, every part is taken once."""
    for ranks in (1, 2, 3, 5):
        monkeypatch.setattr(module.process_group, "world_size", lambda ranks=ranks: ranks)
        taken = []
        for rank in range(ranks):
            monkeypatch.setattr(module.process_group, "rank", lambda rank=rank: rank)
            taken += module._shares(100, "test")
        assert sorted(taken, key=lambda part: part.start) == [
            range(0, 32),
            range(32, 64),
            range(64, 96),
            range(96, 100),
        ]


def test_record_is_json(config):
    settings = config({"evaluation": {"metrics": ["cmmd"], "samples": 4}})
    scores = Evaluation(settings, 4, CPU)(sampler_for(settings))
    record = json.loads(json.dumps(scores.record()))
    assert {"cmmd", "samples", "reference", "images_per_second"} <= record.keys()
    assert "mfu" not in record
    assert scores.line().startswith("CMMD ")


@pytest.mark.parametrize("metrics", [[], ["fid", "fid"]])
def test_refused_settings(config, metrics):
    with pytest.raises(UserError, match="name one or more, each once"):
        config({"evaluation": {"metrics": metrics}})


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("no memory")]
)
def test_an_error_of_one_process_is_one_of_all_and_training_goes_on(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(module.process_group, "gather_objects", lambda mine: [None, mine])
    with pytest.raises(UserError, match=r"No space left|no memory"):
        module.agreed(fail)


def test_what_is_missing_is_left_out_or_refused(config, features):
    lacking = {"features": {**features, "fid": "nowhere.pth"}, "metrics": ["fid", "fid_prx", "cmmd"]}
    settings = config({"evaluation": lacking})
    with pytest.raises(UserError, match=r"cannot load 'nowhere\.pth'"):
        Evaluation(settings, 4, CPU)
    some = Evaluation(settings, 4, CPU, missing="skip")
    assert list(some.networks) == ["cmmd"]
    ((reason, metrics),) = some.lacking.items()
    assert metrics == ("fid", "fid_prx")
    assert "set evaluation.features.fid" in reason
    assert some(sampler_for(settings)).metrics.keys() == {"cmmd"}
    none = Evaluation(config({"evaluation": {**lacking, "reference": "nowhere"}}), 4, CPU, missing="skip")
    assert none.networks == {}
    assert list(none.lacking.values()) == [("fid", "fid_prx", "cmmd"), ("fid", "fid_prx")]
