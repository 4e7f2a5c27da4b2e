"""Watch over memory in Triton's interpreter: it notices what it is for, and lets pass what is in order."""

import pytest
import torch

from millrace.kernels.support.registration import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")

if INTERPRETING:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    from tests.kernels import memory_watch

    @triton.jit
    def _copy(x, y, size, BLOCK: tl.constexpr, LOADED: tl.constexpr = 0, STORED: tl.constexpr = 0):
        """Right as it is; LOADED and STORED are by how much the masks are off."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < size + LOADED, other=0.0)
        tl.store(y + at, value, mask=at < size + STORED)

    @triton.jit
    def _scatter(x, target, y, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + tl.load(target + at), tl.load(x + at))

    @triton.jit
    def _shift(x):
        """In place: what a program loads, its neighbour has stored, or will."""
        value = tl.load(x + tl.program_id(0))
        tl.store(x + tl.program_id(0) + 1, value)

    @triton.jit
    def _count(x, counter, HOW: tl.constexpr):
        value = tl.load(x + tl.program_id(0))
        if HOW == "most":
            tl.atomic_max(counter, value)
        elif HOW == "ticket":
            tl.store(x + tl.atomic_add(counter, 1), value)
        elif HOW == "cas":
            tl.atomic_cas(counter, value, value)
        elif HOW == "exchange":
            tl.atomic_xchg(counter, value)
        elif HOW == "stored":
            tl.atomic_add(counter, value)
            if tl.program_id(0) == 0:
                tl.store(counter, value)
        else:
            tl.atomic_add(counter, value)

    @triton.jit
    def _either(x, y, out):
        at = tl.arange(0, 2)
        tl.store(out + at, tl.load(tl.where(at == 0, x, y)))


def neighbours(size, count=2):
    """FP32 tensors that own storages side by side: the one after another's end is in the next."""
    memory = memoryview(bytearray(4 * size * count))
    return [
        torch.frombuffer(memory[4 * size * i : 4 * size * (i + 1)], dtype=torch.float32) for i in range(count)
    ]


def test_lets_pass_what_is_in_order():
    x, y = torch.randn(11), torch.empty(13)[1:12]
    _copy[(3,)](x, y, 11, BLOCK=4)
    assert torch.equal(x, y)
    _copy[(3,)](y, y, 11, BLOCK=4)
    assert torch.equal(x, y)


def test_addresses_of_masked_lanes_are_not_looked_at(record_tallies):
    _copy[(4,)](torch.randn(9), torch.empty(9), 9, BLOCK=4)
    assert record_tallies().launches == 1
    assert record_tallies().addresses == 18


@pytest.fixture
def record_tallies():
    """What has been added since the test began."""
    key = ("no operator", "others")
    before = memory_watch.TALLIES.get(key, memory_watch.Tally())
    launches, addresses = before.launches, before.addresses

    def difference():
        now = memory_watch.TALLIES[key]
        return memory_watch.Tally(now.launches - launches, now.addresses - addresses)

    return difference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"LOADED": 1}, r"_copy, program \(2, 0, 0\): load at element 11 of x, outside its 44 bytes"),
        ({"STORED": 1}, r"_copy, program \(2, 0, 0\): store at element 11 of y, outside its 44 bytes"),
    ],
)
def test_a_mask_that_is_off_by_one(options, message):
    """Even where the memory next to it belongs to another argument."""
    with pytest.raises(InterpreterError, match=message):
        _copy[(3,)](*(torch.zeros(11) for _ in range(2)), 11, BLOCK=4, **options)
    x, y = neighbours(11)
    assert y.data_ptr() == x.data_ptr() + 44
    for first, second in ((x, y), (y, x)):
        with pytest.raises(InterpreterError, match=message):
            _copy[(3,)](first, second, 11, BLOCK=4, **options)


