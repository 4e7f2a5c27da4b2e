"""What csrc is compiled to: host code that keeps its bounds, machine code, operators of PyTorch."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_memory_and_slots_under_the_sanitizers(tmp_path, run, cxx):
    """Arrays of exactly the right size at awkward sizes, and every row in exactly one slot."""
    sources = [ROOT / "csrc" / f"{name}_host.cpp" for name in ("gated_residual", "flow_loss")]
    program = tmp_path / "row_operations"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = ["-I", ROOT / "csrc" / "include"]
    main = Path(__file__).with_name("row_operations.cpp")
    run(cxx, "-std=c++17", "-O0", *checks, *include, main, *sources, "-o", program)
    assert re.fullmatch(r"\d+ slots, 36 calls\n", run(program))


KERNELS = {"forward": 3, "backward": 3, "squares": 5, "add_slots": 1, "means": 1}


def test_kernels_of_both_architectures_use_no_local_memory(build_log):
    report = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        build_log,
        flags=re.DOTALL,
    )
    for kernel, variants in KERNELS.items():
        found = [entry for entry in report if re.search(rf"\d{kernel}(I|E)", entry[0])]
        for arch in ("sm_80", "sm_90a"):
            assert sum(entry[1] == arch for entry in found) == variants, (kernel, arch)
        for name, arch, *memory, registers in found:
            assert [int(each) for each in memory] == [0, 0, 0], (name, arch)
            assert int(registers) <= 128, (name, arch)


def test_rows_are_copied_ahead_and_accessed_in_16_bytes(tmp_path, run, nvcc):
    ptx = tmp_path / "kernels.ptx"
    command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-I", ROOT / "csrc" / "include", "-arch=sm_90a", "-ptx"]
    run(*command, ROOT / "csrc" / "gated_residual.cu", "-o", ptx)
    kernels = {entry.partition("(")[0].strip(): entry for entry in ptx.read_text().split(".entry")[1:]}
    for kernel, arrays in (("forward", 2), ("backward", 4)):
        variants = [code for name, code in kernels.items() if re.search(rf"\d{kernel}I", name)]
        assert len(variants) == 3
        for code in variants:
            copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]+\], \[[^\]]+\], 16", code)
            assert len(copies) % arrays == 0
            assert len(copies) >= 2 * arrays  # before the loop and in it
            assert len(re.findall(r"st\.global\.v4\.\w32", code)) >= 2
            assert "ld.global.nc" not in code


LOADS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.ops.load_library(sys.argv[2])
for name in ("gated_residual_norm_modulate", "gated_residual_norm_modulate_backward", "flow_loss",
             "gather_rows", "scatter_rows"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"millrace_cuda::{name}", "CUDA"), name
x = torch.tensor([[4.0, 5.0], [6.0, 7.0]])
assert torch.ops.millrace_host.gather_rows(x, torch.tensor([1])).tolist() == [[6.0, 7.0]]
print("loaded by", torch.__version__)
"""


def test_one_build_serves_every_pytorch(cuda_library_path, host_library, run):
    """This one and those of the interpreters that MILLRACE_TEST_PYTHONS names; a GPU is not needed."""
    others = filter(None, os.environ.get("MILLRACE_TEST_PYTHONS", "").split(os.pathsep))
    for python in (sys.executable, *others):
        assert "loaded by 2." in run(python, "-c", LOADS, cuda_library_path, host_library)
