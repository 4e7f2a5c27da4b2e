"""The page of the operations: what each computes and fuses, from kernels/ and from the results."""

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from millrace.benchmarks.report import kernels_report
from millrace.benchmarks.report.recording import of, read_results
from millrace.kernels import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"

Result = dict[str, Any]

INTRODUCTION = """\
# Operations

Fused operations: tensors in, tensors out; they know no model and no configuration. Each is a file of
[kernels/](../kernels/) with its equation, a plain `reference`, the Triton kernels and the derivative,
registered with PyTorch as one operator: `torch.compile` sees no graph break, and FLOP and byte counters see
it. On a CPU the same operator runs as plain PyTorch. What speaks for each on a GPU is in
[Performance](performance.md#kernels); CUDA C++ for some of them is in [csrc](csrc.md).

T packed tokens, S packed text tokens, B samples, C width, F MLP width, H heads, D head_dim, P patch features.
This page is made from the docstrings in `kernels/` and from `benchmarks/results/`."""


def operations() -> dict[str, str]:
    """Public operations in the order of `kernels/__init__.py`, with their modules."""
    return {name: module.replace(".", "/") for name, module in OPERATIONS.items()}


def page() -> str:
    """The page as Markdown."""
    results = read_results()
    traffic, resources = ((of(results, name) or [None])[-1] for name in ("traffic", "resources"))
    modules: dict[str, list[str]] = defaultdict(list)
    for name, module in operations().items():
        modules[module].append(name)
    rows = []
    for module, names in modules.items():
        tree = ast.parse((KERNELS / f"{module}.py").read_text())
        text = ast.get_docstring(tree)
        links = ", ".join(f"[`{name}`](#{name})" for name in names)
        cuda = "yes" if _has_cuda(names) else ""
        rows.append(f"| {links} | {_first_sentence(text)} | {cuda} | {_on_a_gpu(results, names)} |")
    head = ["| operation | computes | CUDA C++ | on a GPU |", "|---|---|---|---|"]
    parts = [INTRODUCTION, "\n".join([*head, *rows])]
    for module, names in modules.items():
        tree = ast.parse((KERNELS / f"{module}.py").read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for i, name in enumerate(names):
            parts.append(f"## `{name}` {{ #{name} }}")
            if i == 0:
                parts += [f"[`kernels/{module}.py`](../kernels/{module}.py)", ast.get_docstring(tree)]
            else:
                parts.append(f"See [`{names[0]}`](#{names[0]}), in the same file.")
            parts.append(f"```python\n{_signature(functions[name])}\n```")
        parts += [
            text
            for text in (_bytes(traffic, names), _resources(resources, module.rpartition("/")[2]))
            if text
        ]
    return "\n\n".join(parts) + "\n"


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
    return re.split(r"(?<!et al)\. ", paragraph)[0].removesuffix(".")


def _has_cuda(names: list[str]) -> bool:
    library = (KERNELS / "support" / "cuda_library.py").read_text()
    return any(f"def {name.replace('_tokens', '_rows')}(" in library for name in names)


def _on_a_gpu(results: list[Result], names: list[str]) -> str:
    """How the fastest of ours stands to the fastest peer, over the cases of the newest measurement."""
    measured = [r for r in results if r["benchmark"] == "kernels" and r["device"] == "cuda"]
    ratios = []
    for _, rows in kernels_report.by_case(measured[-1]["rows"] if measured else []).items():
        best: dict[bool, float] = {}
        for row in rows:
            if row["operation"] in names:
                ours = row["implementation"].startswith("ours/")
                best[ours] = min(best.get(ours, row["seconds_median"]), row["seconds_median"])
        if len(best) == 2:
            ratios.append(best[False] / best[True])
    if not ratios:
        return "not measured"
    words = f"{min(ratios):.2f} to {max(ratios):.2f} times the fastest peer, {len(ratios)} cases"
    return f"{words} (`{measured[-1]['file']}`)"


def _signature(function: ast.FunctionDef) -> str:
    """The function without its body, with its docstring."""
    function.body = function.body[:1]
    function.decorator_list = []
    return ast.unparse(function) if len(ast.unparse(function.args)) < 80 else _long_signature(function)


def _long_signature(function: ast.FunctionDef) -> str:
    _, _, rest = ast.unparse(function).partition("\n")
    arguments = ast.unparse(function.args).split(", ")
    folded, depth, line = [], 0, ""
    for part in arguments:  # commas inside brackets do not part arguments
        line += (", " if depth else "") + part
        depth += part.count("[") - part.count("]") + part.count("(") - part.count(")")
        if depth == 0:
            folded.append(line)
            line = ""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return "\n".join([f"def {function.name}(", *(f"    {a}," for a in folded), f"){returns}:", rest])


def _bytes(traffic: Result | None, names: list[str]) -> str:
    """What the operation reads and writes in a training step, counted."""
    if traffic is None:
        return ""
    lines = []
    for row in traffic["rows"]:
        if row["side"] != "ours" or row["overrides"]:
            continue
        for part in row["fused"]:
            stem = part["operator"].removeprefix("millrace::")
            if _belongs(stem, names):
                lines.append(
                    f"| `{row['config']}`, {row['variant']} | `{stem}` | {part['kernels']} | "
                    f"{part['read'] / 1e9:.2f} | {part['written'] / 1e9:.2f} |"
                )
    if not lines:
        return ""
    head = ["| step | operator | kernels | GB read | GB written |", "|---|---|---|---|---|"]
    note = f"Bytes of one micro-batch, counted, from `benchmarks/results/{traffic['file']}`"
    return "\n".join([f'??? note "{note}"', "", *(f"    {line}" for line in [*head, *lines])])


def _belongs(operator: str, names: list[str]) -> bool:
    """Whether an operator is one of these operations, its derivative or a part of it."""
    every = operations()
    owner = max((name for name in every if operator.startswith(name)), key=len, default=None)
    return owner in names


def _resources(resources: Result | None, module: str) -> str:
    """What the compiled kernels of a file take, the most of any launch."""
    if resources is None:
        return ""
    parts = {module, f"{module}_triton"}
    if module == "rope_attention":
        parts |= {row["file"] for row in resources["kernels"] if row["file"].startswith("attention.")}
    lines = [
        f"| `{row['file']}.{row['kernel']}` | sm_{row['chip']} | {row['registers']} | "
        f"{row['spill_bytes']} | {row['shared_bytes'] / 1024:.1f} |"
        for row in resources["kernels"]
        if row["file"] in parts
    ]
    if not lines:
        return ""
    head = ["| kernel | for | registers | spilled bytes | shared KiB |", "|---|---|---|---|---|"]
    note = f"Compiled, the most of any launch, from `benchmarks/results/{resources['file']}`"
    return "\n".join([f'??? note "{note}"', "", *(f"    {line}" for line in [*head, *lines])])
