"""Imports go one way, read from the syntax trees: nothing is imported here."""

import ast
import functools
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAZY = {"liger_kernel", "flash_attn", "flash_attn_interface", "xformers", "transformer_engine"}
"""Packages that a kernel may import inside a function, because they need not be installed."""

RIDDLES = {"What", "Which", "Where", "How", "Whether", "Why", "When", "From", "Does", "Everything", "Is"}
"""First words of a docstring that asks where its reader looks something up."""

FILES = sorted(path for folder in ("kernels", "engine") for path in (ROOT / folder).rglob("*.py"))

ROOMS = (
    "kernels",
    "engine.util",
    "engine.cli",
    "engine.config",
    "engine.distributed",
    "engine.data",
    "engine.model",
    "engine.optim",
    "engine.checkpoint",
    "engine.encoders",
    "engine.losses",
    "engine.run_log",
    "engine.sampling",
    "engine.repa_e",
    "engine.publishing",
    "engine.evaluation",
    "engine.comparison",
    "engine.planning",
    "engine",
)
"""From the bottom up: at its top level a file imports its own room and those named before it; the last is the
trainer and the commands. Inside a function it may import what only that function needs."""
BARRED = {"engine.data": ("kernels", "engine.model"), "engine.config": ("kernels",)}
"""Rooms below a room that it must know nothing of, not even inside a function."""


class Import(NamedTuple):
    line: int
    name: str
    lazy: bool
    """Whether it stands inside a function, or is for a type checker alone."""


def module_name(path: Path) -> str:
    """`engine/model/blocks.py` -> `engine.model.blocks`, `kernels/__init__.py` -> `kernels`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(module: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import statement of a source text; `from a import b` counts as `a.b`, dots are resolved."""
    tree = ast.parse(source)
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                above = ["millrace", *package][: len(package) + 2 - node.level]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(node.lineno, name, id(node) in inside)


def imports_in(path: Path) -> list[Import]:
    return list(imports_of(module_name(path), path.read_text(), path.name == "__init__.py"))


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def of_project(found: Import) -> str | None:
    """`millrace.engine.x` -> `engine.x`; None for anything else."""
    return found.name.removeprefix("millrace.") if is_within(found.name, "millrace") else None


def test_reads_imports():
    """The reader that the tests below trust."""
    source = (
        "import os, numpy.linalg\n"
        "from millrace.engine import data\n"
        "from .layout import Grid\n"
        "from ..config import Model\n"
        "def f():\n"
        "    import xformers\n"
        "if TYPE_CHECKING:\n"
        "    import diffusers\n"
    )
    found = list(imports_of("engine.model.blocks", source))
    assert [(i.line, i.name, i.lazy) for i in found] == [
        (1, "os", False),
        (1, "numpy.linalg", False),
        (2, "millrace.engine.data", False),
        (3, "millrace.engine.model.layout.Grid", False),
        (4, "millrace.engine.config.Model", False),
        (6, "xformers", True),
        (8, "diffusers", True),
    ]
    (inside_package,) = imports_of("engine.model", "from .blocks import Block\n", is_package=True)
    assert inside_package.name == "millrace.engine.model.blocks.Block"


def test_finds_the_sources():
    names = {module_name(path) for path in FILES}
    assert {"kernels", "kernels.attention.rope_attention", "engine.model.denoiser", "engine.config"} <= names
    for room in ROOMS:
        assert any(is_within(name, room) for name in names), f"ROOMS names {room}, which has no file"


def test_no_base_name_occurs_twice_in_the_engine():
    """A reader who remembers `schedule.py` finds one."""
    places: dict[str, list[str]] = {}
    for path in (ROOT / "engine").rglob("*.py"):
        if path.name != "__init__.py":
            places.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not twice


