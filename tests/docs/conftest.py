"""The programs that make the site, found as when one of them runs as a script, and the site itself."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "docs" / "generator"


def load(name):
    """A file of docs/generator/."""
    sys.path.insert(0, str(GENERATOR))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(GENERATOR))


def build(config):
    """Run MkDocs as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


class Site:
    """The built site: its folder, and what the build said."""

    def __init__(self, folder):
        self.folder = folder / "site"
        load("stage").stage(folder / "docs")
        config = (ROOT / "mkdocs.yml").read_text()
        config = config.replace("docs_dir: build/docs", "docs_dir: docs")
        config = config.replace("site_dir: build/site", "site_dir: site")
        (folder / "mkdocs.yml").write_text(config)
        self.built = build(folder / "mkdocs.yml")
        self.pages = sorted(self.folder.rglob("*.html"))

    def page(self, name):
        return (self.folder / name).read_text()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))
