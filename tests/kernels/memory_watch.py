"""Memory that kernels touch in Triton's interpreter: launches are watched, programs run in a shuffled order.

A launch fails where a program loads or stores outside the storage of the argument that its pointer came from,
where two programs store to one address or one loads what another stores, where one store names an address
twice, and where atomic operations leave a result that follows the order of the programs. Without these, the
bits of a result are the same in any order; a second run of a test's operation, in another order, shows it.

A plugin of pytest (`tests/conftest.py` registers it under TRITON_INTERPRET=1), which ends a session with a
table of what every operator has launched.
"""

import inspect
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import pytest
import torch
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle

import millrace.kernels.support.registration  # noqa: F401 - installs Builder, and may not do so over the watch
from millrace.kernels.support.interpreter import Builder

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NOBODY, SEVERAL, ATOMIC = -1, -2, -3
"""Instead of a program's number: untouched, loaded by more than one program, changed by atomic operations."""

_ANY_ORDER = {
    ir.ATOMIC_OP.ADD,
    ir.ATOMIC_OP.MAX,
    ir.ATOMIC_OP.UMAX,
    ir.ATOMIC_OP.MIN,
    ir.ATOMIC_OP.UMIN,
    ir.ATOMIC_OP.AND,
    ir.ATOMIC_OP.OR,
    ir.ATOMIC_OP.XOR,
}


class MemoryFault(AssertionError):
    """What a program may not do with memory."""


@dataclass
class Tally:
    """Of one operator in one dtype: what was watched, and the largest error as a share of what is allowed."""

    launches: int = 0
    addresses: int = 0
    worst: float = 0.0

    def add(self, other: "Tally") -> None:
        self.launches += other.launches
        self.addresses += other.addresses
        self.worst = max(self.worst, other.worst)


TALLIES: dict[tuple[str, str], Tally] = {}
"""By operator and by the dtype of its first argument."""
_of_this_test: set[tuple[str, str]] = set()
_order = random.Random()


def judged(of: str, share: float) -> None:
    """An error of an "output" or "gradient" of this test's operators, as a share of what is allowed."""
    for operator, dtype in _of_this_test:
        if of.startswith("gradient") or not operator.endswith("_backward"):
            tally = TALLIES[operator, dtype]
            tally.worst = max(tally.worst, share)