def test_before_the_storage_and_in_front_of_the_view():
    """Offsets count from where the argument starts, the limits are those of its storage."""
    x = torch.zeros(16)
    _scatter[(1,)](x[:4], torch.tensor([-1, 0, 1, 2]), x[8:], BLOCK=4)
    with pytest.raises(InterpreterError, match="store at element -9 of y, outside its 64 bytes"):
        _scatter[(1,)](torch.zeros(4), torch.tensor([0, 1, -9, 2]), x[8:], BLOCK=4)


def test_nothing_of_an_empty_tensor_may_be_touched():
    with pytest.raises(InterpreterError, match="load at element 0 of x, outside its 0 bytes"):
        _copy[(1,)](torch.empty(0), torch.empty(4), 4, BLOCK=4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 1, 2, 3, 4, 3, 6, 7], "store at element 3 of y, to which another program stores"),
        ([0, 1, 2, 1, 4, 5, 6, 7], "store at element 1 of y, twice in one store"),
    ],
)
def test_two_stores_to_one_address(targets, message):
    with pytest.raises(InterpreterError, match=message):
        _scatter[(2,)](torch.arange(8.0), torch.tensor(targets), torch.empty(8), BLOCK=4)


def test_stores_of_other_widths_to_one_address():
    """Eight numbers of FP16 lie in the bytes of the first four of FP32."""
    memory = torch.zeros(8)
    with pytest.raises(InterpreterError, match=r"element . of [xy], which another program"):
        _copy[(2,)](memory.view(torch.float16)[:8], memory[:8], 8, BLOCK=4)


def test_loading_what_another_program_stores():
    """Whichever of the two comes first."""
    found = set()
    for seed in range(8):
        memory_watch._order.seed(seed)
        with pytest.raises(InterpreterError, match="of x, which another program") as caught:
            _shift[(2,)](torch.zeros(3))
        found.add(str(caught.value).split("another program ")[1][:5])
    assert found == {"loads", "store"}


@pytest.mark.parametrize(
    ("how", "counter", "message"),
    [
        ("add", torch.zeros(()), "atomic .*FADD.* follows the order of the programs"),
        ("exchange", torch.zeros((), dtype=torch.int32), "atomic .*XCHG.* follows the order of the programs"),
        ("cas", torch.zeros((), dtype=torch.int32), "compare-and-swap follows the order"),
        ("ticket", torch.zeros((), dtype=torch.int32), "what an atomic operation returns follows the order"),
        ("stored", torch.zeros((), dtype=torch.int32), "of counter, to which"),
        (
            "add",
            torch.zeros(0, dtype=torch.int32),
            "atomic operation at element 0 of counter, outside its 0 by",
        ),
    ],
)
def test_atomic_operations_whose_result_follows_the_order(how, counter, message):
    with pytest.raises(InterpreterError, match=message):
        _count[(4,)](torch.arange(4).to(counter.dtype), counter, HOW=how)


@pytest.mark.parametrize(("how", "total"), [("add", 6), ("most", 3)])
def test_atomic_operations_on_integers_are_in_order(how, total):
    counter = torch.zeros((), dtype=torch.int32)
    _count[(4,)](torch.arange(4, dtype=torch.int32), counter, HOW=how)
    assert counter == total


def test_a_pointer_of_unknown_origin():
    with pytest.raises(
        InterpreterError, match=r"_either, program .* through a pointer that comes from no arg"
    ):
        _either[(1,)](torch.zeros(1), torch.zeros(1), torch.empty(2))


def test_programs_run_once_each_in_an_order_of_the_seed(monkeypatch):
    ran = []
    builder = memory_watch.WatchingBuilder
    base = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda self, *at: (base(self, *at), ran.append(self.grid_idx))[0]
    )

    def order(seed=None):
        ran.clear()
        if seed is not None:
            memory_watch._order.seed(seed)
        _copy[(3, 2, 4)](torch.zeros(0), torch.zeros(0), 0, BLOCK=4)
        return list(ran)

    first, second = order(seed=1), order()
    assert sorted(first) == [(x, y, z) for x in range(3) for y in range(2) for z in range(4)]
    assert sorted(second) == sorted(first) != first
    assert second != first
    assert order(seed=1) == first
