"""Measure every operation of millrace.kernels beside its peers, as a share of what the device can do.

python -m benchmarks kernels                                  # everything, on a CUDA GPU
python -m benchmarks kernels --seconds 300                    # the most important cases first, then stop
python -m benchmarks kernels --only geglu norm_modulate --shapes 1024 1024-sprint
python -m benchmarks kernels --only rope_attention --record-choices
python -m benchmarks kernels --smoke                          # all of it, tiny, on a CPU: no timings to quote

First the ceilings of this device: a large copy, a large product of random numbers. Then each case: its
inputs as the model makes them (cases.py), every implementation judged against float64 (accuracy.py),
those that are right timed in turns (timing.py), in three modes: forward as in training, keeping what backward
needs; backward alone, on a retained graph; both. What is not installed, wrong or failing is listed with the
reason.

The JSON is rewritten after every case, so that nothing measured is lost. On CUDA it goes to
benchmarks/results/ with a chart beside it, elsewhere only with --output. --record-choices writes what
is fastest on this GPU to kernels/support/measured.json, which `auto` reads.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from millrace.benchmarks.kernels import timing
from millrace.benchmarks.kernels.accuracy import Function, Gate, Verdict, as_tuple, output_gradients
from millrace.benchmarks.kernels.attention_cases import rope_attention_case
from millrace.benchmarks.kernels.cases import (
    MODES,
    Case,
    NotApplicable,
    Setting,
    Shape,
    full_shapes,
    small_shapes,
)
from millrace.benchmarks.kernels.operation_cases import OPERATIONS as OTHERS
from millrace.benchmarks.kernels.operation_cases import Operation
from millrace.benchmarks.report import kernels_report as report
from millrace.benchmarks.report import recording
from millrace.benchmarks.report.charts import draw_beside
from millrace.engine.cli import command_parser, run_command
from millrace.engine.util.errors import UserError
from millrace.kernels.support.registration import uses_triton

OPERATIONS = {"rope_attention": Operation(rope_attention_case), **OTHERS}
PEERS = ("liger-kernel", "flash-attn", "flash-attn-4", "xformers", "transformer-engine", "torchao")
MEASURED = recording.ROOT / "kernels" / "support" / "measured.json"
Row = dict[str, Any]


def cases(
    shapes: list[Shape], only: list[str], setting: Setting
) -> Iterator[tuple[str, Shape, Callable[[], Case]]]:
    """The chosen operations at the shapes where they apply, and what builds each; most important first."""
    for shape in shapes:
        for name in only:
            wanted = name == "rope_attention" or not shape.attention_only
            if wanted and OPERATIONS[name].applies(shape):
                yield name, shape, lambda n=name, s=shape: OPERATIONS[n].build(s, setting)


def run_case(case: Case, timer: timing.CudaTimer | timing.CpuTimer, rounds: int) -> list[Row]:
    """Judge and time all implementations of a case; one row each and mode, or one that says why not."""
    right, rows = judge(case)
    at = case.operation, case.shape
    calls: dict[tuple[str, str], timing.WarmCall] = {}
    for name, (function, _) in right.items():
        own, problem = _try(lambda function=function: _warm_calls(case, function, timer))
        if problem is not None:
            rows.append(_untimed(*at, name, *problem))
        else:
            calls |= {(name, mode): call for mode, call in own.items()}
    for (name, mode), samples in timing.interleave(timer, calls, rounds).items():
        p20, median, p80 = samples.percentiles()
        verdict, work = right[name][1], case.work[mode]
        rows.append(
            {
                **_identity(*at, name),
                "mode": mode,
                "dtype": sorted({str(x.dtype).removeprefix("torch.") for x in case.inputs.values()}),
                "status": "timed",
                "seconds_median": median,
                "seconds_p20": p20,
                "seconds_p80": p80,
                "bytes": work.bytes,
                "flops": work.flops,
                "host_gaps": samples.host_gaps,
                "error_over_allowed": verdict.error_over_allowed,
                "worst_error": verdict.where,
                "seconds": [round(seconds, 9) for seconds in samples.seconds],
            }
        )
    return rows


def judge(case: Case) -> tuple[dict[str, tuple[Function, Verdict]], list[Row]]:
    """The implementations that are right, and rows for all others: not installed, failing, wrong."""
    at = case.operation, case.shape
    gate = Gate(case.reference, case.plain or case.reference, case.inputs, case.differentiable)
    rows = [_untimed(*at, peer, "not applicable", reason) for peer, reason in case.absent]
    right = {}
    for name, build in case.implementations.items():
        function, problem = _try(build)
        if problem is None:
            verdict, problem = _try(lambda function=function: gate.check(function))
        if problem is None and not verdict.right:
            problem = "wrong", f"{verdict.where} is {verdict.error_over_allowed:.3g} times the allowed one"
        if problem is None:
            right[name] = function, verdict
        else:
            rows.append(_untimed(*at, name, *problem))
    return right, rows


def _warm_calls(
    case: Case, function: Function, timer: timing.CudaTimer | timing.CpuTimer
) -> dict[str, timing.WarmCall]:
    """The calls to time by mode, compiled and allocated."""
    leaves = {name: value.detach() for name, value in case.inputs.items()}
    if not case.differentiable:

        def forward() -> object:
            with torch.no_grad():
                return function(**leaves)

        calls: dict[str, timing.Call] = {"forward": forward}
    else:
        for leaf in leaves.values():
            leaf.requires_grad_()
        wanted = list(leaves.values())
        outputs = as_tuple(function(**leaves))
        gradients = output_gradients(outputs)

        def backward(outputs: tuple[Tensor, ...] = outputs) -> object:
            return torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, materialize_grads=True)

        def both() -> object:
            done = as_tuple(function(**leaves))
            return torch.autograd.grad(done, wanted, gradients, materialize_grads=True)

        calls = dict(zip(MODES, (lambda: function(**leaves), backward, both), strict=True))
    return {mode: timer.warm_up(call) for mode, call in calls.items()}


def _try(make: Callable[[], Any]) -> tuple[Any, tuple[str, str] | None]:
    """The result, or None and (status, reason): a peer may fail in any way, and the others must go on."""
    try:
        return make(), None
    except ImportError as error:
        return None, ("not installed", _first_line(error))
    except (NotApplicable, NotImplementedError) as error:  # the second is PyTorch's word for it
        return None, ("not applicable", _first_line(error))
    except torch.cuda.OutOfMemoryError as error:
        return None, ("failed", f"out of memory: {_first_line(error)}")
    except Exception as error:
        return None, ("failed", f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def _identity(operation: str, shape: Shape, implementation: str) -> Row:
    return {
        "operation": operation,
        "shape": asdict(shape) | {"kept": shape.kept, "rows": shape.rows},
        "implementation": implementation,
    }


def _untimed(operation: str, shape: Shape, implementation: str, status: str, reason: str) -> Row:
    row = _identity(operation, shape, implementation)
    return row | {"mode": None, "status": status, "reason": reason}


def share_of_ceiling(row: Row, ceilings: dict[str, Any]) -> float:
    """The least time that the work of a row takes on this device, over the time it took."""
    if row["bytes"] is not None:
        return row["bytes"] / ceilings["copy_bytes_per_second"] / row["seconds_median"]
    return row["flops"] / ceilings["gemm_flops_per_second"] / row["seconds_median"]


def measure(arguments: argparse.Namespace, content: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill `content` case by case."""
    setting = Setting(arguments.device, arguments.dtype, "aot_eager" if arguments.smoke else "inductor")
    timer = timing.timer_for(arguments.device)
    started = time.monotonic()
    content["ceilings"] = timing.ceilings(timer, arguments.device, arguments.dtype)
    for operation, shape, build in cases(arguments.shapes, arguments.only, setting):
        spent = time.monotonic() - started
        if arguments.seconds is not None and spent > arguments.seconds:
            content["left_out_for_time"].append(f"{operation} {shape.name}")
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        print(f"[{spent:6.0f} s] {operation} {shape.name}", file=sys.stderr, flush=True)
        with torch._functorch.config.patch(donated_buffer=False):  # a retained graph runs more than once
            rows, problem = _try(lambda build=build: run_case(build(), timer, arguments.rounds))
        if problem is not None:
            rows = [_untimed(operation, shape, "the reference itself", *problem)]
        for row in rows:
            if row["status"] == "timed":
                row["share_of_ceiling"] = share_of_ceiling(row, content["ceilings"])
        content["rows"] += rows
        save()
        gc.collect()
        if arguments.device.type == "cuda":
            torch.cuda.empty_cache()
    save()


