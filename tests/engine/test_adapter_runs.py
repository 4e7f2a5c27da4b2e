"""Runs that train an adapter, or a part of the model: what stays, what resumes, what is stored how."""

import pytest
import torch

from millrace.engine.checkpoint.checkpoints import list_checkpoints
from millrace.engine.checkpoint.model_weights import read_parameters, read_weights
from millrace.engine.checkpoint.sharded_tensors import CheckpointReader
from millrace.engine.config.loading import parse_config
from millrace.engine.distributed.zero_shards import masters
from millrace.engine.planning.step_memory import held_bytes, shape_of
from millrace.engine.trainer import Trainer
from tests.engine.run_states import assert_equal_states, copy_until, newest, tensors

pytestmark = pytest.mark.slow

BASE = {"run": {"steps": 4}}
BF16 = {"precision": {"compute": "bfloat16"}}
SAVED = {"checkpoint": {"every_steps": 3, "keep": 20}}


def stage(number):
    return {"deepspeed": {"zero_optimization": {"stage": number}}}


def adapter(kind, **more):
    return {"adapter": {"kind": kind, "rank": 4, "alpha": 8.0, **more}}


@pytest.fixture(scope="module")
def base(runs, tmp_path_factory):
    """A run whose weights are no longer those of the start; final layer and modulation start at zero."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert runs.here(folder, BASE).error is None
    return folder


def of(base, *changes):
    return ({"run": {"init_from": str(base)}}, SAVED, *changes)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_the_adapter_is_trained(runs, base, tmp_path, kind, compute):
    changes = of(base, adapter(kind), {"precision": {"compute": compute}})
    result = runs.here(tmp_path, *changes)
    assert result.error is None
    assert all(result.unchanged[step] is False for step in range(6))
    found, start = tensors(tmp_path), read_weights(newest(base), "ema")
    factors = {n.partition("/")[2] for n in found if n.startswith("exp_avg/")}
    names = ["lora_A", "lora_B"] + ["lora_magnitude"] * (kind == "dora")
    layers = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("qkv", "attn_out", "gate_up", "down")]
    assert factors == {f"{layer}.{name}" for layer in layers for name in names}
    assert {n.partition("/")[2] for n in found if n.startswith("ema/")} == factors
    wanted = getattr(torch, compute)
    for name, weight in start.items():
        kept = found[f"master/{name}"]
        linear = weight.dim() == 2 or name.endswith(".bias")
        assert kept.dtype == (wanted if linear else torch.float32), name
        assert torch.equal(kept, weight.to(kept.dtype)), name
    for name in factors:
        kinds = ("master", "ema", "exp_avg", "exp_avg_sq")
        assert {found[f"{kind}/{name}"].dtype for kind in kinds} == {torch.float32}
    moved = read_weights(newest(tmp_path), "model")
    assert moved.keys() == start.keys()
    assert [n for n in start if not torch.equal(moved[n].float(), found[f"master/{n}"].float())] == sorted(
        f"{layer}.weight" for layer in layers
    )


def assert_similar_states(found, wanted):
    found, wanted = tensors(found), tensors(wanted)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max() + 1e-9, name


@pytest.fixture(scope="module")
def trained(runs, base, tmp_path_factory):
    """Folder with runs of LoRA at each ZeRO stage, on one process and on two."""
    root = tmp_path_factory.mktemp("trained")
    for ranks in (1, 2):
        jobs = [runs.job(root / f"{ranks}-{n}", *of(base, adapter("lora"), stage(n))) for n in (0, 1, 2)]
        results = runs.forked(jobs, ranks=ranks)
        assert {result.error for each in results.values() for result in each} == {None}
    return root


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_stages_and_processes_agree(runs, trained, number, ranks):
    assert_similar_states(trained / f"{ranks}-{number}", trained / "1-0")
    losses = [[record["loss"] for record in runs.log(trained / n)] for n in (f"{ranks}-{number}", "1-0")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_run_resumes_bit_for_bit(runs, base, trained, tmp_path, ranks):
    jobs = []
    for number in (0, 1, 2):
        run = copy_until(trained / f"{ranks}-{number}", 3, tmp_path / str(number))
        jobs.append(runs.job(run, *of(base, adapter("lora"), stage(number)), resume="auto"))
    results = runs.forked(jobs, ranks=ranks)
    assert {result.error for each in results.values() for result in each} == {None}
    for number in (0, 1, 2):
        assert_equal_states(tmp_path / str(number), trained / f"{ranks}-{number}")


def test_dora_resumes_bit_for_bit_in_bf16_recomputed(runs, base, tmp_path):
    more = {"run": {"activation_checkpointing": {"policy": "full"}}}
    changes = of(base, adapter("dora", unfrozen=["final_layer.*", "*_norm"]), BF16, stage(1), more)
    assert runs.here(tmp_path / "whole", *changes).error is None
    run = copy_until(tmp_path / "whole", 3, tmp_path / "run")
    assert runs.here(run, *changes, resume="auto").error is None
    assert_equal_states(run, tmp_path / "whole")
    kinds = {name.partition("/")[2] for name in tensors(run) if name.startswith("exp_avg/")}
    assert {"final_layer.linear.weight", "blocks.1.key_norm", "blocks.0.qkv.lora_magnitude"} < kinds


def test_routed_and_compiled_blocks_take_an_adapter(runs, base, tmp_path):
    """Compiled blocks compute what the others do."""
    routing = {"routing": {"policy": "tread", "start": 1, "end": 1}}
    for name, more in (("plain", {}), ("compiled", {"run": {"compile": True}})):
        changes = of(base, adapter("dora"), routing, more, {"run": {"steps": 2}})
        assert runs.here(tmp_path / name, *changes).error is None
    assert_similar_states(tmp_path / "compiled", tmp_path / "plain")


def test_frozen_parameters_stay(runs, base, tmp_path):
    """One block and the text's keys: their bits are those of the start, in the dtype of products."""
    frozen = {"optimizer": {"frozen": ["blocks.0.*", "text_kv.*"]}}
    assert runs.here(tmp_path, *of(base, frozen, BF16, stage(2))).error is None
    found, start = tensors(tmp_path), read_weights(newest(base), "ema")
    for name, weight in start.items():
        kept = found[f"master/{name}"]
        still = name.startswith(("blocks.0.", "text_kv."))
        assert (f"exp_avg/{name}" not in found) == still
        assert torch.equal(kept, weight.to(kept.dtype)) == still
        assert kept.dtype == (torch.bfloat16 if still and weight.dim() == 2 else torch.float32)
    assert torch.equal(
        read_weights(newest(tmp_path), "ema")["text_kv.weight"], found["master/text_kv.weight"]
    )


