"""A training step never waits for the GPU: on a CUDA device PyTorch is told to raise when the host does, and
everywhere the source of the step's modules is read for what would make it wait."""

import ast
from pathlib import Path

import pytest
import torch

from millrace.engine.config import Config
from millrace.engine.losses.flow_matching import FlowMatching
from millrace.engine.model.denoiser import Denoiser
from millrace.engine.model.routing import routing_policy

ROOT = Path(__file__).resolve().parents[2]
STEP = sorted(
    path
    for pattern in (
        "kernels/**/*.py",
        "engine/model/*.py",
        "engine/losses/*.py",
        "engine/optim/*.py",
        "engine/repa_e/tuner.py",
        "engine/encoders/batch_encoder.py",
    )
    for path in ROOT.glob(pattern)
)
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "synchronize"}
"""Calls that copy from the device to the host, or whose result has a size that only the device knows."""

MAY_WAIT = {
    ("packed.py", "sample_slices"): "reads the offsets of CPU tensors",
    ("flow_loss.py", "_forward_eager"): "plain PyTorch, for the CPU and FP64",
    ("sample_route.py", "sample_route"): "only where the caller does not know the lengths",
    ("denoiser.py", "predict"): "the dense form that sampling uses",
}
"""Functions outside the step on a GPU, by file, each with the reason."""


def waits(source: str) -> list[tuple[str, int, str]]:
    """(function, line, what) of every expression that would make the host wait for the device."""
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS:
            found.append((function, node.lineno, f"{node.func.attr}()"))
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            inner = node.slice.operand if isinstance(node.slice, ast.UnaryOp) else node.slice
            named = isinstance(inner, ast.Name) and "mask" in inner.id
            if named or isinstance(inner, ast.Compare):
                found.append((function, node.lineno, "an index that is a mask"))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_finds_what_waits():
    source = (
        "def f(x, mask):\n"
        "    a = x[mask], x[x > 0], x[~mask], x[0], x[1:], x['mask']\n"
        "    return x.sum().item(), torch.nonzero(x), x.diff().tolist()\n"
    )
    assert [(line, what) for _, line, what in waits(source)] == [
        (2, "an index that is a mask"),
        (2, "an index that is a mask"),
        (2, "an index that is a mask"),
        (3, "item()"),
        (3, "nonzero()"),
        (3, "tolist()"),
    ]


@pytest.mark.parametrize("path", STEP, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_of_a_step_does_not_wait(path):
    found = [
        f"{path}:{line} {function}: {what}"
        for function, line, what in waits(path.read_text())
        if (path.name, function) not in MAY_WAIT
    ]
    assert not found, found


def test_every_exception_is_needed():
    used = {(path.name, function) for path in STEP for function, _, _ in waits(path.read_text())}
    assert set(MAY_WAIT) <= used


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
        (prediction,) = denoiser(noisy, t, text, layout, span)
        flow.loss(prediction, clean, noise, t, layout).mean().backward()

    step()  # compiles the kernels and fills the caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
