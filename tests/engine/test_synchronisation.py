"""A training step never waits for the GPU.

Three tests of it: the source of all that may run in a step is read for what would make the host wait; steps
of shipped configurations run on the CPU, where what a GPU would wait for is noted; and on a CUDA device
PyTorch is told to raise when the host waits.
"""

import ast
from pathlib import Path

import pytest
import torch

from millrace.engine.config import Config
from millrace.engine.config.loading import load_config
from millrace.engine.config.smoke import smoke
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import routing_policy
from millrace.engine.trainer import Trainer
from tests.engine.host_reads import HostReads

ROOT = Path(__file__).resolve().parents[2]

OUTSIDE = {
    "kernels/support/accuracy.py": "judges results in tests and benchmarks",
    "kernels/support/interpreter.py": "the CPU stands in for the GPU there",
    "engine/config": "has no tensors",
    "engine/data": "makes batches on the host, beside the step",
    "engine/checkpoint": "a checkpoint waits as long as it takes",
    "engine/evaluation": "between two steps",
    "engine/sampling": "between two steps",
    "engine/planning": "before the first step",
    "engine/replay_trainer.py": "looks at the samples after the step that it makes again",
    "engine/util/safetensors_file.py": "with a checkpoint or a cache",
    "engine/encoders/latent_cache_writer.py": "a command of its own",
}
"""Rooms and files of which nothing runs in a step, each with the reason. All others are read."""
READ = sorted(
    path
    for folder in ("kernels", "engine")
    for path in (ROOT / folder).rglob("*.py")
    if not any(path.is_relative_to(ROOT / outside) for outside in OUTSIDE)
)

MAY_WAIT = {
    ("kernels/ops/flow_loss.py", "_forward_eager"): "plain PyTorch, for the CPU and FP64",
    ("kernels/ops/sample_route.py", "sample_route"): "only where the caller does not know the lengths",
    ("kernels/support/packed.py", "sample_slices"): "reads the offsets of CPU tensors",
    ("engine/distributed/process_group.py", "any_rank"): "a tensor of the host, over gloo",
    ("engine/distributed/process_group.py", "sum_over_ranks"): "for statistics of an evaluation",
    ("engine/distributed/signals.py", "result"): "the poll of a step before, which the device has passed",
    ("engine/encoders/pretrained.py", "weights_digest"): "before the first step",
    ("engine/encoders/small_classifier.py", "save_classifier"): "before the first step",
    ("engine/encoders/teacher.py", "put"): "the first visit of a picture, if features are cached",
    ("engine/losses/contrastive.py", "save"): "writes a file of the command that makes the mean target",
    ("engine/model/denoiser.py", "predict"): "the dense form that sampling uses",
    ("engine/encoders/latent_statistics.py", "save_statistics"): "with a checkpoint",
    ("engine/optim/adamw_offload.py", "wait"): "the update is the host's, which needs the gradients",
    ("engine/repa_e/tuned_autoencoder.py", "save_autoencoder"): "with a checkpoint",
    ("engine/run_log/loss_buffer.py", "flush"): "every `logging.every_steps` steps",
    ("engine/trainer.py", "_report_bad"): "after a step that was skipped",
}
"""Functions that no step of a GPU waits in, or that may wait, each with the reason."""

STEP_MAY_WAIT = {
    ("engine/optim/optimizer_step.py", "_take_norm"): "decides whether the gradient is finite",
    ("engine/optim/adamw.py", "step"): "AdamW counts its steps in tensors of the host",
    ("engine/repa_e/replicated.py", "apply"): "AdamW counts its steps in tensors of the host",
}
"""Functions that read a tensor in every step, each with the reason."""

READS = {
    "argwhere",
    "bincount",
    "cpu",
    "equal",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "synchronize",
    "tolist",
    "unique",
    "unique_consecutive",
}
"""Calls that copy from the device to the host, or whose result has a size that only the device knows."""
PREDICATES = {"eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isinf", "isnan", "isin", "bool"}
PREDICATES |= {f"logical_{word}" for word in ("and", "or", "not", "xor")}


def is_boolean(node: ast.AST) -> bool:
    """Whether an expression gives a mask if what it is made of are tensors."""
    if isinstance(node, ast.Compare):
        return not any(isinstance(sign, ast.In | ast.NotIn | ast.Is | ast.IsNot) for sign in node.ops)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Invert)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor):
        return is_boolean(node.left) or is_boolean(node.right)
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") in PREDICATES


def masks_of(tree: ast.AST) -> set[str]:
    """Names of the variables and arguments that are given a boolean expression."""
    given = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_boolean(node.value):
            given |= {getattr(target, "id", getattr(target, "attr", "")) for target in node.targets}
        if isinstance(node, ast.keyword) and is_boolean(node.value):
            given.add(node.arg)
    return given


def waits(source: str, masks: frozenset[str] = frozenset()) -> list[tuple[str, int, str]]:
    """(function, line, what) of every expression that would make the host wait for the device.

    A mask is a boolean expression, a variable that the function gives one, and an attribute or a parameter
    whose name is in `masks` or has "mask" in it.
    """
    found = []

    def is_mask(index: ast.AST, own: set[str], parameters: set[str]) -> bool:
        if is_boolean(index):
            return True
        if isinstance(index, ast.Attribute):
            return index.attr in masks or "mask" in index.attr
        if isinstance(index, ast.Name):
            name = index.id
            return name in own or "mask" in name or (name in parameters and name in masks)
        return False

    def visit(node: ast.AST, function: str, own: set[str], parameters: set[str]) -> None:
        if isinstance(node, ast.FunctionDef):
            function, own = node.name, masks_of(node)
            parameters = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, given = node.func.attr, [getattr(argument, "value", None) for argument in node.args]
            if name in READS or (name == "to" and "cpu" in given) or (name == "where" and len(given) == 1):
                found.append((function, node.lineno, f"{name}()"))
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if any(is_mask(part, own, parameters) for part in parts):
                found.append((function, node.lineno, "an index that is a mask"))
        for child in ast.iter_child_nodes(node):
            visit(child, function, own, parameters)

    visit(ast.parse(source), "", set(), set())
    return found


