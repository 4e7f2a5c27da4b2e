"""The kernel benchmark: its inputs, its arithmetic, its gate, what it recommends, and a run of all of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from millrace.benchmarks.kernels import accuracy, timing
from millrace.benchmarks.kernels import cases as operations
from millrace.benchmarks.kernels import comparison as kernels
from millrace.benchmarks.report import kernels_report as report
from millrace.benchmarks.report.charts import words
from millrace.engine.util.errors import UserError
from millrace.kernels.support import choice

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


SETTING = operations.Setting(torch.device("cpu"), torch.float32, "aot_eager")
SHAPES = {shape.name: shape for shape in operations.small_shapes()}
PLAIN = SHAPES["16"]


def case_of(operation, shape="16"):
    return kernels.OPERATIONS[operation].build(SHAPES[shape], SETTING)


# Inputs


def test_modulation_and_text_have_the_strides_of_the_fused_products():
    case = case_of("gated_residual_norm_modulate")
    for name in ("gate", "shift", "scale"):
        assert case.inputs[name].stride() == (PLAIN.depth * 6 * PLAIN.width, 1)
    text_kv = case_of("rope_attention").inputs["text_kv"]
    assert text_kv.stride()[0] == PLAIN.depth * 2 * PLAIN.width
    assert len(text_kv) == sum(PLAIN.text_lengths())


def test_captions_are_ragged_and_half_full_on_average():
    for shape in operations.full_shapes():
        lengths = shape.text_lengths()
        assert len(lengths) == shape.samples
        assert all(1 <= length <= 256 for length in lengths)
        if shape.ragged:
            assert sum(lengths) / len(lengths) == pytest.approx(128, abs=1)
            assert len(set(lengths)) == shape.samples
        else:
            assert set(lengths) == {256}


def test_every_operation_is_measured_routed_and_not():
    shapes = {shape.name: shape for shape in operations.full_shapes()}
    assert {shape.tokens for shape in shapes.values()} == {256, 1024, 4096}
    assert (shapes["1024-tread"].kept, shapes["1024-sprint"].kept) == (512, 256)
    for table in (list(shapes.values()), list(SHAPES.values())):
        found = [
            (name, shape.name) for name, shape, _ in kernels.cases(table, list(kernels.OPERATIONS), SETTING)
        ]
        assert {name for name, _ in found} == set(kernels.OPERATIONS)
        assert len(found) == len(set(found))
        assert found[0][0] == "rope_attention", "most important first"


def test_least_work():
    rows, width, samples = PLAIN.rows, PLAIN.width, PLAIN.samples
    norm = case_of("norm_modulate").work
    assert norm["forward"].bytes == 4 * (2 * rows * width + 2 * samples * width)
    assert norm["backward"].bytes == 4 * (3 * rows * width + 3 * samples * width)
    assert norm["both"].bytes == norm["forward"].bytes + norm["backward"].bytes - 4 * width * (rows + samples)
    routed = SHAPES["16-tread"]
    kept = routed.samples * routed.kept
    gather = case_of("gather_tokens", "16-tread").work["forward"].bytes
    assert gather == 4 * 2 * kept * width + 8 * kept
    fuse = case_of("gather_fuse", "16-sprint").work
    tokens = PLAIN.rows + SHAPES["16-sprint"].rows
    assert fuse["forward"].flops == 2 * tokens * width * width
    assert fuse["both"].flops == 3 * fuse["forward"].flops
    attention = case_of("rope_attention").work
    products = sum(4 * PLAIN.tokens * (PLAIN.tokens + text) * width for text in PLAIN.text_lengths())
    assert attention["forward"].flops == products
    assert attention["backward"].flops == 2.5 * products


def test_share_of_the_ceiling():
    ceilings = {"copy_bytes_per_second": 100.0, "gemm_flops_per_second": 1000.0}
    moved = {"bytes": 50, "flops": None, "seconds_median": 1.0}
    computed = {"bytes": None, "flops": 500.0, "seconds_median": 2.0}
    assert kernels.share_of_ceiling(moved, ceilings) == 0.5
    assert kernels.share_of_ceiling(computed, ceilings) == 0.25


# Gate


def doubled(x, y):
    return 2 * x + y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_passes_what_rounds_and_refuses_what_is_wrong(dtype):
    inputs = {name: torch.randn(64, 32).to(dtype) for name in "xy"}
    gate = accuracy.Gate(doubled, doubled, inputs, differentiate=True)
    assert gate.check(doubled).right
    assert gate.check(lambda x, y: (2 * x.float() + y.float()).to(dtype)).right
    wrong = {
        "output": lambda x, y: 2.05 * x + y,
        "one element": lambda x, y: doubled(x, y) + torch.eye(64, 32, dtype=dtype)[:, :].detach() * (1 / 8),
        "gradient of x": lambda x, y: 2 * x.detach() + y,
        "gradient of y": lambda x, y: 2 * x + 1.05 * y - 0.05 * y.detach(),
        "shape": lambda x, y: doubled(x, y)[:-1],
        "NaN": lambda x, y: doubled(x, y) / (torch.arange(32) != 3).to(dtype),
        "missing": lambda x, y: (doubled(x, y), x),
    }
    for name, function in wrong.items():
        assert not gate.check(function).right, name


def test_gate_wants_integers_equal():
    gate = accuracy.Gate(lambda: torch.arange(4), lambda: torch.arange(4), {}, differentiate=False)
    assert gate.check(lambda: torch.arange(4)).right
    assert not gate.check(lambda: torch.tensor([0, 1, 3, 2])).right


def test_only_what_is_right_is_timed():
    def missing():
        raise ImportError("No module named 'peer'")

    def breaks():
        def fail(**_inputs):
            raise RuntimeError("first line\nsecond line")

        return fail

    case = case_of("norm_modulate")
    right = case.implementations["eager"]
    builds = {"right": right, "none": missing, "breaks": breaks, "wrong": lambda: lambda x, shift, scale: x}
    rows = kernels.run_case(replace(case, implementations=builds), timing.CpuTimer(), rounds=2)
    timed = [row for row in rows if row["status"] == "timed"]
    assert [(row["implementation"], row["mode"]) for row in timed] == [
        ("right", mode) for mode in ("forward", "backward", "both")
    ]
    assert all(len(row["seconds"]) == 2 * timing.CALLS for row in timed)
    others = {row["implementation"]: (row["status"], row["reason"]) for row in rows if row not in timed}
    assert others["none"] == ("not installed", "No module named 'peer'")
    assert others["breaks"] == ("failed", "RuntimeError: first line")
    assert others["wrong"][0] == "wrong"
    assert others["liger-kernel"][0] == "not applicable"


def test_modes_are_what_they_are_called():
    """Backward runs no forward; both runs one; forward keeps what backward needs."""
    forwards = []

    def counted(x, shift, scale):
        forwards.append(torch.is_grad_enabled())
        return case.reference(x, shift, scale)

    case = case_of("norm_modulate")
    calls = kernels._warm_calls(case, counted, timing.CpuTimer())
    for mode, expected in (("forward", 1), ("backward", 0), ("both", 1)):
        forwards.clear()
        result = calls[mode].call()
        assert forwards == [True] * expected
        assert isinstance(result, tuple) == (mode != "forward")
    assert calls["forward"].call().grad_fn is not None


# Timing


def test_contestants_take_turns_and_every_second_round_turns_round():
    order = []

    class Timer:
        def measure(self, warm, into):
            order.append(warm.call)
            into.seconds.append(float(len(order)))

    calls = {name: timing.WarmCall(name) for name in "abc"}
    found = timing.interleave(Timer(), calls, rounds=3)
    assert order == list("abccbaabc")
    assert found["a"].seconds == [1.0, 6.0, 7.0]
    assert found["a"].percentiles()[1] == 6.0


class FakeGpu:
    """Stands in for torch.cuda: its clock moves by `_sleep` and by 3 ms a call."""

    def __init__(self, needed):
        self.now, self.needed, self.slept, self.delays = 0.0, needed, 0.0, []

    def _sleep(self, cycles):
        self.slept = cycles / 1e9
        self.delays.append(self.slept)
        self.now += self.slept

    def synchronize(self, _device):
        self.slept = 0.0

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def query(self):
                return gpu.slept < gpu.needed

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


@pytest.mark.parametrize(
    ("needed", "batches", "gaps"), [(0.001, 1, False), (0.009, 3, False), (0.1, 3, True)]
)
def test_a_batch_that_starts_too_early_is_repeated_behind_a_longer_delay(monkeypatch, needed, batches, gaps):
    """`needed`: the delay in seconds that the host takes to queue a batch."""
    gpu = FakeGpu(needed)
    monkeypatch.setattr(timing.torch, "cuda", gpu)
    timer = timing.CudaTimer(torch.device("cpu"))
    assert timer.cycles_per_second == pytest.approx(1e9)
    gpu.delays.clear()

    def call():
        gpu.now += 0.003

    samples = timing.Samples()
    timer.measure(timing.WarmCall(call, delay=0.0025), samples)
    assert gpu.delays == pytest.approx([0.0025 * 2**i for i in range(batches)])
    assert samples.seconds == pytest.approx([0.003] * timing.CALLS)
    assert samples.host_gaps == gaps


@pytest.mark.cuda
def test_gpu_times_leave_the_host_out():
    timer = timing.CudaTimer(torch.device("cuda"))
    cycles = int(1e-3 * timer.cycles_per_second)
    samples = timing.Samples()
    timer.measure(timer.warm_up(lambda: torch.cuda._sleep(cycles)), samples)
    assert not samples.host_gaps
    assert samples.percentiles()[1] == pytest.approx(1e-3, rel=0.2)
    small = torch.zeros(1, device="cuda")
    waiting = timing.Samples()
    timer.measure(timer.warm_up(lambda: small.item()), waiting)
    assert waiting.host_gaps, "a call that waits for the device must be marked"


# Report


def row(implementation, shape, seconds, operation="flow_loss", mode="both", ragged=True, status="timed"):
    return {
        "operation": operation,
        "shape": {"name": shape, "ragged": ragged},
        "implementation": implementation,
        "mode": mode,
        "status": status,
        "seconds_median": seconds,
    }


def test_choice_is_the_fastest_over_all_shapes():
    rows = [
        row("ours/triton", "a", 1.0),
        row("ours/cuda", "a", 4.0),
        row("eager", "a", 9.0),
        row("ours/triton", "b", 10.0),
        row("ours/cuda", "b", 2.0),
        row("eager", "b", 90.0),
        row("torch.compile", "b", 0.1),
        row("ours/cuda", "b", 0.1, mode="forward"),
    ]
    assert report.choices(rows) == {"flow_loss": "cuda"}, "geometric mean: 8 against 10"
    failed = row("ours/cuda", "c", 0.0, status="wrong")
    assert report.choices([*rows, row("ours/triton", "c", 1.0), row("eager", "c", 1.0), failed]) == {
        "flow_loss": "triton"
    }


def test_attention_is_chosen_for_ragged_and_uniform_batches():
    rows = [
        row("ours/varlen", "a", 1.0, "rope_attention"),
        row("ours/sdpa", "a", 2.0, "rope_attention"),
        row("ours/varlen", "b", 2.0, "rope_attention", ragged=False),
        row("ours/sdpa", "b", 1.0, "rope_attention", ragged=False),
        row("eager", "b", 0.1, "rope_attention", ragged=False),
    ]
    assert report.choices(rows) == {"rope_attention_ragged": "varlen", "rope_attention_uniform": "sdpa"}


def test_choices_are_recorded_under_the_names_that_the_operations_look_up():
    sources = {path.stem: path.read_text() for path in (BENCHMARKS.parent / "kernels").rglob("*.py")}
    for operation in report.CHOICES.keys() - {"rope_attention"}:
        assert any(f'choose("{operation}", ' in source for source in sources.values()), operation
    for key in ("rope_attention_ragged", "rope_attention_uniform"):
        assert f'"{key}"' in sources["rope_attention"]


def test_choices_are_recorded_where_the_operations_look_them_up():
    assert kernels.MEASURED.samefile(choice.__file__.replace("choice.py", "measured.json"))


def test_recorded_choices_leave_the_others_alone(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"Z": {"geglu": "cuda"}, "A": {"flow_loss": "cuda", "other": "triton"}}))
    found = kernels.record_choices([row("ours/triton", "a", 1.0)], path, "A")
    assert found == {"flow_loss": "triton"}
    assert json.loads(path.read_text()) == {
        "A": {"flow_loss": "triton", "other": "triton"},
        "Z": {"geglu": "cuda"},
    }


# The program

BARE = """
import runpy, sys
for name in ("deepspeed", "pydantic", "einops", "psutil", "diffusers", "safetensors", "PIL", "matplotlib"):
    sys.modules[name] = None
