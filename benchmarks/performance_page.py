"""Write docs/performance.md from the files in benchmarks/results/, and from nothing else.

python benchmarks/performance_page.py            # write the page
python benchmarks/performance_page.py --check    # exit code 1 if the page is not what the results say

Of every benchmark the newest file of each device counts; what has no file is said not to be measured.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dataloader_report
import kernels_report
import page_scaling
import suite_page
from operation_cases import OPERATIONS as OTHERS
from recording import RESULTS, ROOT

Result = dict[str, Any]

PAGE = ROOT / "docs" / "performance.md"
OPERATIONS = ("rope_attention", *OTHERS)
CHARTS = "../benchmarks/results"
"""Where the page finds them."""
NEVER = "never ran on a GPU"
TITLE = "# Performance"
INTRODUCTION = """\
Written by `benchmarks/performance_page.py` from the files in `benchmarks/results/`: change those, not this
page. Every file there was written by a program of `benchmarks/`, with its machine, versions, commit and
command."""


def load(folder: Path) -> list[Result]:
    """The results of a folder, each with the names of its file and of its chart; oldest first."""
    results = []
    for path in sorted(folder.glob("*.json")):
        charts = (path.with_suffix(ending) for ending in (".svg", ".png"))
        chart = next((chart.name for chart in charts if chart.exists()), None)
        names = {"file": path.name, "chart": chart}
        results.append(json.loads(path.read_text()) | names)
    return sorted(results, key=lambda result: (result.get("time", ""), result["file"]))


def page(results: list[Result]) -> str:
    """The page as Markdown."""
    sections = [
        "\n\n".join([TITLE, INTRODUCTION]),
        kernels_section(of(results, "kernels")),
        suite_page.suite_section(of(results, "suite"), of(results, "routing"), _origin, markdown),
        throughput_section(of(results, "throughput")),
        suite_page.profile_section(of(results, "profile"), _origin, markdown, CHARTS),
        page_scaling.scaling_section(of(results, "scaling"), _origin, markdown, CHARTS),
        routing_section(of(results, "routing")),
        traffic_section(of(results, "traffic")),
        resources_section(of(results, "resources")),
        dataloader_section(of(results, "dataloader")),
    ]
    return "\n\n".join(sections) + "\n"


def of(results: list[Result], benchmark: str) -> list[Result]:
    """The results of one benchmark, but not those of a trial run."""
    return [r for r in results if r["benchmark"] == benchmark and not r.get("smoke")]


def kernels_section(results: list[Result]) -> str:
    """Every operation against its fastest peer and the ceiling of the device."""
    newest = {gpu_of(result): result for result in results if result["device"] == "cuda"}
    text = ["## Kernels"]
    ran = {row["operation"] for result in newest.values() for row in result["rows"] if _our_time(row)}
    for gpu, result in newest.items():
        text += [f"### {gpu}", _origin(result), _kernel_notes(result), _kernel_table(result)]
        if result["chart"]:
            text.append(f"![Share of the ceiling]({CHARTS}/{result['chart']})")
        untimed = kernels_report.without_times(result["rows"])
        if untimed:
            lines = (
                f"- `{operation}`, {implementation}: {status} ({', '.join(shapes)}): {reason}"
                for (operation, implementation, status, reason), shapes in untimed.items()
            )
            text += ["Not timed:", "\n".join(lines)]
    without = [operation for operation in OPERATIONS if operation not in ran]
    if without:
        rows = [[f"`{operation}`", NEVER] for operation in without]
        text += [markdown(["operation", "GPU measurement"], rows)]
        text += ["`benchmarks/gpu_report.sh` on a machine with a GPU measures them."]
    return "\n\n".join(text)


def _our_time(row: Result) -> bool:
    return row["status"] == "timed" and kernels_report.is_ours(row)


def _kernel_notes(result: Result) -> str:
    return (
        f"Ceilings measured in the same run: {kernels_report.ceilings_in_words(result['ceilings'])}. The "
        "share of the ceiling is the least work of the operation (each input read once, each output written "
        "once; or its products) over what the ceiling does in the median time. Ratio: the fastest peer's "
        "time over ours. Peers are those that were installed and right; *both* is forward and backward."
    )


def _kernel_table(result: Result) -> str:
    head = [
        "operation",
        "shape",
        "mode",
        "ours",
        "us (p20-p80)",
        "% of ceiling",
        "fastest peer",
        "us",
        "ratio",
    ]
    lines = []
    for (operation, shape, mode), rows in kernels_report.by_case(result["rows"]).items():
        ours = kernels_report.fastest(row for row in rows if kernels_report.is_ours(row))
        peer = kernels_report.fastest(row for row in rows if not kernels_report.is_ours(row))
        cells = [f"`{operation}`", shape, mode]
        cells += (
            [_name(ours), _spread(ours), f"{ours['share_of_ceiling']:.0%}"] if ours else ["none"] + 2 * ["-"]
        )
        cells += [_name(peer), f"{peer['seconds_median'] * 1e6:.1f}"] if peer else ["none", "-"]
        ratio = f"{peer['seconds_median'] / ours['seconds_median']:.2f}" if ours and peer else "-"
        lines.append([*cells, ratio])
    return markdown(head, lines)


def _name(row: Result) -> str:
    return row["implementation"].removeprefix("ours/") + (" (host gaps)" if row["host_gaps"] else "")


def _spread(row: Result) -> str:
    median, p20, p80 = (row[f"seconds_{which}"] * 1e6 for which in ("median", "p20", "p80"))
    return f"{median:.1f} ({p20:.1f}-{p80:.1f})"


def throughput_section(results: list[Result]) -> str:
    """The newest training steps of each configuration on each GPU."""
    text = ["## Training step"]
    rows: dict[tuple[Any, ...], tuple[str, Result]] = {}
    for result in results:
        for row in result["rows"]:
            if row["device"] == "cuda" and not row["smoke"]:
                key = (row["config"], tuple(row["overrides"]), row["conditioning"], row["devices"])
                rows[(gpu_of(result), *key)] = gpu_of(result), row
    if not rows:
        return "\n\n".join([*text, "Not measured: no result of `benchmarks/throughput.py` from a GPU."])
    head = ["GPU", "configuration", "inputs", "step ms (p20-p80)", "images/s per GPU", "MFU", "peak GiB"]
    lines = []
    for gpu, row in rows.values():
        times = [row[f"step_seconds_{which}"] * 1e3 for which in ("median", "p20", "p80")]
        name = " ".join([f"`{row['config']}`", *(f"`{override}`" for override in row["overrides"])])
        lines.append(
            [
                f"{row['devices']} x {gpu}",
                name,
                row["conditioning"],
                f"{times[0]:.1f} ({times[1]:.1f}-{times[2]:.1f})",
                f"{row['images_per_second_per_device']:.1f}",
                "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}",
                f"{row['peak_memory_bytes'] / 2**30:.1f}",
            ]
        )
    return "\n\n".join([*text, markdown(head, lines)])


def routing_section(results: list[Result]) -> str:
    """What routing saves, and our step beside diffusers', on each device."""
    text = ["## Routing"]
    newest = {(result["options"]["device"], device_of(result)): result for result in results}
    if not newest:
        return "\n\n".join([*text, "Not measured: no result of `benchmarks/routing.py`."])
    if all(kind != "cuda" for kind, _ in newest):
        text.append("On a GPU: not measured.")
    head = ["step", "side", "FLOPs to dense", "ms (p20-p80)", "to peer", "saved per saved FLOPs"]
    head += ["user ms", "to peer", "saved per saved FLOPs", "page faults", "peak MiB", "to peer"]
    for (kind, device), result in newest.items():
        options = result["options"]
        text += [f"### {device}" + ("" if kind == "cuda" else " (CPU)"), _origin(result)]
        text.append(
            f"Width {options['width']}, {options['depth']} blocks, {options['batch']} pictures of "
            f"{options['image_tokens']} tokens, {options['dtype'].removeprefix('torch.')}, "
            f"{'compiled' if options['compile'] else 'not compiled'}, {result['threads']} CPU threads. "
            "Forward and backward of one step; the peer is diffusers' PRX with Photoroom/PRX's routing. "
            "Saved per saved FLOPs: share of the dense time over share of the dense FLOPs. User ms: "
            "processor time outside the system; unlike the clock it leaves out what fresh memory costs (a "
            "page fault for every 4 KiB), which a GPU's caching allocator does not ask for. "
            f"Memory: {result['memory_method']}."
        )
        lines = []
        for row in result["rows"]:
            times = [row[f"seconds_{which}"] * 1e3 for which in ("median", "p20", "p80")]
            ours = row["side"] == "ours"
            lines.append(
                [
                    row["variant"],
                    row["side"],
                    f"{row['flop_ratio']:.3f}",
                    f"{times[0]:.1f} ({times[1]:.1f}-{times[2]:.1f})",
                    f"{row['time_ratio_to_peer']:.3f}" if ours else "",
                    _saved(row["saved_time_per_saved_flops"]),
                    f"{row['user_seconds_median'] * 1e3:.1f}",
                    f"{row['user_ratio_to_peer']:.3f}" if ours else "",
                    _saved(row["user_saved_per_saved_flops"]),
                    f"{row['page_faults_median']:.0f}",
                    f"{row['peak_bytes'] / 2**20:.1f}",
                    f"{row['memory_ratio_to_peer']:.3f}" if ours else "",
                ]
            )
        text.append(markdown(head, lines))
    return "\n\n".join(text)


