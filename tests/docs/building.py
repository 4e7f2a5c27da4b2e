"""The programs that make the site, found as when one runs as a script, and MkDocs as `make docs` runs it."""

import os
import subprocess
import sys
from pathlib import Path

from tests import programs

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "docs" / "generator"


def load(name):
    """A file of docs/generator/."""
    return programs.load(name, GENERATOR)


def build(config):
    """The finished process of a strict build."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


class Site:
    """The site, built in a folder: its pages, and what the build said."""

    def __init__(self, folder):
        self.folder = folder / "site"
        load("stage").stage(folder / "docs")
        config = (ROOT / "mkdocs.yml").read_text()
        for name in ("docs", "site"):
            assert f"{name}_dir: build/{name}\n" in config
            config = config.replace(f"{name}_dir: build/{name}\n", f"{name}_dir: {name}\n")
        (folder / "mkdocs.yml").write_text(config)
        self.built = build(folder / "mkdocs.yml")
        self.pages = sorted(self.folder.rglob("*.html"))

    def page(self, name):
        return (self.folder / name).read_text()
