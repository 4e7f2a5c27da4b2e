"""`python -m benchmarks NAME` runs every program by name, and nothing else knows the benchmarks."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from millrace.benchmarks import __main__ as programs
from millrace.engine.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_every_program_has_help(name, monkeypatch, capsys):
    module = import_module(f"millrace.benchmarks.{programs.PROGRAMS[name]}")
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--help"])
    with pytest.raises(SystemExit) as leaving:
        programs.main()
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m benchmarks " + name)
    assert module.__doc__.splitlines()[0] in " ".join(printed.split())


def test_the_overview_names_them_all_and_imports_none_of_them():
    code = "import sys; sys.argv = ['benchmarks']; from millrace.benchmarks import __main__ as m; m.main()"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(programs.PROGRAMS)


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "kernel"])
    with pytest.raises(UserError, match=r"kernel: no such benchmark; did you mean .*kernels"):
        programs.main()


def test_nothing_of_the_product_imports_a_benchmark():
    for folder in ("engine", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any("benchmarks" in name for name in names), path