class Memory:
    """A storage: where it lies, and which program has loaded and stored each granule of it."""

    def __init__(self, storage: torch.UntypedStorage, granule: int) -> None:
        self.start, self.size, self.granule = storage.data_ptr(), storage.nbytes(), granule
        self.loaded_by, self.stored_by = (
            np.full(-(-self.size // granule), NOBODY, dtype=np.int32) for _ in range(2)
        )


@dataclass
class Argument:
    name: str
    pointer: int
    memory: Memory


@dataclass
class Launch:
    """One launch of a kernel, and the program of it that runs."""

    kernel: str
    arguments: dict[int, Argument]
    """By the address that the kernel gets."""
    tally: Tally
    order: list[int] = field(default_factory=list)
    grid: tuple[int, int, int] = (0, 0, 0)
    program: int = 0

    def touch(self, pointers: TensorHandle, mask: TensorHandle, how: str) -> None:
        """Check and note the addresses of a load, a store or an atomic operation."""
        # The interpreter holds some masks as integers, by which NumPy would index.
        addresses = pointers.data[mask.data.astype(bool)]
        if not addresses.size:
            return
        self.tally.addresses += addresses.size
        argument = self.argument(pointers)
        if argument is None:
            raise MemoryFault(f"{self._who()} {how}s through a pointer that comes from no argument")
        memory, width = argument.memory, max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        offset = (addresses - np.uint64(memory.start)).view(np.int64)
        outside = (offset < 0) | (offset > memory.size - width)
        if outside.any():
            self._fail(how, argument, offset[outside][0], width, f"outside its {memory.size} bytes")
        place = offset // memory.granule
        if width > memory.granule:
            place = (place[:, None] + np.arange(width // memory.granule)).ravel()
        check = {"load": self._load, "store": self._store, "atomic operation": self._change}[how]
        for bad, why in check(memory, place):
            if bad.any():
                self._fail(how, argument, place[bad][0] * memory.granule, width, why)

    def argument(self, pointers: TensorHandle) -> Argument | None:
        """From which the pointers come."""
        found = pointers.attr.get("argument")
        if found is None and pointers.data.size == 1:
            found = self.arguments.get(int(pointers.data.item()))
        return found

    def _load(self, memory: Memory, place: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        writer, reader = memory.stored_by[place], memory.loaded_by[place]
        yield (writer != NOBODY) & (writer != self.program), "which another program stores"
        memory.loaded_by[place] = np.where(
            (reader == NOBODY) | (reader == self.program), self.program, SEVERAL
        )

    def _store(self, memory: Memory, place: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        writer, reader = memory.stored_by[place], memory.loaded_by[place]
        yield (writer != NOBODY) & (writer != self.program), "to which another program stores"
        yield (reader != NOBODY) & (reader != self.program), "which another program loads"
        lane = np.arange(place.size, dtype=np.int32)
        memory.stored_by[place] = lane
        yield memory.stored_by[place] != lane, "twice in one store"
        memory.stored_by[place] = self.program

    def _change(self, memory: Memory, place: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        writer, reader = memory.stored_by[place], memory.loaded_by[place]
        yield (writer != NOBODY) & (writer != ATOMIC), "to which a program stores"
        yield reader != NOBODY, "which a program loads"
        memory.stored_by[place] = ATOMIC

    def _fail(self, how: str, argument: Argument, offset: int, width: int, why: str) -> None:
        element = (int(offset) + argument.memory.start - argument.pointer) // width
        raise MemoryFault(f"{self._who()}: {how} at element {element} of {argument.name}, {why}")

    def _who(self) -> str:
        return f"{self.kernel}, program {tuple(map(int, np.unravel_index(self.program, self.grid)))}"


class _Unordered:
    """What an atomic operation returns: nobody may look at it."""

    def __getattr__(self, name: str) -> None:
        raise MemoryFault("what an atomic operation returns follows the order of the programs")


class WatchingBuilder(Builder):
    """The interpreter's operations, with an eye on memory."""

    launch: Launch

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.launch.grid = grid
        self.launch.order = list(range(grid[0] * grid[1] * grid[2]))
        _order.shuffle(self.launch.order)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        """Programs are asked for in ascending order; another one runs instead."""
        self.launch.program = self.launch.order[np.ravel_multi_index((x, y, z), self.grid_dim)]
        super().set_grid_idx(*map(int, np.unravel_index(self.launch.program, self.grid_dim)))

    def create_masked_load(self, ptrs, mask, *rest):
        self.launch.touch(ptrs, mask, "load")
        return super().create_masked_load(ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        self.launch.touch(ptrs, mask, "store")
        return super().create_masked_store(ptrs, value, mask, *rest)

    def create_atomic_rmw(self, operation, ptr, val, mask, *rest):
        self.launch.touch(ptr, mask, "atomic operation")
        super().create_atomic_rmw(operation, ptr, val, mask, *rest)
        if operation not in _ANY_ORDER:
            raise MemoryFault(f"the result of atomic {operation} follows the order of the programs")
        return _Unordered()

    def create_atomic_cas(self, *arguments):
        raise MemoryFault("the result of an atomic compare-and-swap follows the order of the programs")


def _keeping_argument(name):
    base = getattr(Builder, name)

    def create(self, *arguments):
        result = base(self, *arguments)
        for handle in arguments:
            if isinstance(handle, TensorHandle) and handle.dtype.is_ptr():
                result.set_attr("argument", self.launch.argument(handle))
        return result

    return create


for _name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "bitcast"):
    setattr(WatchingBuilder, f"create_{_name}", _keeping_argument(f"create_{_name}"))


class WatchedGrid(GridExecutor):
    """A launch, begun with the memory of its arguments."""

    def __init__(self, fn, arg_names, grid, pre_run_hooks=()):
        super().__init__(fn, arg_names, grid, [*pre_run_hooks, self._begin])

    def _begin(self, *args, **kwargs):
        storages: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, value in inspect.getcallargs(self.fn, *args, **kwargs).items():
            for tensor in torch.utils._pytree.tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        arguments = {}
        for named in storages.values():
            granule = min(tensor.element_size() for _, tensor in named)
            memory = Memory(named[0][1].untyped_storage(), granule)
            for name, tensor in named:
                arguments.setdefault(tensor.data_ptr(), Argument(name, tensor.data_ptr(), memory))
        key = _caller()
        _of_this_test.add(key)
        tally = TALLIES.setdefault(key, Tally())
        tally.launches += 1
        interpreter.interpreter_builder.launch = Launch(self.fn.__name__, arguments, tally)


def _caller() -> tuple[str, str]:
    """The operator of ours that launches, and its dtype."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is torch._ops.OpOverload.__call__.__code__:
            operator = frame.f_locals["self"]
            if operator.namespace == "millrace":
                first = next(iter((*frame.f_locals["args"], *frame.f_locals["kwargs"].values())))
                return operator._schema.name, DTYPES.get(first.dtype, "others")
        frame = frame.f_back
    return "no operator", "others"


def install() -> None:
    interpreter.interpreter_builder.__class__ = WatchingBuilder
    interpreter.GridExecutor = WatchedGrid


def pytest_configure(config: pytest.Config) -> None:
    install()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test has its own order of programs, the same whenever it runs."""
    _order.seed(item.nodeid)
    _of_this_test.clear()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process hands its numbers to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["watched"] = [[*key, asdict(tally)] for key, tally in TALLIES.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    for operator, dtype, tally in getattr(node, "workeroutput", {}).get("watched", ()):
        TALLIES.setdefault((operator, dtype), Tally()).add(Tally(**tally))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLIES:
        return
    write = terminalreporter.write_line
    terminalreporter.section("Kernels in Triton's interpreter")
    columns = (*DTYPES.values(), "others")
    write("launches (largest error, as a share of what is allowed), and addresses that were watched")
    write(f"{'operator':46}" + "".join(f"{name:>14}" for name in columns) + f"{'addresses':>14}")
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("millrace::")}
    for operator in sorted(registered | {name for name, _ in TALLIES}):
        row = [TALLIES.get((operator, name), Tally()) for name in columns]
        cells = (f"{x.launches}" + (f" ({x.worst:.2f})" if x.worst else "") for x in row)
        write(f"{operator:46}" + "".join(f"{x:>14}" for x in cells) + f"{sum(x.addresses for x in row):>14,}")
    for what in ("launches", "addresses"):
        sums = [
            sum(getattr(x, what) for (_, name), x in TALLIES.items() if name == column) for column in columns
        ]
        write(f"{what:46}" + "".join(f"{x:>14,}" for x in sums) + f"{sum(sums):>14,}")
