"""Sections that are made from results inside a page that people write: what stands between two marks."""

from millrace.engine.util.errors import UserError

BEGIN, END = "<!-- written by python -m benchmarks pages -->", "<!-- end -->"


def with_section(before: str, text: str, name: str) -> str:
    """The page `before` with `text` between its marks. Raises UserError, which names it, without them."""
    head, mark, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise UserError(f"docs/{name} has no line {BEGIN} and after it {END}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"
