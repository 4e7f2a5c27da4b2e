"""Links that leave docs/: to source files and folders, which become pages of the site, and to pictures.

In the repository such a link (`../engine/trainer.py`) opens the file. The site takes what is linked along, as
`source/engine/trainer.py.md`, so that the link works there too and no address of a repository is needed.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

LINK = re.compile(r"\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
HOME = {"README.md": "index.md"}
"""Files above docs/ that a page of the site stands for."""
AS_THEY_ARE = {".png", ".svg", ".json"}
"""Endings of files that are copied; a result file is long, and read by programs."""
LANGUAGES = {
    ".py": "python",
    ".cu": "cuda",
    ".cpp": "cpp",
    ".h": "cpp",
    ".sh": "bash",
    ".toml": "toml",
    ".yml": "yaml",
    ".txt": "text",
}
FENCE = "`" * 8


def targets(markdown: str) -> set[str]:
    """Paths, relative to the root, of everything outside docs/ that a page of docs/ links."""
    return {posixpath.normpath("docs/" + path) for path, _ in LINK.findall(markdown)}


def rewritten(markdown: str) -> str:
    """A page of docs/ with its links to the rest of the repository turned to pages of the site."""

    def replace(found: re.Match[str]) -> str:
        path = posixpath.normpath("docs/" + found[1])
        return f"]({address(path)}{found[2] or ''})"

    return LINK.sub(replace, markdown)


def address(path: str) -> str:
    """Where the site has a file or folder of the repository, relative to its root."""
    if path in HOME:
        return HOME[path]
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" + ("" if Path(path).suffix in AS_THEY_ARE else ".md")


def with_contents(paths: set[str]) -> list[str]:
    """The paths that exist, sorted, and the files that the folders among them list."""
    found = {path for path in paths if path not in HOME and (ROOT / path).exists()}
    for path in list(found):
        if (ROOT / path).is_dir():
            found |= {f"{path}/{file.name}" for file in contents(path)}
    return sorted(found)


def contents(folder: str) -> list[Path]:
    """Files of a folder that can be shown."""
    return sorted(
        file
        for file in (ROOT / folder).iterdir()
        if file.suffix in LANGUAGES.keys() | AS_THEY_ARE and file.name != "CMakeLists.txt"
    )


def page(path: str) -> str:
    """The page of a file or folder, as Markdown."""
    text = [f"---\ntitle: {json.dumps(path)}\nsearch: {{exclude: true}}\n---", f"# `{path}`"]
    if (ROOT / path).is_dir():
        lines = (
            f"| [`{file.name}`]({file.name}{'' if file.suffix in AS_THEY_ARE else '.md'}) | {summary(file)} |"
            for file in contents(path)
        )
        return "\n\n".join([*text, "\n".join(["| file | what |", "|---|---|", *lines])]) + "\n"
    code = (ROOT / path).read_text()
    language = LANGUAGES.get(Path(path).suffix, "text")
    return "\n\n".join([*text, f'{FENCE}{language} linenums="1"\n{code.rstrip()}\n{FENCE}']) + "\n"


def summary(file: Path) -> str:
    """First paragraph of a Python file's docstring, in one line."""
    if file.suffix != ".py":
        return ""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
