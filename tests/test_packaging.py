"""What a wheel holds beside the modules."""

import runpy
from pathlib import Path

import setuptools

from millrace.engine.config.loading import load_config, shipped_configs

ROOT = Path(__file__).resolve().parents[1]


def test_every_configuration_is_in_the_wheel(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    folders = {"configs": "millrace.configs", "configs/models": "millrace.configs.models"}
    for path in (ROOT / "configs").rglob("*.json"):
        package = folders[path.parent.relative_to(ROOT).as_posix()]
        assert package in given["packages"]
        assert given["package_data"][package] == ["*.json"]
    assert given["package_dir"]["millrace.configs"] == "configs"


def test_shipped_configurations_are_found_by_name_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "jit_1024_tread", "models/prx_1b"} <= set(shipped_configs())
    assert "schema" not in shipped_configs()
    for name, path in shipped_configs().items():
        assert load_config(name) == load_config(f"{name}.json") == load_config(path)


def test_a_file_of_the_current_folder_comes_before_a_shipped_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.json").write_text('{"run": {"steps": 7}}')
    (tmp_path / "quickstart").mkdir()  # a folder is no configuration
    assert load_config("quickstart.json").run.steps == 7
    assert load_config("quickstart").run.steps == 900