sys.argv = ["benchmarks", "kernels", *{arguments!r}]
try:
    runpy.run_module("millrace.benchmarks", run_name="__main__")
except SystemExit as end:
    print("exit code", end.code)
"""


def test_smoke_run_on_a_bare_machine(tmp_path):
    """Little more than torch is installed."""
    output = tmp_path / "out.json"
    chosen = ("rope_attention", "norm_modulate", "sample_route")
    arguments = ["--smoke", "--only", *chosen, "--shapes", "16-tread", "--output", str(output)]
    code = BARE.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "exit code 0" in done.stdout, done.stdout + done.stderr
    assert "these times compare nothing" in done.stdout
    content = json.loads(output.read_text())
    assert (content["benchmark"], content["device"], content["smoke"]) == ("kernels", "cpu", True)
    assert content["ours_on_this_device"] == "plain PyTorch"
    assert content["ceilings"]["copy_bytes_per_second"] > 0
    timed = {(r["operation"], r["implementation"]) for r in content["rows"] if r["status"] == "timed"}
    for operation in chosen:
        assert {(operation, "eager"), (operation, "ours/plain PyTorch")} <= timed
    assert {("rope_attention", "torch.compile + SDPA"), ("norm_modulate", "torch.compile")} <= timed
    statuses = {r["implementation"]: r["status"] for r in content["rows"] if r["status"] != "timed"}
    for peer in ("flash-attn 2", "xformers", "transformer-engine"):
        assert f"torch.compile + {peer}" in statuses
    assert not any(r["status"] in ("wrong", "failed") for r in content["rows"])
    assert "out.json; no chart: " in done.stdout


def test_the_chart_has_a_bar_for_every_implementation(tmp_path):
    ours, peer = (row(name, "a", 1.0) | {"share_of_ceiling": 0.5} for name in ("ours/triton", "eager"))
    lone = row("eager", "b", 1.0, mode="forward") | {"share_of_ceiling": 0.25}
    rows = [ours, peer, lone, *(one | {"mode": "forward"} for one in (ours, peer))]
    report.draw({"device": "cpu", "rows": rows}, tmp_path / "chart.svg")
    shown = [text for text in words((tmp_path / "chart.svg").read_text()) if text.endswith("%")]
    assert shown == ["50 %", "50 %", "25 %"], "forward alone only where nothing else is"


@pytest.fixture
def command(monkeypatch):
    """The program's arguments, for this process."""
    return lambda *words: monkeypatch.setattr(sys, "argv", ["kernels.py", *map(str, words)])


