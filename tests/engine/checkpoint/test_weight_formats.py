"""Files: what is written loads in diffusers, what diffusers writes loads here, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import PRXTransformer2DModel
from safetensors.torch import load_file, save_file

from millrace.engine import export
from millrace.engine.checkpoint import weight_formats
from millrace.engine.checkpoint.checkpoints import save_checkpoint
from millrace.engine.checkpoint.sharded_tensors import Piece
from millrace.engine.config import Config, Model, Routing
from millrace.engine.model.conversion import diffusers_config, diffusers_state, prx_state
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.util.errors import UserError

LATENT = Model(width=32, depth=3, heads=2, in_channels=16, patch_size=2, context_dim=12, rope_axes=(8, 8))
PIXEL = Model(
    width=48,
    depth=2,
    heads=3,
    mlp_ratio=2.0,
    in_channels=3,
    patch_size=16,
    bottleneck=10,
    context_dim=12,
    rope_axes=(4, 12),
    rope_theta=500.0,
    resolution_embedding=True,
)
MODELS = pytest.mark.parametrize("config", [LATENT, PIXEL], ids=["latent", "pixel"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
WHOLE = "diffusion_pytorch_model.safetensors"


def _random_denoiser(config, routing=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(config, routing)
    for tensor in denoiser.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.3, generator=generator)
    return denoiser.to(dtype)


def _assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


@MODELS
@DTYPES
def test_through_a_diffusers_model_and_back(config, dtype):
    denoiser = _random_denoiser(config, dtype=dtype)
    theirs = weight_formats.to_diffusers(denoiser)
    assert theirs.dtype == dtype
    found = weight_formats.from_diffusers(theirs)
    assert found.config == config
    _assert_equal(found.state_dict(), denoiser.state_dict())


def test_conversion_copies():
    denoiser = _random_denoiser(LATENT)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    theirs = weight_formats.to_diffusers(denoiser)
    with torch.no_grad():
        for parameter in weight_formats.from_diffusers(theirs).parameters():
            assert parameter.requires_grad
            parameter.zero_()
        _assert_equal(theirs.state_dict(), diffusers_state(before, LATENT))
        for parameter in theirs.parameters():
            assert parameter.requires_grad
            parameter.zero_()
        _assert_equal(denoiser.state_dict(), before)


@MODELS
@DTYPES
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["whole", "sharded"])
def test_folder_loads_in_diffusers_and_here(config, dtype, shard_bytes, tmp_path):
    denoiser = _random_denoiser(config)
    weight_formats.save_diffusers(denoiser.state_dict(), config, tmp_path / "out", dtype, shard_bytes)

    theirs, report = PRXTransformer2DModel.from_pretrained(
        tmp_path / "out", torch_dtype=dtype, output_loading_info=True
    )
    assert not any(report.values())
    wanted = {name: tensor.to(dtype) for name, tensor in denoiser.state_dict().items()}
    _assert_equal(theirs.state_dict(), diffusers_state(wanted, config))

    for source in (theirs, tmp_path / "out", str(tmp_path / "out")):
        found = weight_formats.from_diffusers(source)
        assert found.config == config
        _assert_equal(found.state_dict(), wanted)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["whole", "sharded"])
def test_folder_is_laid_out_as_diffusers_does(shard_bytes, tmp_path):
    denoiser = _random_denoiser(LATENT)
    weight_formats.to_diffusers(denoiser).save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    weight_formats.save_diffusers(
        denoiser.state_dict(), LATENT, tmp_path / "ours", max_shard_bytes=shard_bytes
    )
    ours, theirs = ({file.name: file for file in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    config = json.loads(theirs["config.json"].read_text())
    del config["_diffusers_version"]
    assert json.loads(ours["config.json"].read_text()) == config
    if shard_bytes == 10**9:
        assert ours.keys() == theirs.keys() == {WHOLE, "config.json"}
        _assert_equal(load_file(ours[WHOLE]), load_file(theirs[WHOLE]))
        return
    index = f"{WHOLE}.index.json"
    found, wanted = (json.loads(files[index].read_text()) for files in (ours, theirs))
    assert found["metadata"] == wanted["metadata"]
    assert found["weight_map"].keys() == wanted["weight_map"].keys()
    shards = sorted(set(ours) - {index, "config.json"})
    assert len(shards) > 2
    assert shards == [
        f"diffusion_pytorch_model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for shard in shards:
        tensors = load_file(ours[shard])
        assert all(found["weight_map"][name] == shard for name in tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["whole", "sharded"])
def test_reads_what_diffusers_saves_also_inside_a_pipeline(shard_bytes, tmp_path):
    denoiser = _random_denoiser(PIXEL)
    weight_formats.to_diffusers(denoiser).save_pretrained(
        tmp_path / "transformer", max_shard_size=shard_bytes
    )
    for folder in (tmp_path, tmp_path / "transformer"):
        state, config, *_ = weight_formats.load_weights(folder)
        assert config == PIXEL
        _assert_equal(state, denoiser.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_photoroom_state_dict(suffix, under, tmp_path):
    state = dict(_random_denoiser(LATENT).state_dict())
    theirs = {name: part.clone() for name, part in prx_state(state, LATENT).items()}
    path = tmp_path / f"prx.{suffix}"
    if suffix == "safetensors":
        save_file(theirs, path)
    else:
        torch.save({under: theirs} if under else theirs, path)
    found, config, *_ = weight_formats.load_weights(path)
    assert config == LATENT.model_copy(update={"rope_axes": None})
    _assert_equal(found, state)
    # What shapes cannot tell is the caller's to decide.
    folded = LATENT.model_copy(update={"in_channels": 4, "patch_size": 4, "rope_theta": 7.0})
    found, config, *_ = weight_formats.load_weights(path, folded)
    assert config == folded
    _assert_equal(found, state)


def _ddp(theirs):
    return {f"module.{name}": tensor for name, tensor in theirs.items()}


def _composer(theirs, ema=None):
    """A checkpoint of Photoroom/PRX's trainer, by the names in its pipeline."""
    model = {f"denoiser.{name.replace('blocks.', 'blocks._orig_mod.')}": x for name, x in theirs.items()}
    model |= {"vae.scale": torch.ones(1), "text_tower.embed.weight": torch.ones(2, 2)}
    if ema is not None:
        model["ema_denoiser._is_active"] = torch.tensor(ema)
        model |= {f"ema_denoiser.model.{name}": tensor + 1 for name, tensor in theirs.items()}
    rng = [{"numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}]
    return {"state": {"model": model, "timestamp": {"Timestamp": {"batch": 7}}}, "rng": rng}


WRAPPED = {
    "module": (_ddp, "weights"),
    "module under model": (lambda theirs: {"model": _ddp(theirs), "step": 3}, "weights"),
    "composer": (_composer, "weights"),
    "composer before its EMA": (lambda theirs: _composer(theirs, False), "weights"),
    "composer with EMA": (lambda theirs: _composer(theirs, True), "EMA weights"),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_what_trainers_put_around_a_state_dict_is_taken_off(form, tmp_path):
    wrap, what = WRAPPED[form]
    state = dict(_random_denoiser(LATENT).state_dict())
    theirs = {name: part.clone() for name, part in prx_state(state, LATENT).items()}
    torch.save(wrap(theirs), tmp_path / "their.pt")
    found = weight_formats.load_weights(tmp_path / "their.pt", LATENT)
    assert found.origin == f"{what} of the state dict {tmp_path / 'their.pt'}"
    more = 1 if what == "EMA weights" else 0
    _assert_equal(found.state, {name: tensor + more for name, tensor in state.items()})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands for the client of the hub: `OWNER/NAME` is a folder below `tmp_path / "hub"`."""
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        if not (tmp_path / "hub" / name).is_dir():
            raise OSError(f"Repository Not Found: {name}.\nPlease make sure you specified it correctly.")
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_weights_of_the_hub(hub, tmp_path):
    denoiser = _random_denoiser(PIXEL)
    folder = tmp_path / "hub" / "someone" / "prx" / "transformer"
    weight_formats.to_diffusers(denoiser).save_pretrained(folder)
    found = weight_formats.load_weights("someone/prx@v2", PIXEL)
    assert found.origin == "weights of the diffusers pipeline someone/prx@v2"
    _assert_equal(found.state, denoiser.state_dict())
    assert hub == [("someone/prx", "v2")]
    with pytest.raises(UserError) as caught:
        weight_formats.load_weights("someone/else")
    assert str(caught.value) == (
        "someone/else: no such file or folder here, and not to be had from the hub: "
        "Repository Not Found: someone/else"
    )


def test_the_hub_without_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="for a repository of the hub: pip install huggingface_hub"):
        weight_formats.load_weights("someone/prx")


def test_an_export_says_of_what_it_was_made(tmp_path):
    _save_run(tmp_path / "run", LATENT)
    export.main(["--checkpoint", f"{tmp_path}/run", "--output", f"{tmp_path}/out"])
    denoiser = Denoiser(LATENT)
    (line,) = weight_formats.start_from(denoiser, tmp_path / "out", heads=["projector.weight"])
    assert line == (
        f"init_from: weights of the diffusers folder {tmp_path}/out (EMA weights of {tmp_path}/run/"
        f"checkpoints/step-00000007, step 7): {len(denoiser.state_dict())} tensors, "
        "left new: projector.weight"
    )


@DTYPES
def test_save_prx_round_trip(dtype, tmp_path):
    state = dict(_random_denoiser(PIXEL).state_dict())
    weight_formats.save_prx(state, PIXEL, tmp_path / "out", dtype)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["denoiser.safetensors"]
    found, *_ = weight_formats.load_weights(tmp_path / "out" / "denoiser.safetensors", PIXEL)
    _assert_equal(found, {name: tensor.to(dtype) for name, tensor in state.items()})


class _Arbitrary:
    pass


def test_pickles_of_code_are_refused(tmp_path):
    torch.save({"model": _Arbitrary()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: cannot be read as a state dict"):
        weight_formats.load_weights(tmp_path / "evil.pt")


def test_unreadable_weights(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        weight_formats.load_weights(tmp_path / "absent")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"cut\.safetensors: cannot be read as a state dict"):
        weight_formats.load_weights(tmp_path / "cut.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a state dict"):
        weight_formats.load_weights(tmp_path / "list.pt")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps(diffusers_config(LATENT)))
    with pytest.raises(UserError, match=rf"half/{WHOLE}: cannot be read"):
        weight_formats.load_weights(tmp_path / "half")
    (tmp_path / "half" / f"{WHOLE}.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: there is no weight_map"):
        weight_formats.load_weights(tmp_path / "half")
    for text, problem in (("{", "cannot be read"), ("[]", "expected a JSON object, this is a list")):
        (tmp_path / "half" / "config.json").write_text(text)
        with pytest.raises(UserError, match=rf"config\.json: {problem}"):
            weight_formats.load_weights(tmp_path / "half")


def test_folder_of_another_model_is_refused(tmp_path):
    weight_formats.save_diffusers(_random_denoiser(LATENT).state_dict(), LATENT, tmp_path / "out")
    assert weight_formats.load_weights(tmp_path / "out", LATENT)[1] is LATENT
    wanted = LATENT.model_copy(update={"rope_theta": 500.0, "in_channels": 4, "patch_size": 4})
    with pytest.raises(UserError) as caught:
        weight_formats.load_weights(tmp_path / "out", wanted)
    assert str(caught.value).endswith(
        "is another model: in_channels 16 instead of 4, patch_size 2 instead of 4, theta 10000 instead of 500"
    )


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes").write_text("mine")
    state = _random_denoiser(LATENT).state_dict()
    for save in (weight_formats.save_diffusers, weight_formats.save_prx):
        with pytest.raises(UserError, match="is not empty"):
            save(state, LATENT, tmp_path)
        with pytest.raises(UserError, match="cannot be created"):
            save(state, LATENT, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_missing_diffusers_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install 'diffusers"):
        weight_formats.to_diffusers(_random_denoiser(LATENT))


def _save_run(run, model, *, ema=True, routing=None):
    """A run whose EMA is the weights plus one; returns both. Buffers are in both as they are."""
    denoiser = _random_denoiser(model, routing)
    buffers = dict(denoiser.named_buffers())
    master = {name: tensor.detach() for name, tensor in denoiser.named_parameters()}
    average = {name: tensor + 1 for name, tensor in master.items()}
    tensors = {f"master/{name}": tensor for name, tensor in master.items()}
    tensors |= {f"buffer/{name}": tensor for name, tensor in buffers.items()}
    if ema:
        tensors |= {f"ema/{name}": tensor for name, tensor in average.items()}
    pieces = [Piece(name, tuple(tensor.shape), 0, tensor.flatten()) for name, tensor in tensors.items()]
    values = {"model": model.model_dump(), "routing": (routing or Routing()).model_dump()}
    config = Config.model_validate(values)
    meta = {"config": config.model_dump(mode="json"), "samples": 1792}
    save_checkpoint(run / "checkpoints", 7, pieces, meta, keep=1)
    return master | buffers, average | buffers


def test_load_weights_of_a_run(tmp_path):
    _, average = _save_run(tmp_path, LATENT)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-00000007"):
        state, config, *_ = weight_formats.load_weights(path, LATENT)
        assert config == LATENT
        _assert_equal(state, average)
    with pytest.raises(UserError, match=r"is another model: .*hidden_size 32 instead of 48"):
        weight_formats.load_weights(tmp_path, PIXEL)


SPRINT = Routing(policy="sprint", start=0, end=1)
FROZEN = SPRINT.model_copy(update={"mask_token": "frozen"})


@pytest.mark.parametrize("routing", [SPRINT, FROZEN], ids=["learned", "frozen"])
def test_sprint_round_trip(routing, tmp_path):
    _, average = _save_run(tmp_path, LATENT, routing=routing)
    assert "fusion.mask_token" in average
    state, config, found, _ = weight_formats.load_weights(tmp_path)
    assert (config, found) == (LATENT, routing)
    _assert_equal(state, average)
    denoiser = weight_formats.from_diffusers(tmp_path)
    _assert_equal(denoiser.state_dict(), average)
    other = Denoiser(LATENT, routing)
    (line,) = weight_formats.start_from(other, tmp_path)
    assert line == (
        f"init_from: EMA weights of {tmp_path}/checkpoints/step-00000007, step 7: {len(average)} tensors, "
        "none left new"
    )
    _assert_equal(other.state_dict(), average)
    for refused in (
        lambda: weight_formats.to_diffusers(denoiser),
        lambda: weight_formats.save_diffusers(state, config, tmp_path / "out"),
        lambda: weight_formats.save_prx(state, config, tmp_path / "out"),
        lambda: export.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match=r"SPRINT model, whose fusion layer has no place in diffusers'"):
            refused()
    assert not (tmp_path / "out").exists()


def test_starting_sprint_from_weights_without_it(tmp_path):
    master, _ = _save_run(tmp_path, LATENT, ema=False)
    denoiser = Denoiser(LATENT, FROZEN)
    denoiser.init_weights(5)
    fresh = {name: tensor.clone() for name, tensor in denoiser.state_dict().items() if "fusion" in name}
    line, message = weight_formats.start_from(denoiser, tmp_path)
    assert line.endswith(
        f"step 7: {len(master)} tensors, left new: fusion.weight, fusion.bias, fusion.mask_token"
    )
    assert message == (
        f"warning: {tmp_path} has no SPRINT fusion layer; this run's starts from random weights"
    )
    assert len(fresh) == 3
    _assert_equal(denoiser.state_dict(), master | fresh)


def test_starting_without_sprint_from_its_weights(tmp_path):
    master, _ = _save_run(tmp_path, LATENT, ema=False, routing=FROZEN)
    denoiser = Denoiser(LATENT, Routing(policy="tread"))
    _, message = weight_formats.start_from(denoiser, tmp_path)
    assert message.startswith(f"warning: {tmp_path} is a SPRINT model; its fusion layer is left out")
    assert "routing.policy is tread" in message
    _assert_equal(denoiser.state_dict(), {n: tensor for n, tensor in master.items() if "fusion" not in n})


def test_sprint_of_other_blocks_or_order_is_refused(tmp_path):
    _save_run(tmp_path, LATENT, routing=SPRINT)
    other = SPRINT.model_copy(update={"end": 2, "fuse_order": "deep_dense"})
    with pytest.raises(
        UserError, match=r"routing: end 1 instead of 2, fuse_order dense_deep instead of deep_d"
    ):
        weight_formats.start_from(Denoiser(LATENT, other), tmp_path)
    learned = Denoiser(LATENT, FROZEN)  # the other kind of mask token holds the same numbers
    assert len(weight_formats.start_from(learned, tmp_path)) == 1


def test_public_names_of_the_export_module():
    assert export.to_diffusers is weight_formats.to_diffusers
    assert export.from_diffusers is weight_formats.from_diffusers
    with pytest.raises(AttributeError, match="no attribute 'to_difusers'"):
        export.to_difusers  # noqa: B018 - the attribute's absence is what is tested


@pytest.mark.parametrize("choice", ["auto", "ema", "model"])
@DTYPES
def test_command_writes_a_diffusers_folder(choice, dtype, tmp_path, capsys):
    master, average = _save_run(tmp_path / "run", LATENT)
    name = str(dtype).removeprefix("torch.")
    arguments = ["--checkpoint", f"{tmp_path}/run", "--output", f"{tmp_path}/out", "--weights", choice]
    export.main([*arguments, "--dtype", name])
    found = PRXTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype).state_dict()
    wanted = {key: part.to(dtype) for key, part in (master if choice == "model" else average).items()}
    _assert_equal(found, diffusers_state(wanted, LATENT))
    text = capsys.readouterr().out
    assert ("EMA weights" in text) == (choice != "model")
    assert "predicts the velocity, on flux1" in text


def test_command_runs_as_a_script_from_any_folder(tmp_path):
    master, _ = _save_run(tmp_path / "run", LATENT, ema=False)
    script = Path(export.__file__)

    def command(*arguments):
        return subprocess.run(
            [sys.executable, script, "--checkpoint", "run", "--output", "out", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = command("--format", "prx")
    assert done.returncode == 0, done.stderr
    _assert_equal(load_file(tmp_path / "out" / "denoiser.safetensors"), prx_state(master, LATENT))

    refused = command("--weights", "ema")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "no EMA weights" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_does_not_start_from_weights_that_are_not_finite(tmp_path):
    denoiser = _random_denoiser(LATENT)
    with torch.no_grad():
        denoiser.img_in.weight[0, 0] = float("nan")
    weight_formats.save_prx(denoiser.state_dict(), LATENT, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out: its weights are damaged: img_in\.weight \(1 element not finite\)"
    ):
        weight_formats.start_from(_random_denoiser(LATENT), tmp_path / "out")
