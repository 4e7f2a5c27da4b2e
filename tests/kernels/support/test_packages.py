"""What is installed: asked of module names and of distributions."""

import sys

import pytest

from millrace.kernels.support.packages import is_importable, is_installed


def test_finds_modules():
    assert is_importable("torch.nn")
    assert not is_importable("torch.no_such_part")
    assert not is_importable("no_such_package.part")


@pytest.mark.parametrize("error", ["ImportError('undefined symbol')", "ModuleNotFoundError('gone')"])
def test_a_package_that_cannot_be_imported_is_not_there(error, tmp_path, monkeypatch):
    """As one that was built for another torch."""
    package = tmp_path / "built_for_another_torch"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}")
    (package / "part.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    is_importable.cache_clear()
    assert not is_importable("built_for_another_torch.part")
    assert "built_for_another_torch" not in sys.modules
    is_importable.cache_clear()


def test_finds_distributions():
    assert is_installed("torch")
    assert is_installed("pytest-timeout")
    assert not is_installed("pytest_timeout.no_such_distribution")
