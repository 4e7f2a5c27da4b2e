"""Machine code of a compiled kernel: local memory in loops, wgmma operands that are overwritten in flight.

The text is `nvdisasm`'s, which comes with Triton. Only what these two questions need is read from it.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?(\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_WIDTHS = {".64": 2, ".128": 4, ".WIDE": 2}
"""32-bit registers of an instruction's first operand, by a part of its name; else one."""
_NO_RESULT = (
    "ST",
    "BAR",
    "BRA",
    "EXIT",
    "DEPBAR",
    "RED",
    "MEMBAR",
    "FENCE",
    "WARP",
    "BSYNC",
    "LDGSTS",
    "UTMA",
)
MOST_GROUPS = 9
"""Of wgmma that are followed, with the open one; `DEPBAR` counts to 7, so older ones are done."""


class Instruction(NamedTuple):
    name: str
    """With its modifiers, such as `LDG.E.128`."""
    operands: str
    conditional: bool


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]
    """Index of the instruction that follows a label."""

    def jump(self, index: int) -> int | None:
        """Where the branch at `index` goes; None for what is no branch to a label."""
        instruction = self.instructions[index]
        found = re.search(r"\.L_\w+", instruction.operands) if instruction.name.startswith("BRA") else None
        return self.labels.get(found[0]) if found else None


def disassemble(cubin: bytes) -> Program:
    """The program of a kernel's machine code. Raises RuntimeError where `nvdisasm` cannot read it."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).with_name("bin") / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    return parse(done.stdout)


def parse(text: str) -> Program:
    """Instructions and labels of `nvdisasm -c`."""
    program = Program([], {})
    for line in text.splitlines():
        if label := _LABEL.match(line):
            program.labels[label[1]] = len(program.instructions)
        elif found := _LINE.search(line):
            program.instructions.append(Instruction(found[2], found[3], found[1] is not None))
    return program


def local_accesses_in_loops(program: Program) -> int:
    """Loads from and stores to local memory between a label and a later branch back to it."""
    inside: set[int] = set()
    for index in range(len(program.instructions)):
        target = program.jump(index)
        if target is not None and target <= index:
            inside.update(range(target, index))
    return sum(program.instructions[i].name.split(".")[0] in ("LDL", "STL") for i in inside)


def overwritten_operands(program: Program) -> list[str]:
    """Instructions that write a register which an asynchronous wgmma may still read or write.

    Between an HGMMA and the wait for its group (`WARPGROUP.DEPBAR.LE gsb0, n`: at most n groups are left),
    its registers of A belong to the hardware, and its accumulators may be touched by the next HGMMA alone.
    Some releases of ptxas gave the registers of A away too early (triton-lang/triton, pull request 11781).
    All paths are walked until nothing new is in flight anywhere; shared memory is not followed.
    """
    flight: list[tuple[frozenset[int], ...] | None] = [None] * len(program.instructions)
    wrong: dict[int, str] = {}
    waiting: list[tuple[int, tuple[frozenset[int], ...]]] = [(0, (frozenset(),))]
    while waiting:
        index, groups = waiting.pop()
        if index >= len(program.instructions):
            continue
        known = flight[index]
        merged = groups if known is None else _merge(known, groups)
        if merged == known:
            continue
        flight[index] = merged
        instruction = program.instructions[index]
        name, operands = instruction.name, instruction.operands
        busy = frozenset().union(*merged)
        if name.startswith("HGMMA"):
            # The last group is the open one, which `gsb0` closes.
            merged = (*merged[:-1], merged[-1] | _held(instruction))
            if "gsb0" in operands:
                merged = (*merged, frozenset())[-MOST_GROUPS:]
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands.rpartition("0x")[2], 16)
            closed = merged[:-1]
            merged = (*closed[len(closed) - left :], merged[-1]) if left else (merged[-1],)
        elif busy & _written(instruction):
            wrong[index] = f"{name} {operands}"
        target = program.jump(index)
        if target is not None:
            waiting.append((target, merged))
        if (name != "EXIT" and (target is None or instruction.conditional)) or instruction.conditional:
            waiting.append((index + 1, merged))
    return [wrong[index] for index in sorted(wrong)]


def _merge(one: tuple[frozenset[int], ...], other: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
    """What may be in flight on either of two paths, the youngest groups side by side."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    offset = len(longer) - len(shorter)
    return tuple(group if i < offset else group | shorter[i - offset] for i, group in enumerate(longer))


def _registers(operand: str, count: int) -> Iterable[int]:
    found = re.match(r"[-|~!]*R(\d+)", operand.strip())
    return range(int(found[1]), int(found[1]) + count) if found else ()


def _held(instruction: Instruction) -> frozenset[int]:
    """Registers of an HGMMA: its accumulators (D), and A where that is not in shared memory."""
    columns = int(re.search(r"\.64x(\d+)x", instruction.name)[1])
    operands = instruction.operands.split(",")
    half = ".F32." not in instruction.name
    accumulators = _registers(operands[0], columns // (4 if half else 2))
    # A has 64 rows of 32 bytes for 128 threads, whatever its dtype: four registers of each.
    return frozenset((*accumulators, *_registers(operands[1], 4)))


def _written(instruction: Instruction) -> frozenset[int]:
    """Registers that an instruction writes: those of its first operand."""
    if instruction.name.startswith(_NO_RESULT):
        return frozenset()
    count = max((width for part, width in _WIDTHS.items() if part in instruction.name), default=1)
    if instruction.name.startswith("LDSM"):
        count = 4 if ".4" in instruction.name else 2 if ".2" in instruction.name else 1
    if instruction.name.startswith("CS2R") and ".32" not in instruction.name:
        count = 2
    operands = instruction.operands.split(",")
    # A predicate may come before the register: `SHFL.BFLY PT, R4, ...`.
    place = next((x for x in operands if not re.match(r"\s*!?U?P[T\d]", x)), "")
    return frozenset(_registers(place, count))