def test_no_time_measures_nothing_and_says_so(tmp_path, command):
    output = tmp_path / "out.json"
    command("--smoke", "--seconds", "0", "--only", "geglu", "--shapes", "16", "--output", output)
    assert kernels.main() == 0
    content = json.loads(output.read_text())
    assert content["rows"] == []
    assert content["left_out_for_time"] == ["geglu 16"]


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, command, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    output = tmp_path / "out.json"
    command("--smoke", "--only", "geglu", "gated_residual", "--shapes", "16", "--output", output)
    monkeypatch.setitem(kernels.OPERATIONS, "gated_residual", kernels.Operation(interrupt))
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    assert {r["operation"] for r in json.loads(output.read_text())["rows"]} == {"geglu"}


def test_a_case_that_cannot_be_built_does_not_stop_the_others(tmp_path, command, monkeypatch):
    def breaks(*_arguments):
        raise MemoryError("too large")

    output = tmp_path / "out.json"
    command("--smoke", "--only", "geglu", "add_noise", "--shapes", "16", "--output", output)
    monkeypatch.setitem(kernels.OPERATIONS, "geglu", kernels.Operation(breaks))
    assert kernels.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert [r["reason"] for r in rows if r["operation"] == "geglu"] == ["MemoryError: too large"]
    assert any(r["operation"] == "add_noise" and r["status"] == "timed" for r in rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--smoke", "--record-choices"), "--record-choices takes measurements on a CUDA GPU"),
        (("--smoke", "--shapes", "1024"), "--shapes 1024 is unknown, expected some of: 16, 16-sprint"),
        pytest.param(
            (),
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_arguments(words, says, command):
    command(*words)
    with pytest.raises(UserError, match=says):
        kernels.parse()
