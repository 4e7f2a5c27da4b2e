"""The accounting of a step: every instant once, the category of each operator, and a real step."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from millrace.benchmarks.step import step_timeline as timeline

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


Event = timeline.Event


@pytest.mark.parametrize(
    ("chain", "kernel", "category"),
    [
        (["aten::linear", "aten::addmm"], "", "GEMM"),
        (["autograd::engine::evaluate_function: MmBackward0", "MmBackward0", "aten::mm"], "", "GEMM"),
        (["millrace::rope_attention_fused", "aten::bmm"], "", "attention"),
        (["aten::scaled_dot_product_attention"], "", "attention"),
        (["millrace::geglu", "aten::mul"], "", "fused kernels"),
        (["millrace::gather_fuse", "aten::addmm"], "", "GEMM"),
        (["millrace::gather_fuse"], "nvjet_tst_128x256", "GEMM"),
        (["millrace::gated_residual"], "gated_residual_fwd_kernel", "fused kernels"),
        (["CompiledFunction"], "triton_poi_fused_add_0", "fused kernels"),
        (["aten::copy_"], "", "other operators"),
        ([], "sm90_xmma_gemm_bf16", "GEMM"),
        ([], "Memcpy HtoD", "other operators"),
        (["millrace.optimizer", "aten::mul"], "", "optimizer"),
        (["millrace.conditioning", "aten::linear", "aten::addmm"], "gemm", "data and conditioning"),
        (["c10d::allreduce_"], "ncclDevKernel_AllReduce", "communication"),
        (["millrace.optimizer", "nccl:all_reduce"], "", "communication"),
        (["autograd::engine::evaluate_function: MmBackward0"], "", None),
        (["a range of the user"], "", None),
    ],
)
def test_categories(chain, kernel, category):
    assert timeline.category_of(chain, kernel) == category


def total(spans):
    sums = dict.fromkeys(timeline.CATEGORIES, 0)
    for span in spans:
        sums[span.category] += span.end - span.start
    return {category: time for category, time in sums.items() if time}


def test_on_a_cpu_the_innermost_operator_counts_and_nothing_twice():
    host = [
        Event("millrace.step", 0, 1000, 1),
        Event("millrace.step", 1000, 2000, 1),
        Event("millrace.conditioning", 1000, 1300, 1),
        Event("aten::mm", 1100, 1200, 1),
        Event("aten::linear", 1400, 1700, 1),
        Event("aten::addmm", 1450, 1650, 1),
        Event("aten::copy_", 1500, 1550, 1),
        Event("aten::mul", 1800, 1900, 1),
        Event("aten::mul", 1300, 2000, 2),
    ]
    length, spans = timeline.attribute(host, [])
    assert length == 1000
    assert total(spans) == {
        "data and conditioning": 300,
        "GEMM": 300,
        "other operators": 100,
        "host gaps": 300,
    }


def test_on_a_gpu_kernels_count_by_the_operator_that_launched_them():
    host = [
        Event("millrace.step", 0, 1000, 1),
        Event("millrace.conditioning", 0, 200, 1),
        Event("aten::mm", 210, 220, 1, number=7),
        Event("c10d::allreduce_", 230, 240, 1, number=8),
        Event("millrace::geglu", 250, 260, 2, number=9),
    ]
    device = [
        Event("nvjet", 300, 500, 20, number=7),
        Event("ncclDevKernel", 400, 700, 21, number=8),
        Event("gated_residual_fwd_kernel", 650, 800, 20, number=9),
        Event("gemm_of_unknown_origin", 900, 1100, 20, number=99),
    ]
    length, spans = timeline.attribute(host, device)
    assert length == 1000
    found = total(spans)
    assert found == {
        "data and conditioning": 200,  # the device waits while the host prepares
        "GEMM": 300,
        "communication": 150,  # as far as nothing hides it
        "fused kernels": 150,
        "host gaps": 200,
    }
    account = timeline.account(length, spans)
    assert sum(account["seconds"].values()) == pytest.approx(1e-6)
    assert account["step_seconds"] == 1e-6


def test_an_account_that_does_not_add_up_is_refused():
    with pytest.raises(RuntimeError, match="add up to"):
        timeline.account(10, [timeline.Span(0, 9, "GEMM", "mm")])


def test_a_profiled_step_adds_up():
    x = torch.randn(64, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(2):
            with record_function("millrace.step"):
                (x @ x).sum().backward()
                with record_function("millrace.optimizer"):
                    x.grad.zero_()
    length, spans = timeline.attribute(*timeline.events_of(recorded))
    found = total(spans)
    assert sum(found.values()) == length
    assert found["GEMM"] > 0
    assert found["optimizer"] > 0
    assert found["other operators"] > 0
