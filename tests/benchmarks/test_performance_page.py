"""The performance page says what the results say, and says so where there are none."""

import json
from pathlib import Path

import pytest

from millrace.benchmarks.report import kernels_report, performance_page, recording, suite_report
from millrace.benchmarks.step.step_timeline import CATEGORIES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


ORIGIN = {
    "chart": None,
    "time": "2026-01-02T03:04:05+00:00",
    "command": "python benchmarks/x.py",
    "commit": "0123456789abcdef",
    "dirty": False,
    "cpu": "Some CPU",
    "gpus": [{"name": "NVIDIA H200"}],
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}


def timed(implementation, mode, seconds, share=0.5, **others):
    return {
        "operation": "geglu",
        "shape": {"name": "1024"},
        "implementation": implementation,
        "mode": mode,
        "status": "timed",
        "seconds_median": seconds,
        "seconds_p20": seconds * 0.9,
        "seconds_p80": seconds * 1.1,
        "share_of_ceiling": share,
        "host_gaps": False,
    } | others


def untimed(implementation, status, reason):
    return {
        "operation": "geglu",
        "shape": {"name": "1024"},
        "implementation": implementation,
        "mode": None,
        "status": status,
        "reason": reason,
    }


def kernels_result(**others):
    rows = [
        timed("eager", "both", 400e-6),
        timed("torch.compile", "both", 150e-6, host_gaps=True),
        timed("ours/triton", "both", 100e-6, 0.87),
        timed("ours/cuda", "both", 120e-6, 0.7),
        untimed("liger-kernel", "not installed", "No module named 'liger_kernel'"),
    ]
    ceilings = {
        "copy_bytes_per_second": 4.3e12,
        "gemm_flops_per_second": 790e12,
        "gemm_edge": 8192,
        "gemm_dtype": "bfloat16",
    }
    result = {
        "benchmark": "kernels",
        "device": "cuda",
        "smoke": False,
        "file": "a.json",
        "chart": None,
        "rows": rows,
    }
    return ORIGIN | result | {"ceilings": ceilings} | others


def test_without_results_everything_is_said_not_to_be_measured():
    text = performance_page.page([])
    assert text.count(kernels_report.NEVER) == len(kernels_report.OPERATIONS)
    assert text.count("Not measured") == 8
    assert "Not counted" in text
    assert "Not compiled" in text


def test_kernels_are_set_beside_their_fastest_peer():
    text = performance_page.page([kernels_result()])
    ours, peer = "triton | 100.0 (90.0-110.0) | 87%", "torch.compile (host gaps) | 150.0 | 1.50"
    assert f"| `geglu` | 1024 | both | {ours} | {peer} |" in text
    assert "copy 4300 GB/s, bfloat16 product of 8192 x 8192 790.0 TFLOP/s" in text
    assert "- geglu, liger-kernel: not installed (1024): No module named 'liger_kernel'" in text
    assert "commit 0123456789ab, torch 2.11.0" in text
    assert f"| `geglu` | {kernels_report.NEVER} |" not in text
    assert f"| `rope_attention` | {kernels_report.NEVER} |" in text


@pytest.mark.parametrize("other", [{"smoke": True}, {"device": "cpu"}])
def test_trial_runs_and_cpus_are_no_gpu_measurement(other):
    text = performance_page.page([kernels_result(**other)])
    assert text.count(kernels_report.NEVER) == len(kernels_report.OPERATIONS)


def test_a_kernel_that_was_wrong_on_the_gpu_was_not_measured():
    rows = [
        timed("eager", "both", 1e-3),
        untimed("ours/triton", "wrong", "RMS error is 7 times the allowed one"),
    ]
    text = performance_page.page([kernels_result(rows=rows)])
    assert "- geglu, ours/triton: wrong (1024): RMS error is 7 times" in text
    assert "| `geglu` | 1024 | both | none | - | - | eager | 1000.0 | - |" in text
    assert f"| `geglu` | {kernels_report.NEVER} |" in text


def test_the_newest_result_of_each_gpu_counts(tmp_path):
    old = kernels_result(rows=[timed("ours/triton", "both", 777e-6)], time="2026-01-01T00:00:00+00:00")
    other = kernels_result(rows=[timed("ours/triton", "both", 333e-6)], gpus=[{"name": "NVIDIA A100"}])
    for name, result in {"z": old, "a": kernels_result(), "b": other}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "a.svg").touch()
    text = performance_page.page(recording.read_results(tmp_path))
    assert "777.0" not in text
    assert "### NVIDIA H200" in text
    assert "### NVIDIA A100" in text
    assert "`a.json`" in text
    assert "(../benchmarks/results/a.svg)" in text
    assert ".svg" not in text.replace("a.svg", "")


