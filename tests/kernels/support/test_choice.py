"""Which implementation `auto` takes: the measured one where it can run, and the log where it cannot."""

import logging
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from millrace import kernels
from millrace.kernels.support import choice, cuda_library

ROOT = Path(kernels.__file__).parent
# The package `millrace.kernels.ops` has modules of these names, the one above it functions.
flow_loss, gated_residual_norm_modulate, geglu, routing = (
    import_module(f"millrace.kernels.ops.{name}")
    for name in ("flow_loss", "gated_residual_norm_modulate", "geglu", "routing")
)
MODULES = {
    "flow_loss": (flow_loss, "cuda"),
    "gated_residual_norm_modulate": (gated_residual_norm_modulate, "cuda"),
    "gather_tokens": (routing, "cuda"),
    "scatter_tokens": (routing, "cuda"),
    "geglu": (geglu, "liger"),
}
GPU = SimpleNamespace(is_cuda=True, get_device=lambda: 0)


@pytest.fixture
def measured(monkeypatch):
    """Sets what is fastest on GPU 0 by operation; nothing has been told yet."""
    monkeypatch.setattr(choice, "_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(choice, "_told", set())

    def build(**fastest):
        monkeypatch.setattr(choice, "measured_choices", lambda: {"GPU 0": fastest})

    return build


@pytest.mark.parametrize("backend", choice.IMPLEMENTATIONS)
def test_what_is_asked_for_is_taken(backend, measured):
    """Whether it can run or not: then it says itself what is missing."""
    measured(operation="cuda")
    assert choice.choose("operation", backend, GPU, {"cuda": lambda: "not built"}) == backend


@pytest.mark.parametrize(
    ("fastest", "obstacle", "taken"),
    [
        ("cuda", None, "cuda"),
        ("cuda", "not built", "triton"),
        ("reference", None, "reference"),
        ("triton", None, "triton"),
        ("of a later version", None, "triton"),
    ],
)
def test_the_measured_choice_where_it_can_run(fastest, obstacle, taken, measured, caplog):
    measured(operation=fastest)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choice.choose("operation", "auto", GPU, {"cuda": lambda: obstacle}) == taken
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (fastest != taken)  # once, though asked three times
    for line in told:
        assert "operation" in line
        assert fastest in line
        assert (obstacle or "no implementation of this name") in line


def test_each_choice_is_told_by_itself(measured, caplog):
    measured(one="cuda", other="cuda")
    for operation in ("one", "other", "one"):
        choice.choose(operation, "auto", GPU, {"cuda": lambda: "not built"})
    assert len(caplog.records) == 2


def test_nothing_is_measured_on_the_cpu_or_on_another_gpu(measured):
    measured(operation="cuda")
    usable = {"cuda": lambda: None}
    assert choice.choose("operation", "auto", torch.zeros(1), usable) == "triton"
    other = SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    assert choice.choose("operation", "auto", other, usable) == "triton"


@pytest.mark.parametrize(
    ("operation", "built", "settings", "obstacle"),
    [
        ("flow_loss", False, {}, "has not been built"),
        ("flow_loss", True, {}, None),
        ("flow_loss", True, {"width": 6}, "multiples of 4"),
        ("flow_loss", True, {"dtype": torch.float64}, "torch.float64"),
        ("flow_loss", True, {"width": 8192}, None),
        ("gated_residual_norm_modulate", False, {}, "has not been built"),
        ("gated_residual_norm_modulate", True, {}, None),
        ("gated_residual_norm_modulate", True, {"width": 4104}, "at most 4096"),
        ("gated_residual_norm_modulate", True, {"branch": torch.bfloat16}, "torch.bfloat16, torch.float32"),
        ("gather_tokens", False, {}, "has not been built"),
        ("gather_tokens", True, {"width": 6}, None),
        ("scatter_tokens", False, {}, "has not been built"),
        ("scatter_tokens", True, {"width": 6}, None),
        ("scatter_tokens", True, {"inplace": True}, "not contiguous"),
        ("geglu", False, {}, "liger-kernel is not installed"),
        ("geglu", True, {}, None),
    ],
)
def test_operations_know_what_stands_in_the_way(operation, built, settings, obstacle, monkeypatch):
    """Of the one implementation that may be missing; nothing of it runs here."""
    module, implementation = MODULES[operation]
    found = []

    def record(name, backend, tensor, obstacles):
        found.append((name, obstacles[implementation]()))
        return "reference"

    monkeypatch.setattr(module, "choose", record)
    monkeypatch.setattr(cuda_library, "available", lambda: built)
    monkeypatch.setattr(geglu, "is_importable", lambda _: built)
    width, dtype = settings.get("width", 8), settings.get("dtype", torch.float32)
    x = torch.zeros(2, 2 * width, dtype=dtype)[:, ::2]
    offsets, t, index = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1), torch.tensor([0])
    vector = torch.zeros(1, width)
    match operation:
        case "flow_loss":
            kernels.flow_loss(x, x, x, t, offsets)
        case "gated_residual_norm_modulate":
            branch = x.to(settings.get("branch", dtype))
            kernels.gated_residual_norm_modulate(x, branch, vector, vector, vector, offsets)
        case "gather_tokens":
            kernels.gather_tokens(x, index)
        case "scatter_tokens":
            kernels.scatter_tokens(x, x[:1], index, inplace=settings.get("inplace", False))
        case "geglu":
            kernels.geglu(x)
    ((name, reason),) = found
    assert name == operation
    assert (reason is None) == (obstacle is None)
    assert obstacle is None or obstacle in reason


def test_every_operation_with_a_choice_is_covered():
    """Those that ask `choose`, by the text of the package."""
    asking = {path.stem for path in (ROOT / "ops").glob("*.py") if "choose(" in path.read_text()}
    assert asking == {module.__name__.rpartition(".")[2] for module, _ in MODULES.values()}
