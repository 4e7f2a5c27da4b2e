"""gather_rows and scatter_rows of csrc: the host library against numpy, the kernels' machine code, and, where
there is a GPU, the kernels against torch."""

import ctypes
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "csrc" / "include"
SUCCESS, INVALID_ARGUMENT, INDEX_OUT_OF_RANGE, INDEX_REPEATED = 0, 1, -1, -2
GUARD = 64  # bytes before and after an array that must stay as they were

# (elements, bytes an element): the two widths of PRX in bf16 and fp32, a row of 8 mod 16 bytes, odd ones.
WIDTHS = [(1792, 2), (3584, 2), (1792, 4), (1796, 2), (33, 2), (3, 4), (3585, 1), (17, 1), (1, 1)]


class Library:
    """The C interface of api.h on addresses; `table` is its x or base, `moved` its out or update."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._gather, self._scatter = library.millrace_gather_rows, library.millrace_scatter_rows
        self._gather.argtypes = [pointer, size, pointer, small, size, pointer, size, pointer]
        self._scatter.argtypes = [pointer, size, pointer, pointer, small, size, size, pointer]

    def gather(self, table, rows, index, index_bytes, count, moved, row_bytes, stream=None) -> int:
        return self._gather(table, rows, index, index_bytes, count, moved, row_bytes, stream)

    def scatter(self, table, rows, index, index_bytes, count, moved, row_bytes, stream=None) -> int:
        return self._scatter(table, rows, moved, index, index_bytes, count, row_bytes, stream)


@pytest.fixture(scope="session")
def host(host_library) -> Library:
    return Library(host_library)


class Rows:
    """(rows, row_bytes) random bytes whose address is `phase` modulo 16, between two guards."""

    def __init__(self, rng: np.random.Generator, rows: int, row_bytes: int, phase: int) -> None:
        self.storage = rng.integers(0, 256, size=2 * GUARD + 32 + rows * row_bytes, dtype=np.uint8)
        start = GUARD + (phase - self.storage.ctypes.data - GUARD) % 16
        self.span = slice(start, start + rows * row_bytes)
        self.view = self.storage[self.span].reshape(rows, row_bytes)
        self.address = self.storage.ctypes.data + start
        assert self.address % 16 == phase

    def storage_with(self, view: np.ndarray) -> np.ndarray:
        """The storage as it must be once the rows hold `view`: guards unchanged."""
        expected = self.storage.copy()
        expected[self.span] = view.reshape(-1)
        return expected


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("x_phase", "out_phase"), [(0, 0), (4, 4), (0, 8), (6, 2), (1, 0), (15, 15)])
@pytest.mark.parametrize(("width", "item_bytes"), WIDTHS)
def test_gather_is_fancy_indexing(host, width, item_bytes, x_phase, out_phase, index_dtype):
    rng = np.random.default_rng(width)
    row_bytes = width * item_bytes
    x = Rows(rng, 19, row_bytes, x_phase)
    out = Rows(rng, 11, row_bytes, out_phase)
    index = rng.integers(0, 19, size=11).astype(index_dtype)  # repeats allowed
    expected = out.storage_with(x.view[index])
    code = host.gather(x.address, 19, index.ctypes.data, index.itemsize, 11, out.address, row_bytes)
    assert code == SUCCESS
    np.testing.assert_array_equal(out.storage, expected)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("base_phase", "update_phase"), [(0, 0), (12, 12), (8, 0), (2, 6), (0, 1), (15, 15)])
@pytest.mark.parametrize(("width", "item_bytes"), WIDTHS)
def test_scatter_is_fancy_assignment(host, width, item_bytes, base_phase, update_phase, index_dtype):
    rng = np.random.default_rng(width)
    row_bytes = width * item_bytes
    base = Rows(rng, 19, row_bytes, base_phase)
    update = Rows(rng, 11, row_bytes, update_phase)
    index = rng.permutation(19)[:11].astype(index_dtype)
    view = base.view.copy()
    view[index] = update.view
    expected = base.storage_with(view)
    code = host.scatter(base.address, 19, index.ctypes.data, index.itemsize, 11, update.address, row_bytes)
    assert code == SUCCESS
    np.testing.assert_array_equal(base.storage, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_no_row_and_one_row(host, count):
    rng = np.random.default_rng(0)
    table, moved = Rows(rng, 1, 3584, 0), Rows(rng, 1, 3584, 0)
    first, second = table.view.copy(), moved.view.copy()
    index = np.zeros(1, np.int64)

    expected = table.storage_with(second if count else first)
    assert host.scatter(table.address, 1, index.ctypes.data, 8, count, moved.address, 3584) == SUCCESS
    np.testing.assert_array_equal(table.storage, expected)

    table.view[:] = first
    expected = moved.storage_with(first if count else second)
    assert host.gather(table.address, 1, index.ctypes.data, 8, count, moved.address, 3584) == SUCCESS
    np.testing.assert_array_equal(moved.storage, expected)


def test_arrays_may_touch(host):
    rows = np.random.default_rng(0).integers(0, 256, size=(12, 64), dtype=np.uint8)
    index = np.array([7, 0, 3, 3], np.int32)
    address = rows.ctypes.data
    assert host.gather(address, 8, index.ctypes.data, 4, 4, address + 8 * 64, 64) == SUCCESS
    np.testing.assert_array_equal(rows[8:], rows[index])


def test_offsets_past_32_bits(host):
    """Row 1 300 000 of 3584 bytes starts past 2^32. The zeros are never touched, so they take no memory."""
    rows, row_bytes = 1_300_001, 3584
    x = np.zeros((rows, row_bytes), np.uint8)
    update = np.random.default_rng(0).integers(1, 256, size=(2, row_bytes), dtype=np.uint8)
    index = np.array([rows - 1, 3], np.int32)
    out = np.zeros_like(update)
    scattered = host.scatter(x.ctypes.data, rows, index.ctypes.data, 4, 2, update.ctypes.data, row_bytes)
    gathered = host.gather(x.ctypes.data, rows, index.ctypes.data, 4, 2, out.ctypes.data, row_bytes)
    assert (scattered, gathered) == (SUCCESS, SUCCESS)
    np.testing.assert_array_equal(x[index], update)
    np.testing.assert_array_equal(out, update)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [-1, 19, np.iinfo(np.int32).min, np.iinfo(np.int32).max])
def test_index_out_of_range_is_refused_before_any_write(host, bad, index_dtype):
    rng = np.random.default_rng(0)
    table, moved = Rows(rng, 19, 64, 0), Rows(rng, 3, 64, 0)
    index = np.array([0, 7, bad], index_dtype)
    before = table.storage.copy(), moved.storage.copy()
    address, item = index.ctypes.data, index.itemsize
    assert host.gather(table.address, 19, address, item, 3, moved.address, 64) == INDEX_OUT_OF_RANGE
    assert host.scatter(table.address, 19, address, item, 3, moved.address, 64) == INDEX_OUT_OF_RANGE
    np.testing.assert_array_equal(table.storage, before[0])
    np.testing.assert_array_equal(moved.storage, before[1])


def test_scatter_to_a_row_named_twice_is_refused_before_any_write(host):
    rng = np.random.default_rng(0)
    base, update = Rows(rng, 19, 64, 0), Rows(rng, 3, 64, 0)
    index = np.array([5, 7, 5], np.int32)
    before = base.storage.copy()
    assert host.scatter(base.address, 19, index.ctypes.data, 4, 3, update.address, 64) == INDEX_REPEATED
    np.testing.assert_array_equal(base.storage, before)


def assert_refuses_bad_arguments(library: Library) -> None:
    """Calls that either library must refuse by their arguments alone, so no address here is ever read."""
    table, moved, index = 1 << 20, 2 << 20, 3 << 20
    good = dict(table=table, rows=8, index=index, index_bytes=8, count=4, moved=moved, row_bytes=64)

    def gather(**changed) -> int:
        return library.gather(**(good | changed))

    def scatter(**changed) -> int:
        return library.scatter(**(good | changed))

    for changed in (
        {"index_bytes": 2},
        {"rows": -1},
        {"count": -1},
        {"row_bytes": -1},
        {"rows": 1 << 58},  # 2^64 bytes
        {"index": None},
        {"index": index + 4},
        {"table": None},
        {"moved": None},
        {"moved": table + 7 * 64},  # the last row of table
        {"moved": table - 4 * 64 + 1},  # one byte into the first
    ):
        assert gather(**changed) == INVALID_ARGUMENT, changed
        assert scatter(**changed) == INVALID_ARGUMENT, changed
    assert gather(index=moved + 64) == INVALID_ARGUMENT  # the index lies in what is written
    assert scatter(index=table + 64) == INVALID_ARGUMENT
    assert gather(rows=0) == INDEX_OUT_OF_RANGE
    assert scatter(rows=0) == INDEX_OUT_OF_RANGE
    assert scatter(count=9) == INDEX_REPEATED  # nine rows cannot be distinct among eight
    assert gather(count=0, index=None, moved=None) == SUCCESS
    assert scatter(count=0, index=None, moved=None) == SUCCESS


def test_host_library_refuses_bad_arguments(host):
    assert_refuses_bad_arguments(host)


def test_lanes_cover_every_byte_once_and_aligned(tmp_path, run, cxx):
    program = tmp_path / "row_copy_lanes"
    source = Path(__file__).with_name("row_copy_lanes.cpp")
    checks = ["-Wall", "-Wextra", "-Werror", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    run(cxx, "-std=c++17", "-O2", *checks, "-I", INCLUDE, source, "-o", program)
    assert run(program) == f"{16 * 16 * 78} cases\n"


def test_kernels_use_no_local_memory(build_log):
    """And at most the 48 registers that row_copy.h counts on for its bytes in flight."""
    kernels = re.findall(
        r"Compiling entry function '(\w*copy_rows\w*)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        build_log,
        flags=re.DOTALL,
    )
    assert sorted(arch for _, arch, *_ in kernels) == ["sm_80", "sm_80", "sm_90a", "sm_90a"], build_log
    for name, arch, *memory, registers in kernels:
        assert [int(each) for each in memory] == [0, 0, 0], (name, arch)
        assert int(registers) <= 48, (name, arch)


@pytest.fixture
def ptx_of_kernels(tmp_path, run, nvcc):
    def compiled(arch: str, *flags: str) -> list[str]:
        ptx = tmp_path / "row_copy.ptx"
        target = f"arch=compute_{arch},code=compute_{arch}"
        command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", *flags, "-I", INCLUDE, "-gencode", target, "-ptx"]
        run(*command, ROOT / "csrc" / "row_copy.cu", "-o", ptx)
        kernels = ptx.read_text().split(".entry")[1:]
        assert len(kernels) == 2  # int32 and int64 index
        return kernels

    return compiled


BATCHES = re.compile(r"((load ){4}(store ){4})+")  # kBatch loads in flight before the first store


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_ptx_batches_128_bit_accesses(ptx_of_kernels, arch):
    """And its loads are not `.nc`: those ptxas is free to move down to their stores."""
    for kernel in ptx_of_kernels(arch):
        wide = re.findall(r"\b(ld|st)\.global\.((?:\w+\.)*)(?:v4\.\w32|v2\.\w64)\b", kernel)
        assert all("nc" not in qualifiers for _, qualifiers in wide)
        order = "".join("load " if operation == "ld" else "store " for operation, _ in wide)
        assert BATCHES.fullmatch(order), order


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="cuobjdump not found")
def test_machine_code_batches_128_bit_accesses(cuda_library_path, run):
    functions = run("cuobjdump", "-sass", cuda_library_path).split("Function : ")[1:]
    kernels = [function for function in functions if "copy_rows" in function.partition("\n")[0]]
    assert len(kernels) == 4  # int32 and int64 index, sm_80 and sm_90a
    for kernel in kernels:
        wide = re.findall(r"\b(LDG|STG)\.E\.128\b", kernel)
        order = "".join("load " if operation == "LDG" else "store " for operation in wide)
        assert BATCHES.fullmatch(order), order


@pytest.mark.parametrize("checked", [False, True])
def test_index_assertion_is_in_the_debug_build_alone(ptx_of_kernels, checked):
    flags = ["-DMILLRACE_CHECK_INDICES"] if checked else []
    for kernel in ptx_of_kernels("90a", *flags):
        assert ("__assertfail" in kernel) == checked


def test_cuda_library_refuses_bad_arguments(cuda_library_path):
    assert_refuses_bad_arguments(Library(cuda_library_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch succeeds here")
def test_failed_launch_is_returned(cuda_library_path):
    index = np.zeros(1, np.int32)
    x, out = np.zeros(64, np.uint8), np.ones(64, np.uint8)
    code = Library(cuda_library_path).gather(x.ctypes.data, 1, index.ctypes.data, 4, 1, out.ctypes.data, 64)
    assert code > INVALID_ARGUMENT  # cudaErrorInsufficientDriver, cudaErrorNoDevice


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "offset"), [(4099, 1792, 0), (513, 3584, 0), (257, 33, 0), (64, 1792, 1)]
)
def test_kernels_equal_torch_indexing(cuda_library_path, rows, width, offset, dtype, index_dtype):
    library = Library(cuda_library_path)
    generator = torch.Generator("cuda").manual_seed(0)
    storage = torch.randn(rows * width + offset, device="cuda", generator=generator).to(dtype)
    x = storage[offset:].view(rows, width)  # offset 1: x is not 16-byte aligned, out is
    count = rows // 2
    index = torch.randperm(rows, device="cuda", generator=generator)[:count]
    narrow = index.to(index_dtype)
    stream = torch.cuda.current_stream().cuda_stream
    common = (narrow.data_ptr(), narrow.element_size(), count)
    row_bytes = width * x.element_size()

    out = torch.empty(count, width, device="cuda", dtype=dtype)
    assert library.gather(x.data_ptr(), rows, *common, out.data_ptr(), row_bytes, stream) == SUCCESS
    assert torch.equal(out, x[index])

    update = -out
    expected = x.clone()
    expected[index] = update
    assert library.scatter(x.data_ptr(), rows, *common, update.data_ptr(), row_bytes, stream) == SUCCESS
    assert torch.equal(x, expected)