ALL_MASKS = frozenset(name for path in READ for name in masks_of(ast.parse(path.read_text())))


def test_finds_what_waits():
    source = (
        "def f(x, mask, dropped, kept, span):\n"
        "    a = x[mask], x[x > 0], x[~mask], x[0], x[1:], x['mask'], x[kept]\n"
        "    keep = x.isfinite() & y\n"
        "    b = x[keep], x[:, keep], x[span.dropped], x[dropped], x[span.kept]\n"
        "    c = x.to('cpu'), x.to(y), torch.where(keep), torch.where(keep, x, y)\n"
        "    return x.sum().item(), torch.nonzero(x), x.diff().tolist()\n"
    )
    assert [(line, what) for _, line, what in waits(source, frozenset({"dropped"}))] == [
        *[(2, "an index that is a mask")] * 3,
        *[(4, "an index that is a mask")] * 4,
        *[(5, f"{name}()") for name in ("to", "where")],
        *[(6, f"{name}()") for name in ("item", "nonzero", "tolist")],
    ]


def test_attributes_that_are_masks_are_known():
    assert "dropped" in ALL_MASKS


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_of_a_step_does_not_wait(path):
    found = [
        f"{path}:{line} {function}: {what}"
        for function, line, what in waits(path.read_text(), ALL_MASKS)
        if (str(path.relative_to(ROOT)), function) not in MAY_WAIT
    ]
    assert not found, found


def test_every_exception_is_needed():
    used = {
        (str(path.relative_to(ROOT)), function)
        for path in READ
        for function, _, _ in waits(path.read_text(), ALL_MASKS)
    }
    assert set(MAY_WAIT) <= used
    assert [outside for outside in OUTSIDE if not (ROOT / outside).exists()] == []


CONFIGURATIONS = {
    "jit_1024_sprint": set(),
    "latent_256_contrastive": set(),
    "latent_256_haste": set(),
    "latent_256_muon": set(),
    "repa_e_tuning": {("engine/repa_e/replicated.py", "apply")},
    "speedrun_24h": set(),
}
"""Between them routing, losses, alignment, optimizers and tuning; with where only they wait."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_reads_nothing_but_what_it_must(name, tmp_path):
    """The second step, so that caches are filled; the loss buffer is not full after it."""
    overrides = [f"run.output_dir={tmp_path}", "logging.every_steps=10", "sampling.every_steps=0"]
    trainer = Trainer(smoke(load_config(ROOT / "configs" / f"{name}.json", overrides), overrides))
    trainer.train_step()
    with HostReads() as reads:
        trainer.train_step()
    everywhere = {
        ("engine/optim/optimizer_step.py", "_take_norm"),
        ("engine/optim/adamw.py", "step"),
    }
    assert reads.found == everywhere | CONFIGURATIONS[name]
    assert reads.found <= set(STEP_MAY_WAIT)


def test_a_run_finds_what_waits():
    """Each way to wait, in a function that seems to be the engine's."""
    ways = {
        "item": "x.sum().item()",
        "number": "float(x.sum())",
        "truth": "bool(x.any())",
        "read": "x[x > 0]",
        "write": "x.index_put_((x > 0,), x.new_zeros(2))",
        "nonzero": "x.nonzero()",
        "unique": "x.unique()",
        "lengths": "x.repeat_interleave(x.long().abs())",
    }
    spaces = {"x": torch.tensor([1.0, -1.0, 2.0])}
    with HostReads() as reads:
        for name, way in ways.items():
            text = f"def {name}(x):\n    return {way}\n"
            exec(compile(text, str(ROOT / "engine" / "trainer.py"), "exec"), spaces)
            spaces[name](spaces["x"])
    assert reads.found == {("engine/trainer.py", name) for name in ways}


@pytest.mark.cuda
@pytest.mark.parametrize("policy", ["none", "tread", "sprint"])
@pytest.mark.parametrize("grids", [[(8, 8)] * 2, [(8, 8), (4, 16)]], ids=["one grid", "two grids"])
def test_a_step_on_cuda_does_not_wait(policy, grids):
    config = Config(
        model={"width": 128, "depth": 6, "heads": 2, "in_channels": 4, "context_dim": 32},
        routing={"policy": policy, "start": 1, "end": 3},
        objective={"contrastive_weight": 0.05},
    )
    denoiser = Denoiser(config.model, config.routing)
    denoiser.init_weights(0)
    denoiser.to("cuda", torch.bfloat16)
    flow, routing = FlowMatching(config.objective, 0), routing_policy(config)
    clean = torch.randn(
        sum(rows * columns for rows, columns in grids), 16, device="cuda", dtype=torch.bfloat16
    )
    text = torch.randn(9, 32, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32).cuda()
    index = torch.arange(2).cuda()

    def step() -> None:
        layout = denoiser.layouts.layout(grids, offsets, 5)
        t = flow.time(index)
        noisy, noise = flow.noisy(clean, index, t, layout)
        span = routing.draw(layout, 0, index)
        prediction = denoiser(noisy, t, text, layout, span).prediction
        flow.loss(prediction, clean, noise, t, layout).mean().backward()

    step()  # compiles the kernels and fills the caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
