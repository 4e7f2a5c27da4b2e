"""Every kernel fits the chips that it is for, and the gate that says so notices when one does not."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from millrace.benchmarks.kernels import resources
from millrace.benchmarks.report.recording import RESULTS
from millrace.kernels.support import compilation
from millrace.kernels.support.compilation import Launch, Resources, compile_launch, launches, meta, problems
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

pytestmark = pytest.mark.skipif(
    INTERPRETING or not HAS_TRITON, reason="needs Triton's compiler, which its interpreter replaces"
)
GATE = (80, 90)
"""Chips for which every test run compiles all launches; `python -m benchmarks resources` has the others."""
DECLARED = list(launches()) if HAS_TRITON and not INTERPRETING else []
RECORDED = json.loads((RESULTS / "resources.json").read_text())
MOST = {(row["file"], row["kernel"], row["chip"]): row for row in RECORDED["kernels"]}

if DECLARED:
    import triton
    import triton.language as tl

    @triton.jit
    def _scale(x, y, size, factor, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, mask=at < size, other=0.0) * factor, mask=at < size)

    @triton.jit
    def _product(x, y, SIZE: tl.constexpr, DEPTH: tl.constexpr):
        row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
        total = tl.zeros((SIZE, SIZE), tl.float32)
        for start in range(0, 1024, DEPTH):
            left = tl.load(x + row * 1024 + start + tl.arange(0, DEPTH)[None, :])
            total = tl.dot(left, tl.trans(left), total)
        tl.store(y + row * SIZE + column, total)


def scale(x, block, warps):
    _scale[(1,)](x, torch.empty_like(x), x.shape[0], 0.5, BLOCK=block, num_warps=warps)


def product(x, size, depth, stages, warps):
    _product[(1,)](x, x.new_empty(size, size), SIZE=size, DEPTH=depth, num_warps=warps, num_stages=stages)


@pytest.mark.parametrize(
    ("file", "launch"), DECLARED, ids=[f"{file}: {launch.name}" for file, launch in DECLARED]
)
def test_kernels_fit_their_chips(file, launch):
    """And take no more than is recorded, as far as the same compiler wrote it."""
    for chip in GATE:
        if chip < launch.needs:
            continue
        measured = resources.measure(file, launch, chip)
        assert measured, "the launch starts no kernel"
        assert [row["problems"] for row in measured if row["problems"]] == []
        if RECORDED["versions"] == resources.versions():
            for row in measured:
                most = MOST[row["file"], row["kernel"], chip]
                assert all(row[name] <= most[name] for name in resources.MOST), (
                    "a kernel has changed: run python -m benchmarks resources"
                )


def test_every_kernel_is_declared():
    """By the file that defines it. A `@triton.jit` function that is launched is named `..._kernel`."""
    defined = {
        (value.fn.__module__.removeprefix("millrace.kernels.").removeprefix("ops."), value.fn.__name__)
        for name, module in list(sys.modules.items())
        if name.startswith("millrace.kernels.")
        for value in vars(module).values()
        if isinstance(value, triton.runtime.JITFunction) and value.fn.__name__.endswith("_kernel")
    }
    assert defined
    assert defined <= {(row["file"], row["kernel"]) for row in RECORDED["kernels"]}


def test_names_of_launches_are_unique():
    names = [(file, launch.name) for file, launch in DECLARED]
    assert len(set(names)) == len(names)


def test_arguments_are_specialised_as_at_run_time():
    """A tensor that starts off a multiple of 16 bytes cannot be read in words of 16 bytes."""
    with compilation._compiling(90) as compiled:
        scale(meta(4096), 1024, 4)
        scale(meta(4097)[1:], 1024, 4)
    aligned, shifted = (kernel.asm["ptx"] for kernel, _ in compiled)
    assert ".target sm_90a" in aligned
    assert "ld.global.v4" in aligned
    assert "ld.global.v4" not in shifted


def test_notices_spills_in_loops():
    """One warp cannot hold a sum of 128 x 128."""
    launch = Launch("narrow", product, (meta(128, 1024), 128, 32, 2, 1))
    (found,) = compile_launch(launch, 80)
    assert found.spill_bytes > 0
    assert found.stack_bytes > 0
    assert found.loop_local > 0
    assert problems(launch, found, 80) == [f"has {found.loop_local} accesses to local memory in its loops"]
    assert problems(launch, replace(found, loop_local=0), 80) == [], "a spill outside a loop costs little"


def test_notices_shared_memory_that_an_a100_has_not():
    launch = Launch("deep", product, (meta(128, 1024), 128, 128, 8, 8), frozenset({"_product"}))
    (a100,), (h100,) = compile_launch(launch, 80), compile_launch(launch, 90)
    assert a100.num_stages == 8
    assert {"mma", "cp_async"} <= set(a100.instructions)
    assert 163 * 1024 < a100.shared_bytes <= 227 * 1024
    assert problems(launch, a100, 80) == [
        f"takes {a100.shared_bytes} bytes of shared memory, sm_80 has 166912"
    ]
    assert problems(launch, a100, 90) == ["does not use wgmma"]
    assert "wgmma" in h100.instructions


def test_notices_lost_tensor_cores():
    """FP32 operands take other instructions; a kernel that is not named need not use these."""
    required = Launch("fp32", scale, (meta(64), 64, 4), frozenset({"_scale"}))
    (found,) = compile_launch(required, 90)
    assert found.instructions == ()
    for chip, wanted in ((80, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")):
        assert problems(required, found, chip) == [f"does not use {wanted}"]
        assert problems(Launch("fp32", scale, required.arguments), found, chip) == []


NOTHING = Resources("k", 32, 0, 0, 1024, 0, 4, 3, 0, (), ())


@pytest.mark.parametrize("chip", compilation.CHIPS)
def test_limits_of_shared_memory(chip):
    limit = 1024 * compilation.CHIPS[chip].block_shared
    for size, wrong in ((limit, 0), (limit + 1, 1)):
        found = replace(NOTHING, dynamic_shared_bytes=size - 1024)
        assert len(problems(Launch("any", scale, ()), found, chip)) == wrong


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "chip", "blocks"),
    [
        (146, 8, 64 * 1024, 90, 1),  # 8 warps of 4864 registers: 38912 of 65536
        (128, 8, 64 * 1024, 90, 2),
        (128, 8, 120 * 1024, 90, 1),
        (32, 4, 1024, 90, 16),  # 64 warps
        (32, 4, 1024, 120, 12),  # 48 warps
        (16, 1, 0, 89, 24),
        (255, 16, 0, 90, 0),
    ],
)
def test_occupancy(registers, warps, shared, chip, blocks):
    found = replace(
        NOTHING, registers=registers, num_warps=warps, static_shared_bytes=0, dynamic_shared_bytes=shared
    )
    assert found.occupancy(chip) == blocks
    if not blocks:
        assert problems(Launch("any", scale, ()), found, chip) == [f"takes more registers than sm_{chip} has"]


BLOCKS = {64: {"fwd": 2, "bwd_dq": 2, "bwd_dkv": 1}, 128: {"fwd": 1, "bwd_dq": 2, "bwd_dkv": 2}}
"""Of the fused attention that run on one multiprocessor of an H100, by head_dim."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", BLOCKS)
def test_blocks_of_fused_attention_that_run_side_by_side(dim, dtype):
    """One that waits for its products leaves the other to normalise and rotate."""
    wanted = [
        launch
        for file, launch in DECLARED
        if file == "attention.fused_attention" and launch.name.endswith(f"head_dim {dim}, {dtype}")
    ]
    found = [kernel for launch in wanted for kernel in compile_launch(launch, 90)]
    expected = {f"rope_attention_{name}_kernel": blocks for name, blocks in BLOCKS[dim].items()}
    assert {kernel.kernel: kernel.occupancy(90) for kernel in found} == expected
    assert [kernel.kernel for kernel in found if kernel.loop_local] == []


def test_capability_is_that_of_the_target():
    seen = []
    launch = Launch("asks", lambda x: seen.append(compilation.capability(x)), (meta(4),))
    for architecture in (80, 90):
        assert compile_launch(launch, architecture) == []
    assert seen == [80, 90]