@pytest.mark.parametrize("path", [path for path in FILES if path.read_text()], ids=module_name)
def test_module_docstrings_are_index_entries(path):
    """A page of first lines is the index of the project: each begins with the name of the thing."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = text.split("\n")[0]
    assert first, f"{path} says nothing of itself"
    word = first.split()[0].strip(",:")
    assert word not in RIDDLES, f"{path}: {first!r} begins with {word!r}; begin with the noun of the field"


def room_of(name: str) -> str:
    """The room of a module, or of a name in it."""
    return next(room for room in ROOMS if is_within(name, room))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_downwards(path):
    room = room_of(module_name(path))
    for found in imports_in(path):
        name = of_project(found)
        if name is None:
            continue
        other = room_of(name)
        allowed = found.lazy or ROOMS.index(other) <= ROOMS.index(room)
        assert allowed, f"{path}:{found.line} imports {found.name}, which lies above {room}"
        barred = any(is_within(name, part) for part in BARRED.get(room, ()))
        assert not barred, f"{path}:{found.line} imports {found.name}; {room} must not know of it"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=module_name)
def test_kernels_need_only_torch_and_triton(path):
    for found in imports_in(path):
        package = found.name.split(".")[0]
        known = package in sys.stdlib_module_names or package in {"torch", "triton", "millrace"}
        assert known or (found.lazy and package in LAZY), (
            f"{path}:{found.line} imports {found.name}; kernels import the standard library, torch, triton, "
            f"and inside functions {sorted(LAZY)}"
        )


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=module_name)
def test_functions_around_kernels_are_typed(path):
    """Ruff cannot tell a Triton kernel, whose arguments have no types, from the functions around it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            where = f"{path}:{node.lineno} {node.name}"
            assert not bare, f"{where}: {bare} have no type"
            assert node.returns is not None, f"{where}: no return type"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nobody_imports_the_training_command(path):
    for found in imports_in(path):
        assert not is_within(found.name, "millrace.engine.train"), f"{path}:{found.line} imports {found.name}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_project_imports_use_the_installed_name(path):
    """`import engine` or `import kernels` works from the repository only, and may find another package."""
    for found in imports_in(path):
        assert found.name.split(".")[0] not in {"engine", "kernels", "csrc"}, f"{path}:{found.line}"


@functools.cache
def graph_of_imports() -> dict[str, set[str]]:
    """Modules of the project by name, and what each needs at its top level, of the project and of others."""
    modules = {module_name(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        needed = graph[module_name(path)] = set()
        for found in imports_in(path):
            if found.lazy:
                continue
            name = of_project(found)
            if name is None:
                needed.add(found.name.partition(".")[0])
                continue
            parts = name.split(".")
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            needed |= prefixes & modules  # importing a module imports the packages that it lies in
    return graph


LIGHT = ("engine.cli", "engine.config", "engine.util", "engine.sampling.model_arguments")
COMMANDS = ("train", "sample", "evaluate", "export", "prepare", "cache", "plan", "compare", "replay")


@pytest.mark.parametrize("room", [*LIGHT, *(f"engine.{name}" for name in COMMANDS)])
def test_what_parses_arguments_and_configurations_needs_neither_torch_nor_triton(room):
    graph = graph_of_imports()
    for start in (name for name in graph if is_within(name, room)):
        way, todo = {start: start}, [start]
        while todo:
            name = todo.pop()
            for needed in graph.get(name, ()):
                if needed not in way:
                    way[needed] = f"{way[name]} -> {needed}"
                    todo.append(needed)
        heavy = [way[name] for name in ("torch", "triton", "safetensors", "deepspeed") if name in way]
        assert not heavy, heavy


def test_no_module_imports_itself_through_others():
    modules = {module_name(path) for path in FILES}
    graph = {}
    for path in FILES:
        needed = set()
        for found in imports_in(path):
            name = of_project(found) or ""
            owner = name if name in modules else name.rpartition(".")[0]
            if owner in modules and not found.lazy:
                needed.add(owner)
        graph[module_name(path)] = needed - {module_name(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")