def test_a_stage_may_freeze_and_thaw(runs, tmp_path):
    stages = [
        {"at": 2, "name": "frozen", "optimizer": {"frozen": ["blocks.*"]}},
        {"at": 4, "name": "all again", "optimizer": {"frozen": []}},
    ]
    changes = ({"stages": stages}, {"checkpoint": {"every_steps": 2, "keep": 20}})
    assert runs.here(tmp_path / "whole", *changes).error is None
    states = {}
    for step, folder in list_checkpoints(tmp_path / "whole" / "checkpoints"):
        states[step] = CheckpointReader(folder).tensor("master/blocks.0.qkv.weight")
    assert torch.equal(states[2], states[4])
    assert not torch.equal(states[4], states[6])
    run = copy_until(tmp_path / "whole", 2, tmp_path / "run")
    assert runs.here(run, *changes, resume="auto").error is None
    assert_equal_states(run, tmp_path / "whole")


def test_the_audit_says_what_is_frozen(runs, base, tmp_path, capfd):
    changes = of(base, adapter("lora"), BF16, {"run": {"steps": 1}})
    assert runs.here(tmp_path, *changes).error is None
    lines = [" ".join(line.split()) for line in capfd.readouterr().err.splitlines()]
    factors = sum(p.numel() for n, p in tensors(tmp_path).items() if n.startswith("exp_avg/"))
    assert f"weights used in forward float32 ({factors:,})" in lines
    assert f"master weights (this rank) float32 ({factors:,})" in lines
    (frozen,) = (line for line in lines if line.startswith("frozen weights, never updated"))
    assert "bfloat16 (" in frozen
    assert "adapter: lora, rank 4, scale 2, on blocks.*" in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            adapter("lora", targets=["blocks.*.query_norm"]),
            "adapter.targets: 'blocks.*.query_norm' is no",
        ),
        (adapter("lora", unfrozen=["nothing"]), "adapter.unfrozen: 'nothing' is no parameter of the model"),
        (adapter("lora", unfrozen=["blocks.0.*"]), "adapter.unfrozen names blocks.0."),
        ({"optimizer": {"frozen": ["head"]}}, "optimizer.frozen: 'head' is no parameter; names are such as"),
        ({"optimizer": {"frozen": ["*"]}}, "optimizer.frozen names all that would be trained"),
        ({**adapter("lora"), **stage(3)}, "adapter.kind leaves little to shard"),
        ({"optimizer": {"frozen": ["text_kv.*"]}, **stage(3)}, "optimizer.frozen leaves little to shard"),
        (
            {**adapter("lora"), "stages": [{"at": 3, "adapter": {"rank": 8}}]},
            "changes adapter.rank, which holds for the whole run",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(runs, tmp_path, changes, message):
    assert message in runs.here(tmp_path, changes).error


def test_another_rank_is_no_continuation(runs, base, trained, tmp_path):
    run = copy_until(trained / "1-0", 3, tmp_path / "run")
    error = runs.here(run, *of(base, adapter("lora", rank=8)), resume="auto").error
    assert "lora_A is (4, 32) there and (8, 32) in this configuration" in error


def _held(trainer):
    """Bytes of a process by what they are for, as the planner names it; of one process at any stage."""
    parameters, flats = list(trainer.model.parameters()), masters(trainer.shards)
    kept = {
        "weights": [p for p in parameters if p.requires_grad],
        "frozen weights": [p for p in parameters if not p.requires_grad],
        "working copies": trainer.working_weights.copies,
        "master weights": flats if trainer.zero_stage else [],
        "Adam moments": [v for flat in flats for v in trainer.optimizer.state[flat].values() if v.dim()],
        "EMA": trainer.ema.tensors,
    }
    sizes = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in kept.items()}
    return {name: size for name, size in sizes.items() if size}


@pytest.mark.parametrize("number", [0, 1])
def test_what_samples_are_drawn_with_is_what_a_checkpoint_gives(runs, base, tmp_path, number):
    """Frozen weights, and the adapter's average merged into those that have one."""
    grid = {"sampling": {"every_steps": 2, "steps": 2, "count": 4}, "run": {"steps": 2}}
    values = runs.values(tmp_path, *of(base, adapter("dora"), BF16, stage(number), grid))
    trainer = Trainer(parse_config(values, "test"))
    trainer.train()
    drawn = {name: tensor.clone() for name, tensor in trainer.gathered("ema")}
    trainer.release()
    assert any(path.suffix == ".png" for path in tmp_path.rglob("*"))
    assert held_bytes(trainer.config, number, 1, shape_of(trainer.config)) == pytest.approx(_held(trainer))
    stored = read_weights(newest(tmp_path), "ema")
    assert drawn.keys() == stored.keys()
    assert [name for name in stored if not torch.equal(drawn[name], stored[name])] == []
    assert any(name.endswith(".lora_B") for name in read_parameters(newest(tmp_path), "ema"))
