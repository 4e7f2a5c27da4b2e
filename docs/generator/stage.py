"""Put the pages of the site together in build/docs/, where MkDocs builds them.

python docs/generator/stage.py    # build/docs/, anew; `make docs` runs it and then mkdocs

From docs/ come the pages, with links that leave docs/ turned to pages of source code. From the repository
come the pages that are made: configurations, settings, operations. The result is plain Markdown without any
hook, so that another builder of such sites can take it too.
"""

import re
import shutil
import sys
from pathlib import Path

import kernels_page
import reference
import source_pages

DOCS, ROOT = source_pages.DOCS, source_pages.ROOT
STAGED = ROOT / "build" / "docs"

GENERATED = {
    "configurations.md": reference.configurations_page,
    "settings.md": reference.settings_page,
    "kernels.md": kernels_page.page,
}

_DRAWING = re.compile(r"^(!\[[^\]]*\]\((\S+\.svg)\))$", re.MULTILINE)
_FIGURE = re.compile(r"(?<=\|) [\d.]+(?: ± |-| \([\d.]+-)[\d.]+\)? (?=\|)")


def stage(folder: Path = STAGED) -> None:
    """Write the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("generator", "*.md", "__pycache__"))
    pages = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
    pages |= {name: make() for name, make in GENERATED.items()}
    linked = set().union(*(source_pages.targets(text) for text in pages.values()))
    for name, text in pages.items():
        _write(folder / name, with_whole_figures(with_drawings(source_pages.rewritten(text))))
    for path in source_pages.with_contents(linked):
        address = folder / source_pages.address(path)
        if address.suffix == ".md":
            _write(address, source_pages.page(path))
        else:
            address.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, address)


def with_drawings(markdown: str) -> str:
    """A page whose drawings link their files: on a telephone a reader opens one and enlarges it."""
    return _DRAWING.sub(r"[\1](\2)", markdown)


def with_whole_figures(markdown: str) -> str:
    """A page whose figures in tables do not break at a hyphen or a space: `1.2 (1.1-1.4)`, `0.5 ± 0.1`."""

    def whole(found: re.Match[str]) -> str:
        return f" {found.group().strip().replace(' ', chr(0xA0)).replace('-', chr(0x2011))} "

    return _FIGURE.sub(whole, markdown)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(stage())
