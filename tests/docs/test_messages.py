"""The messages on docs/troubleshooting.md and docs/clusters.md are ones that the engine can give."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("troubleshooting", "clusters")]
LEAST = 12
"""Characters that a message of the code must have besides what it fills in."""

MESSAGES = [
    message
    for page in PAGES
    for message in re.findall(r"^```output\n(.*)\n```$", page.read_text(), re.MULTILINE)
]


@cache
def strings():
    """Every string of engine/ that could be a message, in parts; None is what it fills in."""
    found = []
    for path in sorted((ROOT / "engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = re.split(r"(?=%s)", node.value)
                parts = [
                    piece for part in parts for piece in ([None, part[2:]] if part[:2] == "%s" else [part])
                ]
            else:
                continue
            if sum(len(part or "") for part in parts) >= LEAST:
                found.append(tuple(parts))
    return found


def given_by(message):
    """Strings that the message, or all of it after a place in the file, can come from."""
    likely = (parts for parts in strings() if all(part is None or part in message for part in parts))
    patterns = ("".join(".+?" if part is None else re.escape(part) for part in parts) for parts in likely)
    return [pattern for pattern in patterns if re.fullmatch(rf"(\S+: )*{pattern}", message)]


def test_the_pages_have_messages():
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:50])
def test_the_engine_can_say_it(message):
    line = re.sub(r"^(error|warning): ", "", message)
    # What is wrong and what to do may be two strings.
    given = given_by(line) or all(map(given_by, line.split("; ")))
    assert given, f"no string of engine/ makes this: {line}"


def test_a_changed_message_is_found():
    assert given_by(
        "runs/a already holds a run; continue it with --resume auto, or choose another run.output_dir"
    )
    assert not given_by("runs/a already holds a run; delete it, or choose another run.output_dir")
    assert not given_by("something else altogether")
