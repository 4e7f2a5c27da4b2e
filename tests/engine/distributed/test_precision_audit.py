"""What FP32 masters are for, and the audit that insists on them."""

import pytest
import torch

from millrace.engine.config import Optimizer, Precision
from millrace.engine.distributed import deepspeed_engine, process_group
from millrace.engine.distributed.precision_audit import audit, require_masters
from millrace.engine.distributed.zero_shards import local_shards
from millrace.engine.optim.build_optimizer import build_optimizer
from millrace.engine.optim.ema import EmaWeights
from millrace.engine.util.errors import UserError

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def _job():
    process_group.initialize(CPU)


def engine_of(runs, tmp_path, master, module=None, stage=0):
    """(DeepSpeed engine, optimizer, shards) of a module of one weight, by the engine's own functions."""
    config = runs.config(
        tmp_path,
        {
            "precision": {"compute": "bfloat16", "master": master},
            "data": {"global_batch": 2},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        },
    )
    if module is None:
        module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(module.weight)
        module = module.to(DTYPES[master])
    settings = Optimizer(lr=1e-5, betas=(0.9, 0.95), eps=1e-8)
    optimizer = build_optimizer(module.named_parameters(), settings, CPU)
    engine, wrapped = deepspeed_engine.initialize_engine(config, module, optimizer)
    return config, engine, optimizer, local_shards(module, wrapped, stage)


@pytest.mark.parametrize(("master", "moved"), [("float32", 0.01), ("bfloat16", 0.0)])
def test_a_thousand_updates_of_1e_5(runs, tmp_path, master, moved):
    """Adam's step under a constant gradient is lr = 1e-5 of a weight of 1: BF16, whose spacing below 1 is
    2^-8, rounds every one of them away."""
    _, engine, _, shards = engine_of(runs, tmp_path, master)
    one = torch.ones(1, 1, dtype=DTYPES[master])
    for _ in range(1000):
        engine.backward(engine(one).sum())
        engine.step()
    assert shards[0].master.dtype == DTYPES[master]
    assert 1 - shards[0].master.item() == pytest.approx(moved, rel=0.01, abs=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_parameters_are_refused_at_every_stage(runs, tmp_path, stage):
    """A model handed over in BF16: DeepSpeed accepts it without a word."""
    module = torch.nn.Linear(4, 4).bfloat16()
    config, _, optimizer, shards = engine_of(runs, tmp_path, "float32", module, stage)
    with pytest.raises(UserError, match="precision audit") as raised:
        require_masters(module, shards, optimizer.state, config.precision)
    assert "bfloat16" in str(raised.value)
    assert '"precision": {"master": "bfloat16"}' in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bfloat16_is_accepted_where_asked_for(runs, tmp_path):
    config, engine, optimizer, shards = engine_of(runs, tmp_path, "bfloat16")
    require_masters(engine.module, shards, optimizer.state, config.precision)
    with pytest.raises(UserError, match="the weight weight is bfloat16, not float32"):
        require_masters(engine.module, shards, optimizer.state, Precision())


def test_a_master_is_refused_by_its_own_dtype(runs, tmp_path):
    _, _, optimizer, shards = engine_of(runs, tmp_path, "bfloat16")
    with pytest.raises(UserError, match="the master of weight is bfloat16"):
        require_masters(torch.nn.Linear(1, 1), shards, optimizer.state, Precision())


def test_moments_are_audited_too(runs, tmp_path):
    config, engine, optimizer, shards = engine_of(runs, tmp_path, "float32")
    engine.backward(engine(torch.ones(1, 1)).sum())
    engine.step()
    require_masters(engine.module, shards, optimizer.state, config.precision)
    state = optimizer.state[shards[0].master]
    state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    with pytest.raises(UserError, match="exp_avg_sq of weight is bfloat16"):
        require_masters(engine.module, shards, optimizer.state, config.precision)


def test_moments_have_8_bits_only_where_the_optimizer_says_so(runs, tmp_path):
    config, engine, _, shards = engine_of(runs, tmp_path, "float32")
    codes = {"exp_avg_8bit": torch.zeros(1, dtype=torch.uint8), "exp_avg_scale": torch.zeros(1)}
    state = {shards[0].master: codes}
    require_masters(engine.module, shards, state, config.precision, quantized=("exp_avg_8bit",))
    rows = dict(audit(engine.module, shards, state, [], config.precision))
    assert rows["optimizer state (this rank)"] == "uint8 (1), float32 (1)"
    with pytest.raises(UserError, match="exp_avg_8bit of weight is uint8, not float32"):
        require_masters(engine.module, shards, state, config.precision)
    codes["exp_avg_8bit"] = torch.zeros(1)
    with pytest.raises(UserError, match="exp_avg_8bit of weight is float32, not uint8"):
        require_masters(engine.module, shards, state, config.precision, quantized=("exp_avg_8bit",))


def test_audit_counts_what_is_stored(runs, tmp_path):
    config, engine, optimizer, shards = engine_of(runs, tmp_path, "float32", torch.nn.Linear(3, 5))
    ema = EmaWeights(config.ema, shards)
    rows = dict(audit(engine.module, shards, optimizer.state, ema.tensors, config.precision))
    assert rows["weights used in forward"] == "float32 (20)"
    assert rows["master weights (this rank)"] == "float32 (20)"
    assert rows["optimizer state (this rank)"] == "as the masters, at the first step"
    assert rows["EMA (this rank)"] == "float32 (20)"
    assert rows["matrix products and attention"] == "bfloat16"
    assert rows["gradient reduction"] == "float32"
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    rows = dict(audit(engine.module, shards, optimizer.state, ema.tensors, config.precision))
    assert rows["optimizer state (this rank)"] == "float32 (40)"
    two = EmaWeights(config.ema.model_copy(update={"second_decay": 0.5}), shards)
    rows = dict(audit(engine.module, shards, optimizer.state, two.tensors, config.precision))
    assert rows["EMA (this rank)"] == "float32 (40)"
