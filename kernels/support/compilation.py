"""Ahead-of-time compilation of the Triton kernels, without a GPU: what each needs of the chip it is for.

An operation's file lists the launches of training in a function `configurations()`; each `Launch` is the
operation's own launcher with tensors on the meta device. `compile_launch` calls that launcher, and every
kernel that it starts is compiled for the wanted architecture instead of run. So what is checked is what is
launched: the same specialisation of the arguments, the same tiles, warps and stages.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from millrace.kernels.support import sass


class Chip(NamedTuple):
    """Limits of one compute capability (CUDA C++ programming guide, table of compute capabilities)."""

    block_shared: int
    """Most shared memory of one block, KiB; a multiprocessor has one more for each block that it runs."""
    shared: int
    """Shared memory of a multiprocessor, KiB."""
    warps: int
    blocks: int
    tensor_cores: str
    """The instruction that reaches the chip's full rate, by its name in `_INSTRUCTIONS`."""
    lanes: int = 32
    """Threads of a warp."""
    registers: int = 65536
    """Of a multiprocessor."""
    portion: int = 256
    """Registers that a warp gets at a time."""


CHIPS = {
    80: Chip(163, 164, 64, 32, "mma"),
    86: Chip(99, 100, 48, 16, "mma"),
    89: Chip(99, 100, 48, 24, "mma"),
    90: Chip(227, 228, 64, 32, "wgmma"),
    100: Chip(227, 228, 64, 32, "tcgen05"),
    103: Chip(227, 228, 64, 32, "tcgen05"),
    120: Chip(99, 100, 48, 24, "mma"),
    942: Chip(64, 64, 32, 32, "mfma", lanes=64, registers=131072, portion=512),
}
"""942 is AMD's gfx942, for information: nothing of the engine has been tried there."""

_INSTRUCTIONS = {
    "tcgen05": r"tcgen05\.mma",
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk",
    "cp_async": r"cp\.async\.c[ag]",
}
_compiling_for: int | None = None
_reports: dict[str, str] = {}


@dataclass(frozen=True)
class Launch:
    """One call of a launcher.

    name: operation, direction, sizes and dtype, for people; unique within the file.
    launcher: the function that starts the kernels; it runs with `arguments`, tensors on the meta device.
    wgmma: names of the kernels that must use the chip's fastest matrix instructions: Hopper's wgmma, tcgen05
        of Blackwell's data centre chips.
    needs: first capability that it is for.
    """

    name: str
    launcher: Callable[..., Any]
    arguments: tuple[Any, ...]
    wgmma: frozenset[str] = field(default_factory=frozenset)
    needs: int = 80


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: of a thread (registers, spills and stack in bytes), of a block (shared).

    loop_local: loads from and stores to local memory inside loops: what a spill costs in time.
    overwritten: instructions that write a register which a wgmma in flight still needs.
    instructions: which of tcgen05, wgmma, mma (tensor cores before Hopper), tma and cp_async occur.
    """

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    num_warps: int
    num_stages: int
    loop_local: int
    overwritten: tuple[str, ...]
    instructions: tuple[str, ...]

    @property
    def shared_bytes(self) -> int:
        return self.static_shared_bytes + self.dynamic_shared_bytes

    def occupancy(self, architecture: int) -> int:
        """Blocks that run at the same time on one multiprocessor."""
        chip = CHIPS[architecture]
        warp = -(-chip.lanes * self.registers // chip.portion) * chip.portion
        reserved = 1024 * (chip.shared - chip.block_shared)
        by_shared = 1024 * chip.shared // max(self.shared_bytes + reserved, 1)
        by_registers = chip.registers // warp // self.num_warps
        return min(chip.blocks, chip.warps // self.num_warps, by_registers, by_shared)


class Specialisation(NamedTuple):
    """What Triton compiles a kernel for, once: two launches that agree in it run the same instructions."""

    file: str
    """Module in `millrace.kernels`."""
    kernel: str
    arguments: tuple[tuple[str, str, Any], ...]
    """(name, type, what is known of the value) of each: a multiple of 16, a constant."""
    options: tuple[tuple[str, Any], ...]
    """Warps, stages and the like, as the launch gives them."""


def launches() -> Iterator[tuple[str, Launch]]:
    """(module name, launch) of every file in `millrace.kernels` that has `configurations()`."""
    package = importlib.import_module("millrace.kernels")
    for info in sorted(pkgutil.walk_packages(package.__path__, "millrace.kernels."), key=lambda i: i.name):
        module = importlib.import_module(info.name)
        for launch in getattr(module, "configurations", tuple)():
            yield info.name.removeprefix("millrace.kernels.").removeprefix("ops."), launch


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data, for the arguments of a `Launch`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def capability(tensor: Tensor) -> int:
    """80 for an A100, 90 for an H100: what `tensor` runs on, or what is being compiled for.

    Launchers whose tiles depend on the GPU ask this, so that each architecture's choice is compiled for it.
    """
    if _compiling_for is not None:
        return _compiling_for
    major, minor = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
    return 10 * major + minor


MULTIPROCESSORS = 132
"""Of an H100 or H200: what launches are cut for where no GPU says otherwise."""


def multiprocessors(tensor: Tensor) -> int:
    """Of the GPU that `tensor` is on. Grids depend on it, compiled code does not."""
    if not tensor.is_cuda:
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def compile_launch(launch: Launch, architecture: int) -> list[Resources]:
    """Compile every kernel that the launch starts, for a compute capability of `CHIPS`.

    Needs Triton, and a process without TRITON_INTERPRET.
    """
    with _compiling(architecture) as compiled:
        launch.launcher(*launch.arguments)
    return [_resources(kernel, report) for kernel, report in compiled]


@contextmanager
def recording(architecture: int) -> Iterator[list[Specialisation]]:
    """Kernels started inside are neither compiled nor run; what they would be compiled for is listed."""
    noted: list[Specialisation] = []

    def note(function: Any, *arguments: Any, **options: Any) -> None:
        # A fake tensor will not tell its address, which is 0 plus an offset, as a meta tensor's is.
        arguments = tuple(_meta_of(argument) for argument in arguments)
        options = {name: _meta_of(option) for name, option in options.items()}
        del options["grid"], options["warmup"]
        *_, binder = function.device_caches[f"sm_{architecture}"]
        _, found, rest = binder(*arguments, **options, debug=False)
        names = (parameter.name for parameter in function.params)
        noted.append(
            Specialisation(
                function.fn.__module__.removeprefix("millrace.kernels.").removeprefix("ops."),
                function.fn.__name__,
                tuple((name, *about) for name, about in zip(names, found, strict=True)),
                tuple(sorted(rest.items())),
            )
        )

    with _instead_of_running(architecture, note):
        yield noted


def specialisations(launch: Launch, architecture: int) -> list[Specialisation]:
    """What the kernels of a launch are compiled for, without compiling them."""
    with recording(architecture) as noted:
        launch.launcher(*launch.arguments)
    return noted


def _meta_of(argument: Any) -> Any:
    if not isinstance(argument, FakeTensor):
        return argument
    with unset_fake_temporarily():
        storage = torch.empty(0, dtype=argument.dtype, device="meta")
        return storage.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def problems(launch: Launch, resources: Resources, architecture: int) -> list[str]:
    """Why a kernel must not be shipped like this.

    A spill outside loops costs a few instructions a block, so it is no reason; one inside a loop is.
    """
    found = []
    if resources.loop_local:
        found.append(f"has {resources.loop_local} accesses to local memory in its loops")
    shared, limit = resources.shared_bytes, 1024 * CHIPS[architecture].block_shared
    if shared > limit:
        found.append(f"takes {shared} bytes of shared memory, sm_{architecture} has {limit}")
    elif not resources.occupancy(architecture):
        found.append(f"takes more registers than sm_{architecture} has")
    wanted = CHIPS[architecture].tensor_cores
    if resources.kernel in launch.wgmma and wanted not in resources.instructions:
        found.append(f"does not use {wanted}")
    if resources.overwritten:
        found.append(f"overwrites what a wgmma in flight needs: {resources.overwritten[0]}")
    return found


@contextmanager
def _compiling(architecture: int) -> Iterator[list[tuple[Any, str]]]:
    """Kernels started inside are compiled for `architecture` and listed, each with the assembler's report."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def compile_only(function: Any, *arguments: Any, **options: Any) -> None:
        with redirect_stdout(StringIO()) as log:
            kernel = run(function, *arguments, **options | {"warmup": True})
        # A kernel that this process has compiled before comes without a log.
        compiled.append((kernel, _reports.setdefault(kernel.hash, log.getvalue())))

    with (
        _instead_of_running(architecture, compile_only),
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
    ):
        # Spills are told in the assembler's log alone, and a kernel out of the cache has none.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        yield compiled