def test_training_steps():
    row = {
        "config": "jit_1024",
        "overrides": [],
        "smoke": False,
        "device": "cuda",
        "devices": 1,
        "conditioning": "cached",
        "step_seconds_median": 0.5,
        "step_seconds_p20": 0.4,
        "step_seconds_p80": 0.6,
        "images_per_second_per_device": 64.0,
        "mfu": 0.451,
        "peak_memory_bytes": 50 * 2**30,
    }
    result = ORIGIN | {"benchmark": "throughput", "file": "t.json", "rows": [row, row | {"device": "cpu"}]}
    text = performance_page.page([result])
    assert "| 1 x NVIDIA H200 | `jit_1024` | cached | 500.0 (400.0-600.0) | 64.0 | 45.1% | 50.0 |" in text
    assert text.count("`jit_1024`") == 1


def test_the_posts_rows_stand_there_without_a_measurement():
    text = suite_report.section([])
    assert "Not measured: no result of `benchmarks/throughput.py --suite post`" in text
    assert text.count("| Baseline |") == 2


def test_the_newest_suite_of_each_gpu():
    def case(config, images, flops, **others):
        speed = {"images_per_second": images, "images_per_second_per_device": images}
        row = {
            "case": f"{config}/cached",
            "status": "measured",
            "config": config,
            "conditioning": "cached",
            "includes": "inputs",
            "batches_per_second": images / 256,
            "model_flops_per_image": flops,
            "frozen_flops_per_image": {},
            "mfu": 0.4,
            "mfu_with_frozen": 0.41,
            "micro_batch": 32,
            "global_batch": 32,
            "step_seconds_median": 0.1,
            "peak_memory_bytes": 2**30,
            "overrides": [],
            "skipped_steps": 0,
        }
        return row | speed | others

    cases = [
        case("jit_1024", 100.0, 4.0),
        case("jit_1024_tread", 125.0, 2.0),
        case("jit_1024", 40.0, 4.0, peer="diffusers"),
        {"case": "jit_1024_sprint/cached", "status": "failed", "reason": "RuntimeError: no", "config": "x"},
    ]
    result = ORIGIN | {
        "benchmark": "suite",
        "file": "s.json",
        "device": "cuda",
        "smoke": False,
        "cases": cases,
    }
    text = suite_report.section([result | {"cases": []}, result])
    assert "| TREAD | 1024 | 1.64 | 125.0 | 0.488 | 40.0% | 41.0% |" in text
    assert "| TREAD | 1024 | jit_1024 | 1.23 | 1.25 | 2.00 |" in text
    assert "| jit_1024 | diffusers | 32 | 100.0 | 40.0 | 40.0% | 1.0 | 2.50 |" in text
    assert "- jit_1024_sprint/cached: failed: RuntimeError: no" in text
    assert "a measured step has 32 images" in text
    assert text.count("### NVIDIA H200") == 1


def test_the_time_of_a_step():
    seconds = dict.fromkeys(CATEGORIES, 0.0) | {"GEMM": 0.075, "host gaps": 0.025}
    result = ORIGIN | {
        "benchmark": "profile",
        "file": "p.json",
        "chart": "p.svg",
        "device": "cuda",
        "config": "latent_256",
        "conditioning": "cached",
        "step_seconds": 0.1,
        "seconds": seconds,
        "roofline_seconds": {"GEMM": 0.06, "communication": None},
    }
    text = performance_page.page([result])
    assert "| GEMM | 75.00 | 75.0% | 60.00 |" in text
    assert "| communication | 0.00 | 0.0% | - |" in text
    assert "(../benchmarks/results/p.svg)" in text
    assert "Not measured: no result of `benchmarks/throughput.py --profile`" not in text


def test_routing_on_a_cpu_is_called_so():
    row = {
        "seconds_median": 1.0,
        "seconds_p20": 0.9,
        "seconds_p80": 1.1,
        "flop_ratio": 0.65,
        "time_ratio_to_peer": 0.7,
        "saved_time_per_saved_flops": 0.91,
        "user_seconds_median": 2.0,
        "user_ratio_to_peer": 0.8,
        "user_saved_per_saved_flops": None,
        "page_faults_median": 5.0,
        "peak_bytes": 2**30,
        "memory_ratio_to_peer": 0.4,
        "variant": "tread",
    }
    names = ("width", "depth", "batch", "image_tokens")
    options = dict.fromkeys(names, 4) | {"device": "cpu", "dtype": "torch.float32", "compile": False}
    result = {
        "benchmark": "routing",
        "file": "r.json",
        "options": options,
        "threads": 2,
        "memory_method": "m",
    }
    rows = [row | {"side": "ours"}, row | {"side": "peer"}]
    text = performance_page.page([ORIGIN | result | {"rows": rows}])
    assert "### Some CPU (CPU)" in text
    assert "On a GPU: not measured." in text
    times, cpu, memory = "0.650 | 1000.0 (900.0-1100.0)", "2000.0 | 0.800 | - | 5", "1024.0 | 0.400"
    assert f"| tread | ours | {times} | 0.700 | 0.91 | {cpu} | {memory} |" in text
    assert f"| tread | peer | {times} |  | 0.91 | 2000.0 |  | - | 5 | 1024.0 |  |" in text