def record_choices(rows: list[Row], path: Path, gpu: str) -> dict[str, str]:
    """Merge the fastest implementations on this GPU into `kernels/support/measured.json`; returns them."""
    found = report.choices(rows)
    measured = json.loads(path.read_text())
    measured[gpu] = measured.get(gpu, {}) | found
    recording.write(path, dict(sorted(measured.items())))
    return found


def parse() -> argparse.Namespace:
    """Arguments of the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(OPERATIONS),
        metavar="OPERATION",
        default=list(OPERATIONS),
        help="default all",
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="default all")
    parser.add_argument("--seconds", type=float, help="start no case after this time")
    parser.add_argument(
        "--rounds", type=int, help="batches of 4 calls per implementation and mode (default 6)"
    )
    parser.add_argument("--record-choices", action="store_true", help="write kernels/support/measured.json")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; kernels are measured on one (--smoke tries it on a CPU)")
    if arguments.record_choices and arguments.smoke:
        raise UserError("--record-choices takes measurements on a CUDA GPU: leave out --smoke")
    arguments.device = torch.device("cpu" if arguments.smoke else "cuda")
    arguments.dtype = torch.float32 if arguments.smoke else torch.bfloat16
    arguments.rounds = arguments.rounds or (1 if arguments.smoke else 6)
    known = {shape.name: shape for shape in (small_shapes() if arguments.smoke else full_shapes())}
    names = arguments.shapes or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"--shapes {name} is unknown, expected some of: {', '.join(known)}")
    arguments.shapes = [known[name] for name in names]
    return arguments


def main() -> int:
    """Measure, print, write."""
    arguments = parse()
    device = arguments.device
    output = arguments.output
    if output is None and device.type == "cuda":
        output = recording.default_path("kernels", device)
    environment = recording.environment()
    environment["versions"] |= {name: recording.version_of(name) for name in PEERS}
    content: dict[str, Any] = {
        "benchmark": "kernels",
        **environment,
        "device": device.type,
        "smoke": arguments.smoke,
        "ours_on_this_device": "Triton" if uses_triton(torch.empty(0, device=device)) else "plain PyTorch",
        "ceilings": {},
        "left_out_for_time": [],
        "rows": [],
    }

    def save() -> None:
        if output is not None:
            recording.write(output, content)

    try:
        measure(arguments, content, save)
    finally:
        if content["rows"]:
            _publish(content, output)
    if arguments.record_choices:
        found = record_choices(content["rows"], MEASURED, torch.cuda.get_device_name(device))
        print(f"{MEASURED}: {found}")
    return 0


def _publish(content: dict[str, Any], output: Path | None) -> None:
    print(report.text(content["rows"], content["ceilings"]))
    if content["left_out_for_time"]:
        print(f"left out for time: {', '.join(content['left_out_for_time'])}")
    if content["device"] != "cuda":
        print("on a CPU: these times compare nothing; the Triton and CUDA kernels did not run")
    if output is not None:
        print(draw_beside(report.draw, content, output))


if __name__ == "__main__":
    run_command(main)
