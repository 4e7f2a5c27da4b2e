"""Names in millrace.kernels: a profiler tells kernels apart, and a module is not hidden by its function."""

import ast
import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import millrace.kernels

ROOT = Path(__file__).resolve().parents[2] / "kernels"
OPERATIONS = {path.stem for path in (ROOT / "ops").glob("[a-z]*.py")}
OPERATIONS |= {"rope_attention", "copy_rows", "fold_sums", "uniform", "sample_keys"}
BOTH_WAYS = {"copy_rows_kernel", "fold_sums_kernel", "fp8_linear_amax_kernel", "fp8_linear_cast_kernel"}
"""Kernels that forward and backward passes share."""


def jit_functions() -> dict[str, list[str]]:
    """Names of the functions under `@triton.jit`, by file."""
    return {
        str(path.relative_to(ROOT)): [
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        ]
        for path in sorted(ROOT.rglob("*.py"))
    }


def launched() -> set[str]:
    """Names that stand before a grid, `name[grid](...)`, or are given to a launch as a value."""
    names = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id.endswith("_kernel"):
                names.add(node.id)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                target = node.func.value
                names |= {target.id} if isinstance(target, ast.Name) else set()
    return names


def test_kernels_are_named_for_operation_and_direction():
    kernels = [name for names in jit_functions().values() for name in names if name.endswith("_kernel")]
    assert len(kernels) > 20
    for name in kernels:
        assert any(name.startswith(operation + "_") for operation in OPERATIONS), name
        assert name in BOTH_WAYS or "_fwd_" in name or "_bwd_" in name, name
    assert set(kernels) >= BOTH_WAYS


def test_no_two_kernels_have_one_name():
    counts = Counter(name for names in jit_functions().values() for name in names if name.endswith("_kernel"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_what_is_launched_is_called_a_kernel_and_nothing_else_is():
    functions = {name for names in jit_functions().values() for name in names}
    assert {name for name in functions if name.endswith("_kernel")} == launched() & functions


@pytest.mark.parametrize("name", [n for n in millrace.kernels.__all__ if n[0].islower()])
def test_a_module_is_not_hidden_by_its_function(name):
    function = getattr(millrace.kernels, name)
    assert callable(function)
    assert not isinstance(function, ModuleType)
    module = importlib.import_module(function.__module__)
    parent, _, stem = function.__module__.rpartition(".")
    assert getattr(importlib.import_module(parent), stem) is module