@contextmanager
def _instead_of_running(architecture: int, start: Callable[..., None]) -> Iterator[None]:
    """Inside, `start` gets every kernel that is started, on a device of `architecture` that is not there."""
    global _compiling_for
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    # What Triton asks of a driver before it compiles. It remembers kernels by device: one an architecture.
    stand_in = mock.Mock(spec_set=("get_current_device", "get_current_stream", "get_current_target"))
    stand_in.get_current_device.return_value = f"sm_{architecture}"
    target = GPUTarget("hip", "gfx942", 64) if architecture == 942 else GPUTarget("cuda", architecture, 32)
    stand_in.get_current_target.return_value = target
    before, _compiling_for = _compiling_for, architecture
    try:
        with mock.patch.object(driver, "_active", stand_in), mock.patch.object(JITFunction, "run", start):
            yield
    finally:
        _compiling_for = before


def _resources_on_amd(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s+(\d+)", text)[1])

    return Resources(
        kernel=kernel.metadata.name,
        registers=number("vgpr_count"),
        spill_bytes=4 * number("vgpr_spill_count"),
        stack_bytes=number("private_segment_fixed_size"),
        static_shared_bytes=0,
        dynamic_shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        loop_local=0,
        overwritten=(),
        instructions=("mfma",) if "v_mfma" in text else (),
    )


def _resources(kernel: Any, report: str) -> Resources:
    if "amdgcn" in kernel.asm:
        return _resources_on_amd(kernel)
    if "Used" not in report:
        raise RuntimeError(f"{kernel.metadata.name}: Triton printed no assembler report: {report!r}")

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, report))

    instructions = tuple(
        name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, kernel.asm["ptx"])
    )
    # Reading machine code takes longer than compiling it, so only where there can be something to see. Local
    # memory without a spill is that of libdevice's sines, on a path for arguments beyond 100,000.
    spilled = number(r"(\d+) bytes spill (?:stores|loads)")
    program = None
    if spilled or "wgmma" in instructions:
        program = sass.disassemble(kernel.asm["cubin"])
    return Resources(
        kernel=kernel.metadata.name,
        registers=number(r"Used (\d+) registers"),
        spill_bytes=spilled,
        stack_bytes=number(r"(\d+) bytes stack frame"),
        static_shared_bytes=number(r"(\d+) bytes smem"),
        dynamic_shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        loop_local=sass.local_accesses_in_loops(program) if spilled else 0,
        overwritten=tuple(sass.overwritten_operands(program)) if program else (),
        instructions=instructions,
    )