def _saved(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def traffic_section(results: list[Result]) -> str:
    """The bytes of a step by our ledger, and the roofline that follows."""
    text = ["## Memory traffic, counted"]
    if not results:
        return "\n\n".join([*text, "Not counted: no result of `benchmarks/traffic.py`."])
    result = results[-1]
    ceilings = result["ceilings"]
    text += [
        _origin(result),
        "Counted, not timed: forward and backward of one micro-batch on meta tensors, every operator with "
        "what it reads and writes; ours with its fused operators, the peer (diffusers' PRX, Photoroom/PRX's "
        "routing) in eager PyTorch. The roofline assumes "
        f"{ceilings['gemm_flops_per_second'] / 1e12:g} TFLOP/s in products, "
        f"{ceilings['attention_forward_flops_per_second'] / 1e12:g} and "
        f"{ceilings['attention_backward_flops_per_second'] / 1e12:g} TFLOP/s in attention forward and "
        f"backward, {ceilings['copy_bytes_per_second'] / 1e12:g} TB/s in all else, nothing overlapped, no "
        "launch; so it bounds the speed from above, and is no measurement. MFU is of "
        f"{ceilings['peak_flops_per_second'] / 1e12:g} TFLOP/s.",
    ]
    head = [
        "configuration",
        "step",
        "side",
        "GEMM GB",
        "attention GB",
        "other GB",
        "other, to peer",
        "kernels",
    ]
    head += ["roofline ms", "time to peer", "MFU at most"]
    lines = []
    for row in result["rows"]:
        ours, totals = row["side"] == "ours", row["totals"]
        name = " ".join([f"`{row['config']}`", *(f"`{override}`" for override in row["overrides"])])
        lines.append(
            [
                name,
                row["variant"],
                row["side"],
                *(f"{totals[kind]['bytes'] / 1e9:.2f}" for kind in ("gemm", "attention", "other")),
                f"{row['other_bytes_to_peer']:.3f}" if ours else "",
                str(row["kernels"]),
                f"{row['roofline_seconds']['step'] * 1e3:.2f}",
                f"{row['time_to_peer']:.3f}" if ours else "",
                f"{row['mfu_bound']:.1%}",
            ]
        )
    return "\n\n".join([*text, markdown(head, lines)])


def resources_section(results: list[Result]) -> str:
    """What the compiled Triton kernels take, over all launches of each."""
    text = ["## Compiled kernels"]
    if not results:
        return "\n\n".join([*text, "Not compiled: no result of `benchmarks/resources.py`."])
    result = results[-1]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text.append(
        f"Triton kernels compiled for sm_80 and sm_90a without a GPU ({versions}; `{result['file']}`): the "
        "most that any launch of a kernel takes. Compiling shows that a kernel fits the chip, not that it is "
        "fast."
    )
    groups: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for row in result["kernels"]:
        groups[row["file"], row["kernel"], row["architecture"]].append(row)
    head = [
        "file",
        "kernel",
        "sm",
        "launches",
        "registers",
        "spilled bytes",
        "shared KiB",
        "tensor instructions",
    ]
    lines = []
    for (file, kernel, architecture), rows in sorted(groups.items()):
        shared = max(row["static_shared_bytes"] + row["dynamic_shared_bytes"] for row in rows)
        instructions = sorted({name for row in rows for name in row["instructions"]})
        lines.append(
            [
                f"`{file}`",
                f"`{kernel}`",
                str(architecture),
                str(len(rows)),
                str(max(row["registers"] for row in rows)),
                str(max(row["spill_bytes"] for row in rows)),
                f"{shared / 1024:.1f}",
                " ".join(instructions) or "-",
            ]
        )
    return "\n\n".join([*text, markdown(head, lines)])


def dataloader_section(results: list[Result]) -> str:
    """Loaders of pictures side by side on each CPU, and the cores that a GPU needs of ours."""
    text = ["## Loading pictures"]
    newest = {result["cpu"]: result for result in results}
    if not newest:
        return "\n\n".join([*text, "Not measured: no result of `benchmarks/dataloader.py`."])
    for cpu, result in newest.items():
        text += [f"### {cpu}, {result['cores']} cores", _origin(result)]
        text.append(dataloader_report.notes(result))
        head, *lines = dataloader_report.cells(result["rows"])
        text.append(markdown(head, lines))
        needs = dataloader_report.needs(result["rows"])
        if needs:
            text.append("Cores of this kind that feed one H200 at the throughputs the engine aims at:")
            head = ["training", "images/s", "loader", "cores"]
            text.append(markdown(head, [[a, str(b), c, f"{d:.1f}"] for a, b, c, d in needs]))
    return "\n\n".join(text)


def gpu_of(result: Result) -> str:
    """Name of the GPU of a result; several of one kind count as that kind."""
    return result["gpus"][0]["name"]


def device_of(result: Result) -> str:
    """What a result was measured on."""
    return gpu_of(result) if result["options"]["device"] == "cuda" else result["cpu"]


def _origin(result: Result) -> str:
    commit = result["commit"][:12] if result["commit"] else "unknown"
    changed = " with uncommitted changes" if result["dirty"] else ""
    torch, triton = result["versions"]["torch"], result["versions"]["triton"]
    return (
        f"`{result['file']}`: {result['time'][:10]}, commit {commit}{changed}, torch {torch}, Triton "
        f"{triton}, `{result['command']}`"
    )


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table; cells may not hold a bar."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n" + __doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the page")
    wanted = page(load(RESULTS))
    if not parser.parse_args().check:
        PAGE.write_text(wanted)
        print(f"written to {PAGE}")
        return 0
    if PAGE.exists() and PAGE.read_text() == wanted:
        return 0
    print(f"error: {PAGE} is out of date: run python benchmarks/performance_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
