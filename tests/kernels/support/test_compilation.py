"""Every kernel fits the chips that it is for, and the gate that says so notices when one does not."""

import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from millrace.kernels.support import compilation
from millrace.kernels.support.compilation import Launch, Resources, compile_launch, launches, meta, problems
from millrace.kernels.support.registration import HAS_TRITON, INTERPRETING

pytestmark = pytest.mark.skipif(
    INTERPRETING or not HAS_TRITON, reason="needs Triton's compiler, which its interpreter replaces"
)
BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
DECLARED = list(launches()) if HAS_TRITON and not INTERPRETING else []
RECORDED = json.loads((BENCHMARKS / "results" / "resources.json").read_text())


def in_fp16_or_fp32(launch):
    """For these, which training seldom runs, what `benchmarks/resources.py` found is enough."""
    floating = (x for x in launch.arguments if isinstance(x, torch.Tensor) and x.is_floating_point())
    return next(floating, torch.empty(0, dtype=torch.bfloat16)).dtype != torch.bfloat16


COMPILED = [(file, launch) for file, launch in DECLARED if not in_fp16_or_fp32(launch)]

if DECLARED:
    import triton
    import triton.language as tl

    sys.path.insert(0, str(BENCHMARKS))
    resources = importlib.import_module("resources")
    sys.path.remove(str(BENCHMARKS))

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
    ("file", "launch"), COMPILED, ids=[f"{file}: {launch.name}" for file, launch in COMPILED]
)
def test_kernels_fit_their_chips(file, launch):
    """And the recorded table is up to date, as far as the same compiler wrote it."""
    measured = resources.measure(file, launch)
    assert measured, "the launch starts no kernel"
    assert [(row["kernel"], wrong) for row, wrong in measured if wrong] == []
    if RECORDED["versions"] == resources.versions():
        recorded = [row for row in RECORDED["kernels"] if (row["file"], row["launch"]) == (file, launch.name)]
        found = json.loads(json.dumps([row for row, _ in measured]))
        assert recorded == found, "a kernel has changed: run python benchmarks/resources.py"


def test_recorded_kernels_fit_their_chips():
    """In every dtype."""
    declared = {(file, launch.name): launch for file, launch in DECLARED}
    assert declared.keys() == {(row["file"], row["launch"]) for row in RECORDED["kernels"]}, (
        "the declared launches have changed: run python benchmarks/resources.py"
    )
    for row in RECORDED["kernels"]:
        launch = declared[row["file"], row["launch"]]
        found = Resources(**{field.name: row[field.name] for field in fields(Resources)})
        assert problems(launch, found, row["architecture"]) == [], row


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


def test_notices_spills():
    """One warp cannot hold a sum of 128 x 128."""
    launch = Launch("narrow", product, (meta(128, 1024), 128, 32, 2, 1))
    (found,) = compile_launch(launch, 80)
    assert found.spill_bytes > 0
    assert found.stack_bytes > 0
    assert problems(launch, found, 80) == [f"spills {found.spill_bytes} bytes"]


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


def test_notices_lost_wgmma():
    """FP32 operands take other instructions; a kernel that is not named need not use these."""
    required = Launch("fp32", scale, (meta(64), 64, 4), frozenset({"_scale"}))
    (found,) = compile_launch(required, 90)
    assert found.instructions == ()
    assert problems(required, found, 90) == ["does not use wgmma"]
    assert problems(required, found, 80) == []
    assert problems(Launch("fp32", scale, required.arguments), found, 90) == []


@pytest.mark.parametrize(("architecture", "limit"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_limits_of_shared_memory(architecture, limit):
    launch = Launch("any", scale, ())
    for size, wrong in ((limit, 0), (limit + 1, 1)):
        found = Resources("k", 32, 0, 0, 1024, size - 1024, 4, 3, ())
        assert len(problems(launch, found, architecture)) == wrong


def test_capability_is_that_of_the_target():
    seen = []
    launch = Launch("asks", lambda x: seen.append(compilation.capability(x)), (meta(4),))
    for architecture in (80, 90):
        assert compile_launch(launch, architecture) == []
    assert seen == [80, 90]