def test_traffic_and_its_roofline():
    row = {
        "config": "latent_256",
        "overrides": ["data.micro_batch=8"],
        "variant": "dense",
        "side": "ours",
        "totals": {
            kind: {"bytes": size * 10**9} for kind, size in (("gemm", 3), ("attention", 1), ("other", 2))
        },
        "other_bytes_to_peer": 0.164,
        "kernels": 680,
        "roofline_seconds": {"gemm": 0.05, "attention": 0.003, "other": 0.0086, "step": 0.0616},
        "time_to_peer": 0.565,
        "mfu_bound": 0.663,
    }
    names = ("gemm", "attention_forward", "attention_backward", "peak")
    ceilings = {f"{name}_flops_per_second": 5e14 for name in names} | {"copy_bytes_per_second": 4.3e12}
    result = ORIGIN | {"benchmark": "traffic", "file": "t.json", "ceilings": ceilings, "rows": [row]}
    text = performance_page.page([result])
    name, counted = "latent_256 data.micro_batch=8", "3.00 | 1.00 | 2.00 | 0.164 | 680"
    assert f"| {name} | dense | ours | {counted} | 50.00 | 3.00 | 8.60 | 61.60 | 0.565 | 66.3% |" in text
    assert "4.3 TB/s in all else" in text
    assert "is no measurement" in text


def test_compiled_kernels_show_what_they_take():
    kernel = {
        "file": "geglu",
        "kernel": "geglu_fwd_kernel",
        "chip": 90,
        "launches": 2,
        "registers": 64,
        "occupancy": 8,
        "spill_bytes": 16,
        "loop_local": 1,
        "shared_bytes": 3072,
        "instructions": "wgmma",
        "problems": 1,
    }
    other = kernel | {"chip": 80, "registers": 40, "occupancy": 6, "instructions": "mma", "problems": 0}
    result = {"benchmark": "resources", "kernels": [kernel, other], "file": "resources.json", "minutes": 7.5}
    result |= {"versions": {"triton": "3.7.1", "ptxas": "12.8"}, "processes": 2}
    text = performance_page.page([result])
    assert "| geglu | geglu_fwd_kernel | 2 | 4 | 64 | 6 | 16 | 1 | 3.0 | wgmma mma | 1 |" in text
    assert "sm 90, 80 (triton 3.7.1, ptxas 12.8; `resources.json`, which has a row for each chip" in text


def test_loaders_are_ranked_and_set_against_the_targets():
    def row(loader, rate, ours):
        return {
            "case": "256",
            "loader": loader,
            "filter": "Lanczos",
            "ours": ours,
            "images_per_second_median": rate,
            "images_per_second_p20": rate - 1,
            "images_per_second_p80": rate + 1,
            "images_per_second_per_core": rate / 2,
            "cpu_seconds_per_image": 0.004,
        }

    case = {"name": "256", "pictures": 2000, "mean_megapixels": 0.1, "mean_bytes": 51200}
    result = {
        "benchmark": "dataloader",
        "file": "d.json",
        "cores": 2,
        "rounds": 9,
        "seconds": 6.0,
        "cases": [case | {"resolution": 256, "square": False, "buckets": 7}],
        "rows": [row("webdataset", 200.0, False), row("Millrace, DALI", 500.0, True)],
    }
    versions = {"versions": ORIGIN["versions"] | {"webdataset": "1.0.2"}}
    text = performance_page.page([ORIGIN | result | versions])
    ours = "| 256 | Millrace, DALI | Lanczos | 500.0 | 499.0-501.0 | 250.0 | 4.0 | 2.50 |"
    peer = "| 256 | webdataset | Lanczos | 200.0 | 199.0-201.0 | 100.0 | 4.0 |  |"
    assert f"{ours}\n{peer}" in text
    assert "### Some CPU, 2 cores" in text
    assert "2000 JPEG files of 0.10 megapixels and 50 KiB on average, to 7 buckets" in text
    assert "9 turns of 6 s" in text
    assert "webdataset 1.0.2" in text
    assert "| dense, 256 px latents | 300 | Millrace, DALI | 1.2 |" in text
    assert "SPRINT" not in text.partition("## Loading pictures")[2]
